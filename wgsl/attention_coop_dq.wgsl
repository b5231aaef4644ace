// Causal attention, backward, dQ, with cooperative matrices: edge 16 on NVIDIA's Vulkan, edge 8 on Metal.
//
// One workgroup computes the gradient of BLOCK_Q = SUBGROUPS * ROW_BLOCKS * EDGE queries of one head, all D columns.
// A subgroup owns ROW_BLOCKS blocks of EDGE queries; their Q, dOut and dQ stay in its matrices:
//     dQ = 0
//     for each tile of BLOCK_K keys up to the diagonal (K and V in workgroup memory, the next tile in registers):
//         for each group of SCORE_COLS keys:
//             S = Q K^T;  dP = dOut V^T                            matrices
//             for each row block, one after another, through the subgroup's scratch, LANES_PER_ROW lanes a row:
//                 P = exp(S * scale - lse);  dS = P * (dropout'(dP) - delta); dS goes back to matrices
//             dQ += dS K                                           matrices
//     dQ *= scale
// The forward is out = dropout(P) V. dS is kept unscaled: in f16 the scale would cost it exponents at the small end.
// Workgroups of the longest rows are launched first; tiles above the diagonal are never visited.
//
// Header (beside it attention_coop_memory.wgsl, and philox.wgsl):
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
//     BLOCK_K        keys of a tile
//     SCORE_COLS     keys of a group, divides BLOCK_K, a multiple of EDGE and of 4 * SUBGROUP_SIZE / EDGE,
//                    at most 4 * EDGE
//     DROPOUT        bool
// Workgroup: SUBGROUPS * SUBGROUP_SIZE threads.
// Grid: batch * heads * ceil(seq_len / BLOCK_Q) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 dout (B, T, C) out_elem; 2 lse (B, H, T) f32; 3 delta (B, H, T) f32;
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
    gradient_scale: f32, // a power of two that brings dout into f16's range
    result_scale: f32,   // what dqkv is multiplied by: the inverse, or 1 where it keeps the factor
}

@group(0) @binding(0) var<storage, read_write> qkv: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> dout: array<vec4<out_elem>>;
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> delta: array<f32>;
@group(0) @binding(4) var<storage, read_write> dqkv: array<vec4<elem>>;
@group(0) @binding(5) var<storage, read_write> clock: array<u32>;
@group(0) @binding(6) var<uniform> params: Params;

var<private> drop_step: u32; // the counter of the masks

const LOG2_E: f32 = 1.4426950408889634;
const MASKED: f32 = -1e30; // finite: fast math may assume that no infinity exists

const THREADS: u32 = SUBGROUPS * SUBGROUP_SIZE;
const BLOCK_Q: u32 = SUBGROUPS * ROW_BLOCKS * EDGE;
const HEAD_TILES: u32 = HEAD_DIM / EDGE;
const SCORE_TILES: u32 = SCORE_COLS / EDGE;
// Whole rows of D columns pass through the scratch in rounds of SCORE_COLS columns; the matrices are
// counted in slots.
const HEAD_ROUNDS: u32 = (HEAD_TILES + SCORE_TILES - 1u) / SCORE_TILES;
const HEAD_SLOTS: u32 = HEAD_ROUNDS * SCORE_TILES;
// A "quad" is four neighbours that move as one vec4.
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const STAGE_QUADS: u32 = BLOCK_K * DIM_QUADS;
const STAGE_STEPS: u32 = (STAGE_QUADS + THREADS - 1u) / THREADS;
const LANES_PER_ROW: u32 = SUBGROUP_SIZE / EDGE;
const LANE_QUADS: u32 = SCORE_COLS / 4u / LANES_PER_ROW;
const LANE_STEP: u32 = 4u * LANES_PER_ROW; // elements between two quads of a lane
// 8 elements of padding against bank conflicts
const TILE_STRIDE: u32 = HEAD_DIM + 8u;
const TILE_SIZE: u32 = BLOCK_K * TILE_STRIDE;
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

