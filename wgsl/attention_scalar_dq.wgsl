// Causal attention, backward, dQ, without subgroups, f16 arithmetic or cooperative matrices: it runs everywhere.
//
// One workgroup computes the gradients of OWN queries of one head, all D columns:
//     sums = 0
//     for each tile of OTHER keys up to the diagonal:
//         scores = Q K^T                                     the forward: P = exp(scores * scale - lse)
//         gradients = dOut V^T
//         dS = P * (dropout'(gradients) - delta)
//         sums += dS K                                       dS through the left tile
//     dQ = sums * scale
// Workgroups of the longest rows are launched first; tiles above the diagonal are never visited. Threads whose rows all lie above one skip its
// products where there is dropout, and with them its random words. Where there is none they multiply zeros: the branches cost every tile moves
// of the sums, 2 % at 1024 tokens.
//
// Header: as attention_scalar_products.wgsl, which is prepended as attention_scalar_store_dq.wgsl is, says.
// Grid: batch * heads * ceil(seq_len / OWN) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 dout (B, T, C) elem; 2 lse (B, H, T) f32; 3 delta (B, H, T) f32;
//           4 dqkv (B, T, 3C) elem, its q third is written; 5 clock (4) u32; 6 params.

struct Params {
    head_count: u32, // batch * heads
    heads: u32,
    seq_len: u32,
    first_head: u32,     // unused
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
@group(0) @binding(5) var<storage, read_write> clock: array<u32>;
@group(0) @binding(6) var<uniform> params: Params;

var<private> drop_step: u32; // the counter of the masks

var<private> scores: Scores; // then dS
var<private> gradients: Scores;
var<private> sums: Sums;

// Of the own rows, as they lie in the left tile: in registers they would cost 16 of them.
var<workgroup> row_lse: array<vec4<f32>, OWN_QUADS>; // in units of log 2
var<workgroup> row_delta: array<vec4<f32>, OWN_QUADS>;

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

// Own rows of dout and others of qkv at the dimensions from quad `chunk` on
fn fetch_gradient_block(i: u32, own: Rows, other: Rows, chunk: u32) {
    let block = block_of(i);
    if (block.is_own) {
        fetch_dout_block(i, block, own, chunk);
    } else {
        fetch_qkv_block(i, block, other, chunk);
    }
}

fn fetch_gradient_blocks(own: Rows, other: Rows, chunk: u32) {
    fetch_gradient_block(0u, own, other, chunk);
    if (BLOCKS > 1u) { fetch_gradient_block(1u, own, other, chunk); }
    if (BLOCKS > 2u) { fetch_gradient_block(BLOCKS - 1u, own, other, chunk); }
}

fn load_rows(h: u32, query_start: u32, row_base: u32) {
    let last = row_base + params.seq_len - 1u;
    let row = row_base + query_start + 4u * own_quad(h);
    let rows = min(vec4<u32>(row) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(last));
    let slot = thread_row + h * ROW_THREADS;
    row_lse[slot] = LOG2_E * vec4<f32>(lse[rows.x], lse[rows.y], lse[rows.z], lse[rows.w]);
    row_delta[slot] = vec4<f32>(delta[rows.x], delta[rows.y], delta[rows.z], delta[rows.w]);
}

fn mask_column(j: u32, key: u32, query_start: u32) {
    for (var h = 0u; h < ROW_QUADS; h++) {
        let queries = vec4<u32>(query_start + 4u * own_quad(h)) + vec4<u32>(0u, 1u, 2u, 3u);
        scores[ROW_QUADS * j + h] = select(scores[ROW_QUADS * j + h], vec4<f32>(MASKED), vec4<u32>(key) > queries);
    }
}

fn mask_quad(j: u32, key_start: u32, query_start: u32) {
    let key = key_start + 4u * (thread_col + j * COL_THREADS);
    mask_column(4u * j, key, query_start);
    mask_column(4u * j + 1u, key + 1u, query_start);
    mask_column(4u * j + 2u, key + 2u, query_start);
    mask_column(4u * j + 3u, key + 3u, query_start);
}

fn kept(gradient: vec4<f32>, random: vec4<u32>) -> vec4<f32> {
    return select(vec4<f32>(), gradient * params.keep_scale, random >= vec4<u32>(params.drop_threshold));
}

fn score_gradient(at: u32, slot: u32, scale: f32) {
    let probabilities = exp2(scores[at] * scale - row_lse[slot]);
    scores[at] = probabilities * (gradients[at] - row_delta[slot]);
}

// dS of four columns and quad h of the rows, which begins at `row` of (B, H, T)
fn score_gradients(j: u32, h: u32, key_quad: u32, row: u32, scale: f32) {
    let at = 4u * ROW_QUADS * j + h;
    if (DROPOUT) {
        let seed = vec2<u32>(params.seed_lo, params.seed_hi);
        let r0 = philox4x32(vec4<u32>(key_quad, row, drop_step, params.site), seed);
        let r1 = philox4x32(vec4<u32>(key_quad, row + 1u, drop_step, params.site), seed);
        let r2 = philox4x32(vec4<u32>(key_quad, row + 2u, drop_step, params.site), seed);
        let r3 = philox4x32(vec4<u32>(key_quad, row + 3u, drop_step, params.site), seed);
        gradients[at] = kept(gradients[at], vec4<u32>(r0.x, r1.x, r2.x, r3.x));
        gradients[at + ROW_QUADS] = kept(gradients[at + ROW_QUADS], vec4<u32>(r0.y, r1.y, r2.y, r3.y));
        gradients[at + 2u * ROW_QUADS] = kept(gradients[at + 2u * ROW_QUADS], vec4<u32>(r0.z, r1.z, r2.z, r3.z));
        gradients[at + 3u * ROW_QUADS] = kept(gradients[at + 3u * ROW_QUADS], vec4<u32>(r0.w, r1.w, r2.w, r3.w));
    }
    let slot = thread_row + h * ROW_THREADS;
    score_gradient(at, slot, scale);
    score_gradient(at + ROW_QUADS, slot, scale);
    score_gradient(at + 2u * ROW_QUADS, slot, scale);
    score_gradient(at + 3u * ROW_QUADS, slot, scale);
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
    let query_tiles = (seq_len + OWN - 1u) / OWN;
    let tile = workgroup.y * grid.x + workgroup.x;
    if (tile >= head_count * query_tiles) {
        return;
    }
    let query_start = (query_tiles - 1u - tile / head_count) * OWN; // the longest rows first
    let batch_head = tile % head_count;
    let batch = batch_head / params.heads;
    let head = batch_head % params.heads;
    let channel_quads = params.heads * DIM_QUADS;                       // C / 4
    let qkv_stride = 3u * channel_quads;                                // quads of one token of qkv
    let query_base = batch * seq_len * qkv_stride + head * DIM_QUADS;
    let key_base = query_base + channel_quads;
    let value_base = key_base + channel_quads;
    let dout_base = batch * seq_len * channel_quads + head * DIM_QUADS;
    let row_base = batch_head * seq_len;
    let scale = 1.0 / sqrt(f32(HEAD_DIM));

    thread = local;
    thread_row = thread / COL_THREADS;
    thread_col = thread % COL_THREADS;
    let query_0 = query_start + 4u * own_quad(0u);
    let query_1 = query_start + 4u * own_quad(LAST_ROW_QUAD);
    let last_query = query_start + first_neighbour() + 4u * ROW_QUADS * NEIGHBOURS - 1u;
    let queries = Rows(query_base, qkv_stride, query_start);
    let douts = Rows(dout_base, channel_quads, query_start);

    if (thread_col == 0u) { // the first barrier below comes before they are read
        load_rows(0u, query_start, row_base);
        if (ROW_QUADS > 1u) { load_rows(LAST_ROW_QUAD, query_start, row_base); }
    }
    let key_end = min(query_start + OWN, seq_len);
    for (var key_start = 0u; key_start < key_end; key_start += OTHER) {
        let visible = !DROPOUT || key_start <= last_query; // to one of the neighbours

        // scores = Q K^T. The last step fetches its own chunk again rather than branch.
        let keys = Rows(key_base, qkv_stride, key_start);
        scores = Scores();
        fetch_blocks(queries, keys, 0u);
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            workgroupBarrier();
            stage_blocks();
            workgroupBarrier();
            fetch_blocks(queries, keys, min(chunk + CHUNK_QUADS, DIM_QUADS - CHUNK_QUADS));
            if (visible) { add_scores(&scores); }
        }

        // gradients = dOut V^T
        let values = Rows(value_base, qkv_stride, key_start);
        gradients = Scores();
        fetch_gradient_blocks(douts, values, 0u);
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            workgroupBarrier();
            stage_blocks();
            workgroupBarrier();
            fetch_gradient_blocks(douts, values, min(chunk + CHUNK_QUADS, DIM_QUADS - CHUNK_QUADS));
            if (visible) { add_scores(&gradients); }
        }

