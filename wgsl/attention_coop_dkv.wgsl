// Causal attention, backward, dK and dV, with cooperative matrices: edge 16 on NVIDIA's Vulkan, edge 8 on Metal.
//
// One workgroup computes the gradients of BLOCK_K = SUBGROUPS * ROW_BLOCKS * EDGE keys and values of one head, all D
// columns. Keys are the rows here, so scores appear transposed. A subgroup owns ROW_BLOCKS blocks of EDGE keys; their
// K, V, dK and dV stay in its matrices:
//     dK = dV = 0
//     for each tile of BLOCK_Q queries from the diagonal on (Q and dOut in workgroup memory, the next in registers):
//         for each group of SCORE_COLS queries:
//             S' = K Q^T                                           matrices
//             for each row block, through the subgroup's scratch: P' = exp(S' * scale - lse); dropout(P') to matrices
//             dP' = V dOut^T                                       matrices
//             for each row block, through the same scratch: dS' = P' * (dropout'(dP') - delta); dS' to matrices
//             dV += dropout(P') dOut;  dK += dS' Q                 matrices
//             keep_score_gradients: dS' for dQ                     matrices, by the file beside it
//     dK *= scale
// The forward is out = dropout(P) V. dS is kept unscaled: in f16 the scale would cost it exponents at the small end.
// Workgroups with the most queries are launched first; tiles above the diagonal are never visited.
//
// Header (beside it attention_coop_memory.wgsl, philox.wgsl, and attention_coop_ds.wgsl or attention_coop_no_ds.wgsl):
//     enable f16 (unless both types are f32); enable wgpu_cooperative_matrix
//     elem           f32 or f16, the type of qkv and dqkv
//     out_elem       f32 or f16, the type of dout
//     mat_elem       f16, or f32 where the matrices have it: what is multiplied; sums are f32
//     mat_a, mat_b   coop_matNxN<mat_elem, A> and <mat_elem, B>
//     mat_c          coop_matNxN<f32, C>
//     EDGE           N
//     SUBGROUP_SIZE  exact (32), a multiple of EDGE
//     HEAD_DIM       D, a multiple of 16, at most 8 * SCORE_COLS and 16 * EDGE; a tile / THREADS <= 8 quads
//     SUBGROUPS      of the workgroup, at least 2
//     ROW_BLOCKS     row blocks of a subgroup, 1 or 2
//     BLOCK_Q        queries of a tile, a multiple of 4, at most the number of threads
//     SCORE_COLS     queries of a group, divides BLOCK_Q, a multiple of EDGE and of 4 * SUBGROUP_SIZE / EDGE,
//                    at most 4 * EDGE
//     DROPOUT        bool
//     CLOCK, PARAMS  the last two bindings
// Workgroup: SUBGROUPS * SUBGROUP_SIZE threads.
// Grid: head_count * ceil(seq_len / BLOCK_K) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 dout (B, T, C) out_elem; 2 lse (B, H, T) f32; 3 delta (B, H, T) f32;
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
    gradient_scale: f32, // a power of two that brings dout into f16's range
    result_scale: f32,   // what dqkv is multiplied by: the inverse, or 1 where it keeps the factor
}

@group(0) @binding(0) var<storage, read_write> qkv: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> dout: array<vec4<out_elem>>;
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> delta: array<f32>;
@group(0) @binding(4) var<storage, read_write> dqkv: array<vec4<elem>>;
@group(0) @binding(CLOCK) var<storage, read_write> clock: array<u32>;
@group(0) @binding(PARAMS) var<uniform> params: Params;

var<private> drop_step: u32; // the counter of the masks
var<private> launch_head: u32; // this workgroup's among those of the launch

const LOG2_E: f32 = 1.4426950408889634;
const MASKED: f32 = -1e30;  // finite: fast math may assume that no infinity exists
const NO_QUERY: f32 = 1e30; // the lse of a query beyond the end: its probabilities become exp2(-1e30) = 0

