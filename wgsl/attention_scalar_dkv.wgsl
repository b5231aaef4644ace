// Causal attention, backward, dK and dV, without subgroups, f16 arithmetic or cooperative matrices: it runs everywhere.
//
// One workgroup computes the gradients of OWN keys and values of one head, all D columns. Keys are the rows here, so scores
// appear transposed:
//     dK = dV = 0
//     for each tile of OTHER queries from the diagonal on:
//         scores' = K Q^T;  P' = exp(scores' * scale - lse)  the forward: out = dropout(P) V
//         dV += dropout(P') dOut                             dropout(P') through the left tile
//         gradients' = V dOut^T;  dS' = P' * (dropout'(gradients') - delta)
//         dK += dS' Q                                        dS' through the left tile
//         keep_score_gradients(dS')                          by the file beside it, for dQ
//     dK *= scale
// Workgroups with the most queries are launched first; tiles above the diagonal are never visited. Threads whose keys all lie beyond one skip
// its products where there is dropout, and with them its random words. Where there is none they multiply zeros: the branches cost every tile
// moves of the sums, 6 % at 1024 tokens.
//
// Header: as attention_scalar_products.wgsl, which is prepended, says; CLOCK and PARAMS, the last two bindings. Beside it
// attention_scalar_ds.wgsl or attention_scalar_no_ds.wgsl.
// Grid: head_count * ceil(seq_len / OWN) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 dout (B, T, C) elem; 2 lse (B, H, T) f32; 3 delta (B, H, T) f32;
//           4 dqkv (B, T, 3C) elem, its k and v thirds are written; CLOCK clock (4) u32; PARAMS params.

struct Params {
    head_count: u32, // of the batch * heads, those of this launch ...
    heads: u32,
    seq_len: u32,
    first_head: u32, // ... from this one on
    seed_lo: u32,
    seed_hi: u32,
    step: u32, // of the masks, counted from the clock
    site: u32,
    drop_threshold: u32, // a probability is kept when its random word is >= this
    keep_scale: f32,
    gradient_scale: f32, // unused
    result_scale: f32,   // unused
}

@group(0) @binding(0) var<storage, read_write> qkv: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> dout: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> delta: array<f32>;
@group(0) @binding(4) var<storage, read_write> dqkv: array<vec4<elem>>;
@group(0) @binding(CLOCK) var<storage, read_write> clock: array<u32>;
@group(0) @binding(PARAMS) var<uniform> params: Params;

var<private> drop_step: u32; // the counter of the masks

var<private> scores: Scores;    // then P', a dropped one with a minus sign
var<private> gradients: Scores; // dropout(P'), then the gradients, then dS'
var<private> key_sums: Sums;
var<private> value_sums: Sums;

// Four rows of dout at four dimensions -> registers
fn fetch_dout_block(i: u32, block: Block, rows: Rows, chunk: u32) {
    let last = params.seq_len - 1u;
    let row = rows.first + 4u * block.quad;
    let at = rows.base + chunk + block.dim_quad;
    next_blocks[4u * i] = vec4<f32>(dout[at + min(row, last) * rows.stride]);
    next_blocks[4u * i + 1u] = vec4<f32>(dout[at + min(row + 1u, last) * rows.stride]);
    next_blocks[4u * i + 2u] = vec4<f32>(dout[at + min(row + 2u, last) * rows.stride]);
    next_blocks[4u * i + 3u] = vec4<f32>(dout[at + min(row + 3u, last) * rows.stride]);
}

// Own rows of qkv and others of dout at the dimensions from quad `chunk` on
fn fetch_gradient_block(i: u32, own: Rows, other: Rows, chunk: u32) {
    let block = block_of(i);
    if (block.is_own) {
        fetch_qkv_block(i, block, own, chunk);
    } else {
        fetch_dout_block(i, block, other, chunk);
    }
}

fn fetch_gradient_blocks(own: Rows, other: Rows, chunk: u32) {
    fetch_gradient_block(0u, own, other, chunk);
    if (BLOCKS > 1u) { fetch_gradient_block(1u, own, other, chunk); }
    if (BLOCKS > 2u) { fetch_gradient_block(BLOCKS - 1u, own, other, chunk); }
}

// CHUNK rows of dout as they lie -> registers
fn fetch_dout_rows(rows: Rows) {
    for (var i = 0u; i < ROW_STEPS; i++) {
        let index = thread + i * THREADS;
        let row = min(rows.first + index / DIM_QUADS, params.seq_len - 1u);
        next_rows[i] = vec4<f32>(dout[rows.base + row * rows.stride + index % DIM_QUADS]);
    }
}