// What a lane and its subgroup hold. Every loop over these arrays is at most four steps long or written out as calls:
// NVIDIA's compiler does not unroll longer ones, and an array that it cannot index by constants leaves the registers
// (measured: the kernel becomes three times slower).
var<private> queries: array<mat_a, ROW_BLOCKS * HEAD_SLOTS>;
var<private> douts: array<mat_a, ROW_BLOCKS * HEAD_SLOTS>;
var<private> accumulator: array<mat_c, ROW_BLOCKS * HEAD_SLOTS>;
var<private> scores: array<mat_c, ROW_BLOCKS * SCORE_TILES>;
var<private> gradients: array<mat_c, ROW_BLOCKS * SCORE_TILES>;
var<private> score_gradients: array<mat_a, ROW_BLOCKS * SCORE_TILES>;
var<private> row_lse: array<f32, ROW_BLOCKS>; // of the lane's row, in units of log 2
var<private> row_delta: array<f32, ROW_BLOCKS>;
var<private> probabilities: array<vec4<f32>, LANE_QUADS>; // of the lane's part of the row
var<private> next_keys: array<vec4<elem>, STAGE_STEPS>;
var<private> next_values: array<vec4<elem>, STAGE_STEPS>;
// Where this lane works: LANES_PER_ROW lanes share a row of the subgroup's scratch, their quads LANES_PER_ROW apart.
var<private> lane_part: u32;
var<private> scratch_base: u32; // the subgroup's part of scratch and operand, in elements
var<private> lane_base: u32;    // the lane's first quad there, in elements

// Four random words: one query, four keys.
fn random_words(row: u32, key_quad: u32) -> vec4<u32> {
    return philox4x32(
        vec4<u32>(key_quad, row, drop_step, params.site), vec2<u32>(params.seed_lo, params.seed_hi));
}

fn fetch_step(
    i: u32, keys_base: u32, keys_stride: u32, values_base: u32, values_stride: u32, first_row: u32, thread: u32,
) {
    let index = thread + i * THREADS;
    let row = min(first_row + index / DIM_QUADS, params.seq_len - 1u);
    next_keys[i] = qkv[keys_base + row * keys_stride + index % DIM_QUADS];
    next_values[i] = qkv[values_base + row * values_stride + index % DIM_QUADS];
}

// The tile that begins at first_row -> registers. Beyond the end the last row stands in, with probability 0: a guard
// around these loads costs up to half the time.
fn fetch_tile(keys_base: u32, keys_stride: u32, values_base: u32, values_stride: u32, first_row: u32, thread: u32) {
    for (var i = 0u; i < STAGE_STEPS; i++) {
        fetch_step(i, keys_base, keys_stride, values_base, values_stride, first_row, thread);
    }
}

fn stage_step(i: u32, thread: u32) {
    let index = thread + i * THREADS;
    if (STAGE_QUADS % THREADS == 0u || index < STAGE_QUADS) {
        let place = index / DIM_QUADS * TILE_STRIDE + index % DIM_QUADS * 4u;
        store_stream_a(place, vec4<f32>(next_keys[i]));
        store_stream_b(place, vec4<f32>(next_values[i]));
    }
}

// registers -> the streamed tiles
fn stage_tile(thread: u32) {
    for (var i = 0u; i < STAGE_STEPS; i++) {
        stage_step(i, thread);
    }
}

// One round of Q: EDGE rows of the subgroup, through the operand memory.
fn load_queries(block: u32, round: u32, row_base: u32, inside: bool) {
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
        queries[block * HEAD_SLOTS + round * SCORE_TILES + j] =
            coopLoadT<mat_a>(&operand[(scratch_base + j * EDGE) / PACK], SCRATCH_PITCH);
    }
}

fn load_all_queries(block: u32, row_base: u32, inside: bool) {
    load_queries(block, 0u, row_base, inside);
    if (HEAD_ROUNDS > 1u) { load_queries(block, 1u, row_base, inside); }
    if (HEAD_ROUNDS > 2u) { load_queries(block, 2u, row_base, inside); }
    if (HEAD_ROUNDS > 3u) { load_queries(block, 3u, row_base, inside); }
    if (HEAD_ROUNDS > 4u) { load_queries(block, 4u, row_base, inside); }
    if (HEAD_ROUNDS > 5u) { load_queries(block, 5u, row_base, inside); }
    if (HEAD_ROUNDS > 6u) { load_queries(block, 6u, row_base, inside); }
    if (HEAD_ROUNDS > 7u) { load_queries(block, 7u, row_base, inside); }
}