        // dS = P * (dropout'(gradients) - delta)
        if (key_start + OTHER > query_start + 1u) { // on the diagonal
            mask_quad(0u, key_start, query_start);
            if (SCORE_QUADS > 1u) { mask_quad(LAST_SCORE_QUAD, key_start, query_start); }
        }
        if (visible) {
            let key_quad = key_start / 4u + thread_col;
            score_gradients(0u, 0u, key_quad, row_base + query_0, scale * LOG2_E);
            if (ROW_QUADS > 1u) {
                score_gradients(0u, LAST_ROW_QUAD, key_quad, row_base + query_1, scale * LOG2_E);
            }
            if (SCORE_QUADS > 1u) {
                score_gradients(LAST_SCORE_QUAD, 0u, key_quad + COL_THREADS, row_base + query_0, scale * LOG2_E);
                if (ROW_QUADS > 1u) {
                    score_gradients(
                        LAST_SCORE_QUAD, LAST_ROW_QUAD, key_quad + COL_THREADS, row_base + query_1, scale * LOG2_E);
                }
            }
        }

        // sums += dS K
        fetch_rows(keys);
        for (var chunk = 0u; chunk < OTHER / CHUNK; chunk++) {
            let first_key = key_start + chunk * CHUNK;
            workgroupBarrier();
            if (visible) { stage_weights(&scores, chunk); }
            stage_rows();
            workgroupBarrier();
            fetch_rows(Rows(key_base, qkv_stride, min(first_key + CHUNK, key_start + OTHER - CHUNK)));
            if (!DROPOUT || first_key <= last_query) { add_rows(&sums); }
        }
    }

    store_quad(0u, query_0, query_base, qkv_stride, scale);
    if (ROW_QUADS > 1u) { store_quad(LAST_ROW_QUAD, query_1, query_base, qkv_stride, scale); }
}