// The query of column j
fn query_of(j: u32, query_start: u32) -> u32 {
    return query_start + 4u * (thread_col + j / 4u * COL_THREADS) + j % 4u;
}

fn mask_column(j: u32, query_start: u32, key_start: u32) {
    let query = query_of(j, query_start);
    for (var h = 0u; h < ROW_QUADS; h++) {
        let keys = vec4<u32>(key_start + 4u * own_quad(h)) + vec4<u32>(0u, 1u, 2u, 3u);
        scores[ROW_QUADS * j + h] = select(scores[ROW_QUADS * j + h], vec4<f32>(MASKED), vec4<u32>(query) < keys);
    }
}

fn mask_quad(j: u32, query_start: u32, key_start: u32) {
    mask_column(4u * j, query_start, key_start);
    mask_column(4u * j + 1u, query_start, key_start);
    mask_column(4u * j + 2u, query_start, key_start);
    mask_column(4u * j + 3u, query_start, key_start);
}

// P' and dropout(P') of one query and all the thread's keys
fn probabilities_column(j: u32, query_start: u32, key_start: u32, row_base: u32, scale: f32) {
    let query = query_of(j, query_start);
    // Beyond the end every probability becomes exp2(-1e30) = 0.
    let row_lse = select(-MASKED, lse[row_base + min(query, params.seq_len - 1u)] * LOG2_E, query < params.seq_len);
    for (var h = 0u; h < ROW_QUADS; h++) {
        let at = ROW_QUADS * j + h;
        let probabilities = exp2(scores[at] * scale - vec4<f32>(row_lse));
        scores[at] = probabilities;
        gradients[at] = probabilities;
        if (DROPOUT) {
            let key_quad = key_start / 4u + own_quad(h);
            let random = philox4x32(
                vec4<u32>(key_quad, row_base + query, drop_step, params.site),
                vec2<u32>(params.seed_lo, params.seed_hi),
            );
            let kept = random >= vec4<u32>(params.drop_threshold);
            scores[at] = select(-probabilities, probabilities, kept);
            gradients[at] = select(vec4<f32>(), probabilities * params.keep_scale, kept);
        }
    }
}

fn probabilities_quad(j: u32, query_start: u32, key_start: u32, row_base: u32, scale: f32) {
    probabilities_column(4u * j, query_start, key_start, row_base, scale);
    probabilities_column(4u * j + 1u, query_start, key_start, row_base, scale);
    probabilities_column(4u * j + 2u, query_start, key_start, row_base, scale);
    probabilities_column(4u * j + 3u, query_start, key_start, row_base, scale);
}

// dS' = P' * (dropout'(gradients') - delta) of one query and all the thread's keys
fn score_gradients_column(j: u32, query_start: u32, row_base: u32) {
    let row_delta = delta[row_base + min(query_of(j, query_start), params.seq_len - 1u)];
    for (var h = 0u; h < ROW_QUADS; h++) {
        let at = ROW_QUADS * j + h;
        if (DROPOUT) {
            gradients[at] = select(vec4<f32>(), gradients[at] * params.keep_scale, scores[at] > vec4<f32>());
        }
        gradients[at] = abs(scores[at]) * (gradients[at] - vec4<f32>(row_delta));
    }
}

fn score_gradients_quad(j: u32, query_start: u32, row_base: u32) {
    score_gradients_column(4u * j, query_start, row_base);
    score_gradients_column(4u * j + 1u, query_start, row_base);
    score_gradients_column(4u * j + 2u, query_start, row_base);
    score_gradients_column(4u * j + 3u, query_start, row_base);
}

fn store_row(i: u32, key: u32, key_base: u32, value_base: u32, qkv_stride: u32, scale: f32) {
    if (key < params.seq_len) {
        for (var c = 0u; c < OUT_QUADS; c++) {
            let at = key * qkv_stride + thread_col + c * COL_THREADS;
            dqkv[key_base + at] = vec4<elem>(key_sums[OUT_QUADS * i + c] * scale);
            dqkv[value_base + at] = vec4<elem>(value_sums[OUT_QUADS * i + c]);
        }
    }
}