// The same of dOut.
fn load_douts(block: u32, round: u32, row_base: u32, inside: bool) {
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        let quad = round * (SCORE_TILES * EDGE / 4u) + lane_part + i * LANES_PER_ROW;
        var value = vec4<f32>();
        if (inside && quad < DIM_QUADS) {
            value = vec4<f32>(dout[row_base + quad]) * params.gradient_scale;
        }
        store_operand(lane_base + i * LANE_STEP, value);
    }
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        douts[block * HEAD_SLOTS + round * SCORE_TILES + j] =
            coopLoadT<mat_a>(&operand[(scratch_base + j * EDGE) / PACK], SCRATCH_PITCH);
    }
}

fn load_all_douts(block: u32, row_base: u32, inside: bool) {
    load_douts(block, 0u, row_base, inside);
    if (HEAD_ROUNDS > 1u) { load_douts(block, 1u, row_base, inside); }
    if (HEAD_ROUNDS > 2u) { load_douts(block, 2u, row_base, inside); }
    if (HEAD_ROUNDS > 3u) { load_douts(block, 3u, row_base, inside); }
    if (HEAD_ROUNDS > 4u) { load_douts(block, 4u, row_base, inside); }
    if (HEAD_ROUNDS > 5u) { load_douts(block, 5u, row_base, inside); }
    if (HEAD_ROUNDS > 6u) { load_douts(block, 6u, row_base, inside); }
    if (HEAD_ROUNDS > 7u) { load_douts(block, 7u, row_base, inside); }
}

fn store_gradient(block: u32, round: u32, row_base: u32, inside: bool, factor: f32) {
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        let place = (scratch_base + j * EDGE) / PACK;
        let pitch = SCRATCH_PITCH;
        coopStoreT(accumulator[block * HEAD_SLOTS + round * SCORE_TILES + j], &scratch[place], pitch);
    }
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        let quad = round * (SCORE_TILES * EDGE / 4u) + lane_part + i * LANES_PER_ROW;
        if (inside && quad < DIM_QUADS) {
            dqkv[row_base + quad] = vec4<elem>(load_scratch(lane_base + i * LANE_STEP) * factor);
        }
    }
}