const THREADS: u32 = SUBGROUPS * SUBGROUP_SIZE;
const BLOCK_K: u32 = SUBGROUPS * ROW_BLOCKS * EDGE;
const HEAD_TILES: u32 = HEAD_DIM / EDGE;
const SCORE_TILES: u32 = SCORE_COLS / EDGE;
// Whole rows of D columns pass through the scratch in rounds of SCORE_COLS columns; the matrices are
// counted in slots.
const HEAD_ROUNDS: u32 = (HEAD_TILES + SCORE_TILES - 1u) / SCORE_TILES;
const HEAD_SLOTS: u32 = HEAD_ROUNDS * SCORE_TILES;
// A "quad" is four neighbours that move as one vec4.
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const STAGE_QUADS: u32 = BLOCK_Q * DIM_QUADS;
const STAGE_STEPS: u32 = (STAGE_QUADS + THREADS - 1u) / THREADS;
const LANES_PER_ROW: u32 = SUBGROUP_SIZE / EDGE;
const LANE_QUADS: u32 = SCORE_COLS / 4u / LANES_PER_ROW;
const LANE_STEP: u32 = 4u * LANES_PER_ROW; // elements between two quads of a lane
// 8 elements of padding against bank conflicts
const TILE_STRIDE: u32 = HEAD_DIM + 8u;
const TILE_SIZE: u32 = BLOCK_Q * TILE_STRIDE;
const SCRATCH_STRIDE: u32 = SCORE_COLS + 8u;
const SUBGROUP_SCRATCH: u32 = EDGE * SCRATCH_STRIDE;
const SCRATCH_SIZE: u32 = SUBGROUPS * SUBGROUP_SCRATCH;
// Indices that are constants even where a configuration has fewer
const LAST_BLOCK: u32 = ROW_BLOCKS - 1u;
const S1: u32 = min(1u, SCORE_TILES - 1u);
const S2: u32 = min(2u, SCORE_TILES - 1u);
const S3: u32 = min(3u, SCORE_TILES - 1u);
const TILE_PITCH: u32 = TILE_STRIDE / PACK;       // the strides of matrices
const SCRATCH_PITCH: u32 = SCRATCH_STRIDE / PACK;

// Matrices must lie at multiples of 16 bytes, so every workgroup variable fills such multiples.
var<workgroup> query_lse: array<f32, BLOCK_Q>; // in units of log 2
var<workgroup> query_delta: array<f32, BLOCK_Q>;

// What a lane and its subgroup hold. Every loop over these arrays is at most four steps long or written out as calls:
// NVIDIA's compiler does not unroll longer ones, and an array that it cannot index by constants leaves the registers
// (measured: the kernel becomes three times slower).
var<private> keys: array<mat_a, ROW_BLOCKS * HEAD_SLOTS>;
var<private> values: array<mat_a, ROW_BLOCKS * HEAD_SLOTS>;
var<private> key_gradient: array<mat_c, ROW_BLOCKS * HEAD_SLOTS>;
var<private> value_gradient: array<mat_c, ROW_BLOCKS * HEAD_SLOTS>;
var<private> scores: array<mat_c, ROW_BLOCKS * SCORE_TILES>;
var<private> gradients: array<mat_c, ROW_BLOCKS * SCORE_TILES>;
var<private> weights: array<mat_a, ROW_BLOCKS * SCORE_TILES>;
var<private> score_gradients: array<mat_a, ROW_BLOCKS * SCORE_TILES>;
// P' between its two uses; a dropped probability carries a minus sign
var<private> probabilities: array<vec4<f32>, ROW_BLOCKS * LANE_QUADS>;
var<private> next_queries: array<vec4<elem>, STAGE_STEPS>;
var<private> next_douts: array<vec4<out_elem>, STAGE_STEPS>;
var<private> next_lse: f32;
var<private> next_delta: f32;
// Where this lane works: LANES_PER_ROW lanes share a row of the subgroup's scratch, their quads LANES_PER_ROW apart.
var<private> lane_part: u32;
var<private> scratch_base: u32; // the subgroup's part of scratch and operand, in elements
var<private> lane_base: u32;    // the lane's first quad there, in elements

