// What attention_scalar_dkv.wgsl keeps for attention_scalar_dq_of_ds.wgsl: dS', written as attention_scalar_kept.wgsl, which is prepended, says.

fn keep_key(key: u32, at: u32, queries: vec4<f32>) {
    if (key < params.seq_len) { kept[at] = queries; }
}

// The thread's quad j of queries and its quad h of keys
fn keep_block(j: u32, h: u32, query_start: u32, key_start: u32, launch_head: u32) {
    let row_quads = kept_row_quads();
    let quad = query_start / 4u + thread_col + j * COL_THREADS;
    if (quad < row_quads) {
        let key = key_start + 4u * own_quad(h);
        let at = kept_at(launch_head, key, quad);
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

fn keep_quad(j: u32, query_start: u32, key_start: u32, launch_head: u32) {
    keep_block(j, 0u, query_start, key_start, launch_head);
    if (ROW_QUADS > 1u) { keep_block(j, LAST_ROW_QUAD, query_start, key_start, launch_head); }
}

fn keep_score_gradients(query_start: u32, key_start: u32, launch_head: u32) {
    keep_quad(0u, query_start, key_start, launch_head);
    if (SCORE_QUADS > 1u) { keep_quad(LAST_SCORE_QUAD, query_start, key_start, launch_head); }
}