fn store_all_gradient(block: u32, row_base: u32, inside: bool, factor: f32) {
    store_gradient(block, 0u, row_base, inside, factor);
    if (HEAD_ROUNDS > 1u) { store_gradient(block, 1u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 2u) { store_gradient(block, 2u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 3u) { store_gradient(block, 3u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 4u) { store_gradient(block, 4u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 5u) { store_gradient(block, 5u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 6u) { store_gradient(block, 6u, row_base, inside, factor); }
    if (HEAD_ROUNDS > 7u) { store_gradient(block, 7u, row_base, inside, factor); }
}

// scores += Q K^T: a B matrix of K^T is a tile of K read by columns.
fn add_scores(group: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        {
            let place = (group * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[0u] = coopMultiplyAdd(queries[d], columns, scores[0u]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + 0u] = coopMultiplyAdd(
                    queries[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + 0u]);
            }
        }
        if (SCORE_TILES > 1u) {
            let place = ((group + S1 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[S1] = coopMultiplyAdd(queries[d], columns, scores[S1]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + S1] = coopMultiplyAdd(
                    queries[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + S1]);
            }
        }
        if (SCORE_TILES > 2u) {
            let place = ((group + S2 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[S2] = coopMultiplyAdd(queries[d], columns, scores[S2]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + S2] = coopMultiplyAdd(
                    queries[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + S2]);
            }
        }
        if (SCORE_TILES > 3u) {
            let place = ((group + S3 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);
            scores[S3] = coopMultiplyAdd(queries[d], columns, scores[S3]);
            if (ROW_BLOCKS > 1u) {
                scores[LAST_BLOCK * SCORE_TILES + S3] = coopMultiplyAdd(
                    queries[LAST_BLOCK * HEAD_SLOTS + d], columns, scores[LAST_BLOCK * SCORE_TILES + S3]);
            }
        }
    }
}

// gradients += dOut V^T
fn add_gradients(group: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        {
            let place = (group * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[0u] = coopMultiplyAdd(douts[d], columns, gradients[0u]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + 0u] = coopMultiplyAdd(
                    douts[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + 0u]);
            }
        }
        if (SCORE_TILES > 1u) {
            let place = ((group + S1 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[S1] = coopMultiplyAdd(douts[d], columns, gradients[S1]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + S1] = coopMultiplyAdd(
                    douts[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + S1]);
            }
        }
        if (SCORE_TILES > 2u) {
            let place = ((group + S2 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[S2] = coopMultiplyAdd(douts[d], columns, gradients[S2]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + S2] = coopMultiplyAdd(
                    douts[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + S2]);
            }
        }
        if (SCORE_TILES > 3u) {
            let place = ((group + S3 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoad<mat_b>(&stream_b[place], TILE_PITCH);
            gradients[S3] = coopMultiplyAdd(douts[d], columns, gradients[S3]);
            if (ROW_BLOCKS > 1u) {
                gradients[LAST_BLOCK * SCORE_TILES + S3] = coopMultiplyAdd(
                    douts[LAST_BLOCK * HEAD_SLOTS + d], columns, gradients[LAST_BLOCK * SCORE_TILES + S3]);
            }
        }
    }
}

// accumulator += dS K
fn add_dq(group: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        {
            let place = (group * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            accumulator[d] = coopMultiplyAdd(score_gradients[0u], columns, accumulator[d]);
            if (ROW_BLOCKS > 1u) {
                accumulator[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + 0u], columns, accumulator[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 1u) {
            let place = ((group + S1 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            accumulator[d] = coopMultiplyAdd(score_gradients[S1], columns, accumulator[d]);
            if (ROW_BLOCKS > 1u) {
                accumulator[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + S1], columns, accumulator[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 2u) {
            let place = ((group + S2 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            accumulator[d] = coopMultiplyAdd(score_gradients[S2], columns, accumulator[d]);
            if (ROW_BLOCKS > 1u) {
                accumulator[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + S2], columns, accumulator[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
        if (SCORE_TILES > 3u) {
            let place = ((group + S3 * EDGE) * TILE_STRIDE + d * EDGE) / PACK;
            let columns = coopLoadT<mat_b>(&stream_a[place], TILE_PITCH);
            accumulator[d] = coopMultiplyAdd(score_gradients[S3], columns, accumulator[d]);
            if (ROW_BLOCKS > 1u) {
                accumulator[LAST_BLOCK * HEAD_SLOTS + d] = coopMultiplyAdd(
                    score_gradients[LAST_BLOCK * SCORE_TILES + S3], columns, accumulator[LAST_BLOCK * HEAD_SLOTS + d]);
            }
        }
    }
}

fn load_block(
    block: u32, query: u32, row: u32, query_base: u32, qkv_stride: u32, dout_base: u32, dout_stride: u32,
) {
    let inside = query < params.seq_len;
    load_all_queries(block, query_base + query * qkv_stride, inside);
    load_all_douts(block, dout_base + query * dout_stride, inside);
    row_lse[block] = 0.0;
    row_delta[block] = 0.0;
    if (inside) {
        row_lse[block] = lse[row] * LOG2_E;
        row_delta[block] = delta[row] * params.gradient_scale;
    }
}

// Probabilities of four keys, from the scratch
fn read_quad(i: u32, lse_of_row: f32, query: u32, first_key: u32, on_diagonal: bool, exponent_scale: f32) {
    var exponents = load_scratch(lane_base + i * LANE_STEP) * exponent_scale - vec4<f32>(lse_of_row);
    if (on_diagonal) {
        let keys = vec4<u32>(first_key + 4u * (lane_part + i * LANES_PER_ROW)) + vec4<u32>(0u, 1u, 2u, 3u);
        exponents = select(exponents, vec4<f32>(MASKED), keys > vec4<u32>(query));
    }
    probabilities[i] = exp2(exponents);
}

// dS of four keys, from the scratch to the operand memory
fn weigh_quad(i: u32, delta_of_row: f32, row: u32, first_key: u32) {
    var gradient = load_scratch(lane_base + i * LANE_STEP);
    if (DROPOUT) {
        let random = random_words(row, first_key / 4u + lane_part + i * LANES_PER_ROW);
        let kept = random >= vec4<u32>(params.drop_threshold);
        gradient = select(vec4<f32>(), gradient * params.keep_scale, kept);
    }
    store_operand(lane_base + i * LANE_STEP, probabilities[i] * (gradient - vec4<f32>(delta_of_row)));
}

// scores and gradients of one row block and one group of keys -> score_gradients; row = the row of lse.
fn gradient_block(block: u32, query: u32, row: u32, first_key: u32, on_diagonal: bool, exponent_scale: f32) {
    for (var j = 0u; j < SCORE_TILES; j++) {
        let place = (scratch_base + j * EDGE) / PACK;
        let pitch = SCRATCH_PITCH;
        coopStoreT(scores[block * SCORE_TILES + j], &scratch[place], pitch);
    }
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        read_quad(i, row_lse[block], query, first_key, on_diagonal, exponent_scale);
    }
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        let place = (scratch_base + j * EDGE) / PACK;
        let pitch = SCRATCH_PITCH;
        coopStoreT(gradients[block * SCORE_TILES + j], &scratch[place], pitch);
    }
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        weigh_quad(i, row_delta[block], row, first_key);
    }
    workgroupBarrier();
    for (var j = 0u; j < SCORE_TILES; j++) {
        score_gradients[block * SCORE_TILES + j] =
            coopLoadT<mat_a>(&operand[(scratch_base + j * EDGE) / PACK], SCRATCH_PITCH);
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
    let query_tiles = (seq_len + BLOCK_Q - 1u) / BLOCK_Q;
    let tile = workgroup.y * grid.x + workgroup.x;
    if (tile >= head_count * query_tiles) {
        return;
    }
    let query_start = (query_tiles - 1u - tile / head_count) * BLOCK_Q; // the longest rows first
    let batch_head = tile % head_count;
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
    let query = query_start + subgroup * (ROW_BLOCKS * EDGE) + lane_row; // this lane's, in row block 0
    let row = batch_head * seq_len + query;

    load_block(0u, query, row, query_base, qkv_stride, dout_base, channel_quads);
    if (ROW_BLOCKS > 1u) {
        load_block(1u, query + EDGE, row + EDGE, query_base, qkv_stride, dout_base, channel_quads);
    }

    fetch_tile(key_base, qkv_stride, value_base, qkv_stride, 0u, thread);
    let key_end = min(query_start + BLOCK_Q, seq_len);
    for (var key_start = 0u; key_start < key_end; key_start += BLOCK_K) {
        workgroupBarrier(); // the last tile's readers are done
        stage_tile(thread);
        workgroupBarrier();
        fetch_tile(key_base, qkv_stride, value_base, qkv_stride, key_start + BLOCK_K, thread);

        let on_diagonal = key_start + BLOCK_K > query_start + 1u;
        for (var group = 0u; group < BLOCK_K; group += SCORE_COLS) {
            scores = array<mat_c, ROW_BLOCKS * SCORE_TILES>();
            gradients = array<mat_c, ROW_BLOCKS * SCORE_TILES>();
            add_scores(group);
            add_gradients(group);
            gradient_block(0u, query, row, key_start + group, on_diagonal, exponent_scale);
            if (ROW_BLOCKS > 1u) {
                gradient_block(1u, query + EDGE, row + EDGE, key_start + group, on_diagonal, exponent_scale);
            }
            add_dq(group);
        }
    }

    let factor = scale * params.result_scale;
    store_all_gradient(0u, query_base + query * qkv_stride, query < seq_len, factor);
    if (ROW_BLOCKS > 1u) {
        store_all_gradient(1u, query_base + (query + EDGE) * qkv_stride, query + EDGE < seq_len, factor);
    }
}