// The random words of one key and four queries. Philox gives one query's words for four keys, and these four keys are
// four neighbouring rows of lanes: each row asks for one query, and the rows exchange words by shuffles.
fn random_words(key: u32, first_row: u32) -> vec4<u32> {
    let own = key % 4u;
    let drawn = philox4x32(
        vec4<u32>(key / 4u, first_row + own, drop_step, params.site), vec2<u32>(params.seed_lo, params.seed_hi));
    var words: vec4<u32>;
    words[own] = drawn[own];
    for (var other = 1u; other < 4u; other++) {
        words[own ^ other] = subgroupShuffleXor(drawn[own ^ other], other * LANES_PER_ROW);
    }
    return words;
}

fn fetch_step(
    i: u32, queries_base: u32, queries_stride: u32, douts_base: u32, douts_stride: u32, first_row: u32, thread: u32,
) {
    let index = thread + i * THREADS;
    let row = min(first_row + index / DIM_QUADS, params.seq_len - 1u);
    next_queries[i] = qkv[queries_base + row * queries_stride + index % DIM_QUADS];
    next_douts[i] = dout[douts_base + row * douts_stride + index % DIM_QUADS];
}

// The tile that begins at first_row -> registers. Beyond the end the last row stands in, with probability 0: a guard
// around these loads costs up to half the time.
fn fetch_tile(queries_base: u32, queries_stride: u32, douts_base: u32, douts_stride: u32, first_row: u32, thread: u32) {
    for (var i = 0u; i < STAGE_STEPS; i++) {
        fetch_step(i, queries_base, queries_stride, douts_base, douts_stride, first_row, thread);
    }
}

fn stage_step(i: u32, thread: u32) {
    let index = thread + i * THREADS;
    if (STAGE_QUADS % THREADS == 0u || index < STAGE_QUADS) {
        let place = index / DIM_QUADS * TILE_STRIDE + index % DIM_QUADS * 4u;
        store_stream_a(place, vec4<f32>(next_queries[i]));
        store_stream_b(place, vec4<f32>(next_douts[i]) * params.gradient_scale);
    }
}

fn fetch_rows(batch_head: u32, first_row: u32, thread: u32) {
    next_lse = NO_QUERY;
    next_delta = 0.0;
    if (thread < BLOCK_Q && first_row + thread < params.seq_len) {
        next_lse = lse[batch_head * params.seq_len + first_row + thread] * LOG2_E;
        next_delta = delta[batch_head * params.seq_len + first_row + thread] * params.gradient_scale;
    }
}

// registers -> the streamed tiles and their rows
fn stage_tile(thread: u32) {
    if (thread < BLOCK_Q) {
        query_lse[thread] = next_lse;
        query_delta[thread] = next_delta;
    }
    for (var i = 0u; i < STAGE_STEPS; i++) {
        stage_step(i, thread);
    }
}

// One round of K: EDGE rows of the subgroup, through the operand memory.
fn load_keys(block: u32, round: u32, row_base: u32, inside: bool) {
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        let quad = round * (SCORE_TILES * EDGE / 4u) + lane_part + i * LANES_PER_ROW;
        var value = vec4<f32>();
        if (inside && quad < DIM_QUADS) {
            value = vec4<f32>(qkv[row_base + quad]);
        }
        store_operand(lane_base + i * LANE_STEP, value);
    }
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        keys[block * HEAD_SLOTS + round * SCORE_TILES + j] =
            coopLoadT<mat_a>(&operand[(scratch_base + j * EDGE) / PACK], SCRATCH_PITCH);
    }
}

fn load_all_keys(block: u32, row_base: u32, inside: bool) {
    load_keys(block, 0u, row_base, inside);
    if (HEAD_ROUNDS > 1u) { load_keys(block, 1u, row_base, inside); }
    if (HEAD_ROUNDS > 2u) { load_keys(block, 2u, row_base, inside); }
    if (HEAD_ROUNDS > 3u) { load_keys(block, 3u, row_base, inside); }
    if (HEAD_ROUNDS > 4u) { load_keys(block, 4u, row_base, inside); }
    if (HEAD_ROUNDS > 5u) { load_keys(block, 5u, row_base, inside); }
    if (HEAD_ROUNDS > 6u) { load_keys(block, 6u, row_base, inside); }
    if (HEAD_ROUNDS > 7u) { load_keys(block, 7u, row_base, inside); }
}

