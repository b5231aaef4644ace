// What attention_scalar_dkv.wgsl keeps for attention_scalar_dq_of_ds.wgsl: dS' (keys, queries) of every head of the launch, a row for each key,
// so that four queries of one key lie together, as the thread has them once it turns its blocks of 4 x 4. Tiles above the diagonal are not
// written. A head has seq_len rows of ceil(seq_len / 4) quads; queries beyond the end are zeros.
//
// Bindings: 5 kept (head_count, T, ceil(T / 4)) vec4<f32>, written.

@group(0) @binding(5) var<storage, read_write> kept: array<vec4<f32>>;

fn keep_key(key: u32, at: u32, queries: vec4<f32>) {
    if (key < params.seq_len) { kept[at] = queries; }
}

// The thread's quad j of queries and its quad h of keys
fn keep_block(j: u32, h: u32, query_start: u32, key_start: u32, first_row: u32) {
    let row_quads = (params.seq_len + 3u) / 4u;
    let quad = query_start / 4u + thread_col + j * COL_THREADS;
    if (quad < row_quads) {
        let key = key_start + 4u * own_quad(h);
        let at = (first_row + key) * row_quads + quad;
        let x0 = gradients[ROW_QUADS * (4u * j) + h];
        let x1 = gradients[ROW_QUADS * (4u * j + 1u) + h];
        let x2 = gradients[ROW_QUADS * (4u * j + 2u) + h];
        let x3 = gradients[ROW_QUADS * (4u * j + 3u) + h];
        keep_key(key, at, vec4<f32>(x0.x, x1.x, x2.x, x3.x));
        keep_key(key + 1u, at + row_quads, vec4<f32>(x0.y, x1.y, x2.y, x3.y));
        keep_key(key + 2u, at + 2u * row_quads, vec4<f32>(x0.z, x1.z, x2.z, x3.z));
        keep_key(key + 3u, at + 3u * row_quads, vec4<f32>(x0.w, x1.w, x2.w, x3.w));
    }
}

fn keep_quad(j: u32, query_start: u32, key_start: u32, first_row: u32) {
    keep_block(j, 0u, query_start, key_start, first_row);
    if (ROW_QUADS > 1u) { keep_block(j, LAST_ROW_QUAD, query_start, key_start, first_row); }
}

// The head is counted from the launch's first.
fn keep_score_gradients(query_start: u32, key_start: u32, launch_head: u32) {
    let first_row = launch_head * params.seq_len;
    keep_quad(0u, query_start, key_start, first_row);
    if (SCORE_QUADS > 1u) { keep_quad(LAST_SCORE_QUAD, query_start, key_start, first_row); }
}