fn store_quad(h: u32, key: u32, key_base: u32, value_base: u32, qkv_stride: u32, scale: f32) {
    store_row(4u * h, key, key_base, value_base, qkv_stride, scale);
    store_row(4u * h + 1u, key + 1u, key_base, value_base, qkv_stride, scale);
    store_row(4u * h + 2u, key + 2u, key_base, value_base, qkv_stride, scale);
    store_row(4u * h + 3u, key + 3u, key_base, value_base, qkv_stride, scale);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    drop_step = params.step + clock[0];
    let seq_len = params.seq_len;
    let head_count = params.head_count;
    let key_tiles = (seq_len + OWN - 1u) / OWN;
    let tile = workgroup.y * grid.x + workgroup.x;
    if (tile >= head_count * key_tiles) {
        return;
    }
    let key_start = tile / head_count * OWN;      // the longest columns first
    let batch_head = params.first_head + tile % head_count;
    let batch = batch_head / params.heads;
    let head = batch_head % params.heads;
    let channel_quads = params.heads * DIM_QUADS; // C / 4
    let qkv_stride = 3u * channel_quads;          // quads of one token of qkv
    let query_base = batch * seq_len * qkv_stride + head * DIM_QUADS;
    let key_base = query_base + channel_quads;
    let value_base = key_base + channel_quads;
    let dout_base = batch * seq_len * channel_quads + head * DIM_QUADS;
    let row_base = batch_head * seq_len;
    let scale = 1.0 / sqrt(f32(HEAD_DIM));

    thread = local;
    thread_row = thread / COL_THREADS;
    thread_col = thread % COL_THREADS;
    let first_key = key_start + first_neighbour();
    let keys = Rows(key_base, qkv_stride, key_start);
    let values = Rows(value_base, qkv_stride, key_start);

    for (var query_start = key_start / OTHER * OTHER; query_start < seq_len; query_start += OTHER) {
        let visible = !DROPOUT || query_start + OTHER > first_key; // one of the neighbours' keys

        // scores' = K Q^T. The last step fetches its own chunk again rather than branch.
        let queries = Rows(query_base, qkv_stride, query_start);
        scores = Scores();
        fetch_blocks(keys, queries, 0u);
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            workgroupBarrier();
            stage_blocks();
            workgroupBarrier();
            fetch_blocks(keys, queries, min(chunk + CHUNK_QUADS, DIM_QUADS - CHUNK_QUADS));
            if (visible) { add_scores(&scores); }
        }
        if (query_start < key_start + OWN - 1u) { // on the diagonal
            mask_quad(0u, query_start, key_start);
            if (SCORE_QUADS > 1u) { mask_quad(LAST_SCORE_QUAD, query_start, key_start); }
        }
        if (visible) {
            probabilities_quad(0u, query_start, key_start, row_base, scale * LOG2_E);
            if (SCORE_QUADS > 1u) {
                probabilities_quad(LAST_SCORE_QUAD, query_start, key_start, row_base, scale * LOG2_E);
            }
        }

        // dV += dropout(P') dOut
        let douts = Rows(dout_base, channel_quads, query_start);
        fetch_dout_rows(douts);
        for (var chunk = 0u; chunk < OTHER / CHUNK; chunk++) {
            let first_query = query_start + chunk * CHUNK;
            workgroupBarrier();
            if (visible) { stage_weights(&gradients, chunk); }
            stage_rows();
            workgroupBarrier();
            fetch_dout_rows(Rows(dout_base, channel_quads, min(first_query + CHUNK, query_start + OTHER - CHUNK)));
            if (!DROPOUT || first_query + CHUNK > first_key) { add_rows(&value_sums); }
        }

        // gradients' = V dOut^T
        gradients = Scores();
        fetch_gradient_blocks(values, douts, 0u);
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            workgroupBarrier();
            stage_blocks();
            workgroupBarrier();
            fetch_gradient_blocks(values, douts, min(chunk + CHUNK_QUADS, DIM_QUADS - CHUNK_QUADS));
            if (visible) { add_scores(&gradients); }
        }
        if (visible) {
            score_gradients_quad(0u, query_start, row_base);
            if (SCORE_QUADS > 1u) { score_gradients_quad(LAST_SCORE_QUAD, query_start, row_base); }
        }
        keep_score_gradients(query_start, key_start, tile % head_count);

        // dK += dS' Q
        fetch_rows(queries);
        for (var chunk = 0u; chunk < OTHER / CHUNK; chunk++) {
            let first_query = query_start + chunk * CHUNK;
            workgroupBarrier();
            if (visible) { stage_weights(&gradients, chunk); }
            stage_rows();
            workgroupBarrier();
            fetch_rows(Rows(query_base, qkv_stride, min(first_query + CHUNK, query_start + OTHER - CHUNK)));
            if (!DROPOUT || first_query + CHUNK > first_key) { add_rows(&key_sums); }
        }
    }

    let key_0 = key_start + 4u * own_quad(0u);
    let key_1 = key_start + 4u * own_quad(LAST_ROW_QUAD);
    store_quad(0u, key_0, key_base, value_base, qkv_stride, scale);
    if (ROW_QUADS > 1u) { store_quad(LAST_ROW_QUAD, key_1, key_base, value_base, qkv_stride, scale); }
}