// The same of V.
fn load_values(block: u32, round: u32, row_base: u32, inside: bool) {
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        let quad = round * (SCORE_TILES * EDGE / 4u) + lane_part + i * LANES_PER_ROW;
        var value = vec4<f32>();
        if (inside && quad < DIM_QUADS) {
            value = vec4<f32>(qkv[row_base + quad]);
        }
        store_operand(lane_base + i * LANE_STEP, value);
    }
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        values[block * HEAD_SLOTS + round * SCORE_TILES + j] =
            coopLoadT<mat_a>(&operand[(scratch_base + j * EDGE) / PACK], SCRATCH_PITCH);
    }
}

fn load_all_values(block: u32, row_base: u32, inside: bool) {
    load_values(block, 0u, row_base, inside);
    if (HEAD_ROUNDS > 1u) { load_values(block, 1u, row_base, inside); }
    if (HEAD_ROUNDS > 2u) { load_values(block, 2u, row_base, inside); }
    if (HEAD_ROUNDS > 3u) { load_values(block, 3u, row_base, inside); }
    if (HEAD_ROUNDS > 4u) { load_values(block, 4u, row_base, inside); }
    if (HEAD_ROUNDS > 5u) { load_values(block, 5u, row_base, inside); }
    if (HEAD_ROUNDS > 6u) { load_values(block, 6u, row_base, inside); }
    if (HEAD_ROUNDS > 7u) { load_values(block, 7u, row_base, inside); }
}

fn store_key_gradient(block: u32, round: u32, row_base: u32, inside: bool, factor: f32) {
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        let place = (scratch_base + j * EDGE) / PACK;
        let pitch = SCRATCH_PITCH;
        coopStoreT(key_gradient[block * HEAD_SLOTS + round * SCORE_TILES + j], &scratch[place], pitch);
    }
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        let quad = round * (SCORE_TILES * EDGE / 4u) + lane_part + i * LANES_PER_ROW;
        if (inside && quad < DIM_QUADS) {
            dqkv[row_base + quad] = vec4<elem>(load_scratch(lane_base + i * LANE_STEP) * factor);
        }
    }
}

fn store_all_key_gradient(block: u32, row_base: u32, inside: bool, factor: f32) {
    store_key_gradient(block, 0u, row_base, inside, factor);
    if (HEAD_ROUNDS > 1u) { store_key_gradient(block, 1u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 2u) { store_key_gradient(block, 2u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 3u) { store_key_gradient(block, 3u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 4u) { store_key_gradient(block, 4u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 5u) { store_key_gradient(block, 5u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 6u) { store_key_gradient(block, 6u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 7u) { store_key_gradient(block, 7u, row_base, inside, factor); }
}

fn store_value_gradient(block: u32, round: u32, row_base: u32, inside: bool, factor: f32) {
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        let place = (scratch_base + j * EDGE) / PACK;
        let pitch = SCRATCH_PITCH;
        coopStoreT(value_gradient[block * HEAD_SLOTS + round * SCORE_TILES + j], &scratch[place], pitch);
    }
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        let quad = round * (SCORE_TILES * EDGE / 4u) + lane_part + i * LANES_PER_ROW;
        if (inside && quad < DIM_QUADS) {
            dqkv[row_base + quad] = vec4<elem>(load_scratch(lane_base + i * LANE_STEP) * factor);
        }
    }
}

fn store_all_value_gradient(block: u32, row_base: u32, inside: bool, factor: f32) {
    store_value_gradient(block, 0u, row_base, inside, factor);
    if (HEAD_ROUNDS > 1u) { store_value_gradient(block, 1u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 2u) { store_value_gradient(block, 2u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 3u) { store_value_gradient(block, 3u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 4u) { store_value_gradient(block, 4u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 5u) { store_value_gradient(block, 5u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 6u) { store_value_gradient(block, 6u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 7u) { store_value_gradient(block, 7u, row_base, inside, factor); }
}

// scores += K Q^T: a B matrix of Q^T is a tile of Q read by columns.
fn add_scores(group: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        {
            let place = (group * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[0u] = coopMultiplyAdd(keys[d], columns, scores[0u]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + 0u] = coopMultiplyAdd(
                    keys[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + 0u]);
            }
        }
        if (SCORE_TILES > 1u) {
            let place = ((group + S1 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[S1] = coopMultiplyAdd(keys[d], columns, scores[S1]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + S1] = coopMultiplyAdd(
                    keys[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + S1]);
            }
        }
        if (SCORE_TILES > 2u) {
            let place = ((group + S2 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[S2] = coopMultiplyAdd(keys[d], columns, scores[S2]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + S2] = coopMultiplyAdd(
                    keys[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + S2]);
            }
        }
        if (SCORE_TILES > 3u) {
            let place = ((group + S3 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[S3] = coopMultiplyAdd(keys[d], columns, scores[S3]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + S3] = coopMultiplyAdd(
                    keys[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + S3]);
            }
        }
    }
}

// scores += V dOut^T
fn add_gradients(group: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        {
            let place = (group * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[0u] = coopMultiplyAdd(values[d], columns, gradients[0u]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + 0u] = coopMultiplyAdd(
                    values[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + 0u]);
            }
        }
        if (SCORE_TILES > 1u) {
            let place = ((group + S1 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[S1] = coopMultiplyAdd(values[d], columns, gradients[S1]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + S1] = coopMultiplyAdd(
                    values[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + S1]);
            }
        }
        if (SCORE_TILES > 2u) {
            let place = ((group + S2 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[S2] = coopMultiplyAdd(values[d], columns, gradients[S2]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + S2] = coopMultiplyAdd(
                    values[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + S2]);
            }
        }
        if (SCORE_TILES > 3u) {
            let place = ((group + S3 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[S3] = coopMultiplyAdd(values[d], columns, gradients[S3]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + S3] = coopMultiplyAdd(
                    values[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + S3]);
            }
        }
    }
}

// value_gradient += dropout(P') dOut
fn add_dv(group: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        {
            let place = (group * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_b[place], TILE_PITCH);
            value_gradient[d] = coopMultiplyAdd(weights[0u], columns, value_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                value_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    weights[LAST_BLOCK * SCORE_TILES + 0u], columns, value_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 1u) {
            let place = ((group + S1 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_b[place], TILE_PITCH);
            value_gradient[d] = coopMultiplyAdd(weights[S1], columns, value_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                value_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    weights[LAST_BLOCK * SCORE_TILES + S1], columns, value_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 2u) {
            let place = ((group + S2 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_b[place], TILE_PITCH);
            value_gradient[d] = coopMultiplyAdd(weights[S2], columns, value_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                value_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    weights[LAST_BLOCK * SCORE_TILES + S2], columns, value_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 3u) {
            let place = ((group + S3 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_b[place], TILE_PITCH);
            value_gradient[d] = coopMultiplyAdd(weights[S3], columns, value_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                value_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    weights[LAST_BLOCK * SCORE_TILES + S3], columns, value_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
    }
}

// key_gradient += dS' Q
fn add_dk(group: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        {
            let place = (group * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            key_gradient[d] = coopMultiplyAdd(score_gradients[0u], columns, key_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                key_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + 0u], columns, key_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 1u) {
            let place = ((group + S1 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            key_gradient[d] = coopMultiplyAdd(score_gradients[S1], columns, key_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                key_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + S1], columns, key_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 2u) {
            let place = ((group + S2 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            key_gradient[d] = coopMultiplyAdd(score_gradients[S2], columns, key_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                key_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + S2], columns, key_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 3u) {
            let place = ((group + S3 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            key_gradient[d] = coopMultiplyAdd(score_gradients[S3], columns, key_gradient[d]);
            if (ROW_BLOCKS > 1u) {
                key_gradient[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + S3], columns, key_gradient[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
    }
}

// Probabilities of one key and four queries, from the scratch; dropped out, to the operand memory
fn read_quad(
    block: u32, i: u32, key: u32, first_row: u32, first_query: u32, group: u32, on_diagonal: bool, exponent_scale: f32,
) {
    let column = 4u * (lane_part + i * LANES_PER_ROW);
    let place = group + column;
    let lse_quad = vec4<f32>(query_lse[place], query_lse[place + 1u], query_lse[place + 2u], query_lse[place + 3u]);
    var exponents = load_scratch(lane_base + i * LANE_STEP) * exponent_scale - lse_quad;
    if (on_diagonal) {
        let queries = vec4<u32>(first_query + column) + vec4<u32>(0u, 1u, 2u, 3u);
        exponents = select(exponents, vec4<f32>(MASKED), queries < vec4<u32>(key));
    }
    var probability = exp2(exponents);
    var weight = probability;
    if (DROPOUT) {
        let kept = random_words(key, first_row + column) >= vec4<u32>(params.drop_threshold);
        weight = select(vec4<f32>(), probability * params.keep_scale, kept);
        probability = select(-probability, probability, kept);
    }
    probabilities[block * LANE_QUADS + i] = probability;
    store_operand(lane_base + i * LANE_STEP, weight);
}

// dS' of one key and four queries, from the scratch to the operand memory
fn weigh_quad(block: u32, i: u32, group: u32) {
    let place = group + 4u * (lane_part + i * LANES_PER_ROW);
    let delta_quad =
        vec4<f32>(query_delta[place], query_delta[place + 1u], query_delta[place + 2u], query_delta[place + 3u]);
    let probability = probabilities[block * LANE_QUADS + i];
    var gradient = load_scratch(lane_base + i * LANE_STEP);
    if (DROPOUT) {
        gradient = select(vec4<f32>(), gradient * params.keep_scale, probability > vec4<f32>());
    }
    store_operand(lane_base + i * LANE_STEP, abs(probability) * (gradient - delta_quad));
}

// scores of one row block and one group of queries -> weights = dropout(P'); first_query is the group's.
fn probability_block(
    block: u32, key: u32, first_row: u32, first_query: u32, group: u32, on_diagonal: bool, exponent_scale: f32,
) {
    for (var j = 0u; j < SCORE_TILES; j++) {
        let place = (scratch_base + j * EDGE) / PACK;
        let pitch = SCRATCH_PITCH;
        coopStoreT(scores[block * SCORE_TILES + j], &scratch[place], pitch);
    }
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        read_quad(block, i, key, first_row, first_query, group, on_diagonal, exponent_scale);
    }
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        weights[block * SCORE_TILES + j] =
            coopLoadT<mat_a>(&operand[(scratch_base + j * EDGE) / PACK], SCRATCH_PITCH);
    }
}

// scores = V dOut^T of one row block and one group of queries -> score_gradients; first_key is the row block's, first_query the group's.
fn gradient_block(block: u32, first_key: u32, first_query: u32, group: u32) {
    for (var j = 0u; j < SCORE_TILES; j++) {
        let place = (scratch_base + j * EDGE) / PACK;
        let pitch = SCRATCH_PITCH;
        coopStoreT(gradients[block * SCORE_TILES + j], &scratch[place], pitch);
    }
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        weigh_quad(block, i, group);
    }
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        score_gradients[block * SCORE_TILES + j] =
            coopLoadT<mat_a>(&operand[(scratch_base + j * EDGE) / PACK], SCRATCH_PITCH);
        keep_score_gradients(block * SCORE_TILES + j, first_key, first_query + j * EDGE);
    }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    drop_step = params.step + clock[0];
    let seq_len = params.seq_len;
    let head_count = params.head_count;
    let key_tiles = (seq_len + BLOCK_K - 1u) / BLOCK_K;
    let tile = workgroup.y * grid.x + workgroup.x;
    if (tile >= head_count * key_tiles) {
        return;
    }
    let key_start = tile / head_count * BLOCK_K;                        // the longest columns first
    launch_head = tile % head_count;
    let batch_head = params.first_head + launch_head;
    let batch = batch_head / params.heads;
    let head = batch_head % params.heads;
    let channel_quads = params.heads * DIM_QUADS;                       // C / 4
    let qkv_stride = 3u * channel_quads;                                // quads of one token of qkv
    let query_base = batch * seq_len * qkv_stride + head * DIM_QUADS;
    let key_base = query_base + channel_quads;
    let value_base = key_base + channel_quads;
    let dout_base = batch * seq_len * channel_quads + head * DIM_QUADS;
    let scale = 1.0 / sqrt(f32(HEAD_DIM));
    let exponent_scale = scale * LOG2_E;

    let subgroup = thread / SUBGROUP_SIZE;
    let lane_row = thread % SUBGROUP_SIZE / LANES_PER_ROW;
    lane_part = thread % LANES_PER_ROW;
    scratch_base = subgroup * SUBGROUP_SCRATCH;
    lane_base = scratch_base + lane_row * SCRATCH_STRIDE + lane_part * 4u;
    let first_key = key_start + subgroup * (ROW_BLOCKS * EDGE);      // the subgroup's, in row block 0
    let key = first_key + lane_row;                                  // this lane's
    let row = batch_head * seq_len;                                  // the first row of lse of this head

    load_all_keys(0u, key_base + key * qkv_stride, key < seq_len);
    load_all_values(0u, value_base + key * qkv_stride, key < seq_len);
    if (ROW_BLOCKS > 1u) {
        load_all_keys(1u, key_base + (key + EDGE) * qkv_stride, key + EDGE < seq_len);
        load_all_values(1u, value_base + (key + EDGE) * qkv_stride, key + EDGE < seq_len);
    }

    let first_tile = key_start / BLOCK_Q * BLOCK_Q;
    fetch_tile(query_base, qkv_stride, dout_base, channel_quads, first_tile, thread);
    fetch_rows(batch_head, first_tile, thread);
    for (var query_start = first_tile; query_start < seq_len; query_start += BLOCK_Q) {
        workgroupBarrier(); // the last tile's readers are done
        stage_tile(thread);
        workgroupBarrier();
        fetch_tile(query_base, qkv_stride, dout_base, channel_quads, query_start + BLOCK_Q, thread);
        fetch_rows(batch_head, query_start + BLOCK_Q, thread);

        let on_diagonal = query_start < key_start + BLOCK_K;
        for (var group = 0u; group < BLOCK_Q; group += SCORE_COLS) {
            let query = query_start + group;
            scores = array<mat_c, ROW_BLOCKS * SCORE_TILES>();
            gradients = array<mat_c, ROW_BLOCKS * SCORE_TILES>();
            add_scores(group);
            add_gradients(group); // the matrix units make these while the lanes weigh the scores ...
            probability_block(0u, key, row + query, query, group, on_diagonal, exponent_scale);
            if (ROW_BLOCKS > 1u) {
                probability_block(1u, key + EDGE, row + query, query, group, on_diagonal, exponent_scale);
            }
            add_dv(group); // ... and these while they weigh the gradients
            gradient_block(0u, first_key, query, group);
            if (ROW_BLOCKS > 1u) {
                gradient_block(1u, first_key + EDGE, query, group);
            }
            add_dk(group);
        }
    }

    let value_factor = params.result_scale;
    let key_factor = scale * value_factor;
    store_all_key_gradient(0u, key_base + key * qkv_stride, key < seq_len, key_factor);
    store_all_value_gradient(0u, value_base + key * qkv_stride, key < seq_len, value_factor);
    if (ROW_BLOCKS > 1u) {
        store_all_key_gradient(1u, key_base + (key + EDGE) * qkv_stride, key + EDGE < seq_len, key_factor);
        store_all_value_gradient(1u, value_base + (key + EDGE) * qkv_stride, key + EDGE < seq_len, value_factor);
    }
}
