// Causal attention, backward, dK and dV, without subgroups, f16 arithmetic or cooperative matrices: it runs everywhere.
//
// One workgroup computes the gradients of BLOCK_K keys and values of one head, all D columns. Keys are the rows here,
// so scores appear transposed:
//     dK = dV = 0
//     for each tile of BLOCK_Q queries from the diagonal on (Q and dOut whole, K and V in chunks of DIM_CHUNK columns):
//         S' = K Q^T;  P' = exp(S' * scale - lse)            the forward: out = dropout(P) V
//         dV += dropout(P') dOut                             P' through workgroup memory
//         dP' = dropout'(V dOut^T);  dS' = P' * (dP' - delta)
//         dK += dS' Q                                        dS' through the same memory
//     dK *= scale
// Workgroups with the most queries are launched first; tiles above the diagonal are never visited.
//
// Header:
//     elem           f32 or f16, the storage type; all arithmetic is f32
//     HEAD_DIM       D, a multiple of 16
//     THREADS        of the workgroup
//     BLOCK_K        keys of the workgroup
//     BLOCK_Q        queries of a tile, a multiple of 8 and of 4 * SCORE_COLS
//     DIM_CHUNK      columns of K or V in workgroup memory at once, divides HEAD_DIM, a multiple of 8
//     SCORE_COLS     threads side by side over the queries of S'; THREADS / SCORE_COLS divides BLOCK_K
//     OUT_COLS       threads side by side over the columns of dK, divides HEAD_DIM / 4; THREADS / OUT_COLS divides
//                    BLOCK_K
//     DROPOUT        bool; philox.wgsl is prepended too, always
// BLOCK_K * SCORE_COLS / THREADS and BLOCK_K * OUT_COLS / THREADS are 1, 2, 4 or 8, BLOCK_Q / 4 / SCORE_COLS at most 2
// and HEAD_DIM / 4 / OUT_COLS at most 5. A thread holds in registers
// 2 * BLOCK_K * BLOCK_Q / THREADS scores and 2 * BLOCK_K * HEAD_DIM / THREADS gradients.
// With dropout, let BLOCK_K * SCORE_COLS / THREADS be a multiple of 4: then one Philox call serves four keys, not one.
// Grid: batch * heads * ceil(seq_len / BLOCK_K) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 dout (B, T, C) elem; 2 lse (B, H, T) f32; 3 delta (B, H, T) f32;
//           4 dqkv (B, T, 3C) elem, its k and v thirds are written; 5 params.

struct Params {
    batch: u32,
    heads: u32,
    seq_len: u32,
    row_offset: u32,     // unused
    seed_lo: u32,
    seed_hi: u32,
    step: u32,
    site: u32,
    drop_threshold: u32, // a probability is kept when its random word is >= this
    keep_scale: f32,
    gradient_scale: f32, // unused
    pad: u32,
}

@group(0) @binding(0) var<storage, read_write> qkv: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> dout: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> delta: array<f32>;
@group(0) @binding(4) var<storage, read_write> dqkv: array<vec4<elem>>;
@group(0) @binding(5) var<uniform> params: Params;

const LOG2_E: f32 = 1.4426950408889634;
const MASKED: f32 = -1e30;  // finite: fast math may assume that no infinity exists
const NO_QUERY: f32 = 1e30; // the lse of a query beyond the end: its probabilities become exp2(-1e30) = 0

// A "quad" is four neighbours that move as one vec4.
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const DIM_STRIDE: u32 = DIM_QUADS + 1u;     // odd: threads on neighbouring rows read without bank conflicts
const CHUNK_QUADS: u32 = DIM_CHUNK / 4u;
const CHUNK_STRIDE: u32 = CHUNK_QUADS + 1u;
const QUERY_QUADS: u32 = BLOCK_Q / 4u;
const SCORE_STRIDE: u32 = BLOCK_K + 1u;
const SCORE_ROW_THREADS: u32 = THREADS / SCORE_COLS;
const SCORE_ROWS: u32 = BLOCK_K / SCORE_ROW_THREADS;
const SCORE_QUADS: u32 = QUERY_QUADS / SCORE_COLS;
const OUT_ROW_STEP: u32 = THREADS / OUT_COLS;
const OUT_ROWS: u32 = BLOCK_K / OUT_ROW_STEP;
const OUT_QUADS: u32 = DIM_QUADS / OUT_COLS;
// A thread's keys come in runs of this many, so that a run shares one Philox call.
const KEY_RUN: u32 = select(1u, 4u, SCORE_ROWS % 4u == 0u);

// Queries lie permuted in the tiles: query 4 q + j at slot j * QUERY_QUADS + q. Neighbouring threads then own
// neighbouring quads of queries and still read neighbouring slots.
var<workgroup> query_tile: array<vec4<f32>, BLOCK_Q * DIM_STRIDE>;       // [slot][quad]
var<workgroup> dout_tile: array<vec4<f32>, BLOCK_Q * DIM_STRIDE>;        // [slot][quad]
var<workgroup> row_tile: array<vec4<f32>, BLOCK_K * CHUNK_STRIDE>;       // [key][chunk quad] of K, then of V
var<workgroup> score_tile: array<vec4<f32>, QUERY_QUADS * SCORE_STRIDE>; // P', then dS', [query quad][key]
var<workgroup> query_lse: array<f32, BLOCK_Q>;                           // in units of log 2
var<workgroup> query_delta: array<f32, BLOCK_Q>;

// What a thread holds. Loops over these arrays are written out as calls: NVIDIA's compiler does not unroll long ones,
// and an array that it cannot index by constants leaves the registers (measured: up to 30 % slower).
var<private> scores: array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>;    // S', then P'
var<private> gradients: array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>;
var<private> key_gradient: array<vec4<f32>, OUT_ROWS * OUT_QUADS>;
var<private> value_gradient: array<vec4<f32>, OUT_ROWS * OUT_QUADS>;
var<private> random: array<vec4<u32>, 4 * SCORE_QUADS>;            // of the current run of keys, a query each
var<private> score_row: u32; // the thread's place in S
var<private> score_col: u32;
var<private> out_row: u32;   // and among the sums
var<private> out_col: u32;

// sum_j + dot(row, column_j) for four columns
fn four_dots(row: vec4<f32>, c0: vec4<f32>, c1: vec4<f32>, c2: vec4<f32>, c3: vec4<f32>, sum: vec4<f32>) -> vec4<f32> {
    var result = fma(vec4<f32>(row.x), vec4<f32>(c0.x, c1.x, c2.x, c3.x), sum);
    result = fma(vec4<f32>(row.y), vec4<f32>(c0.y, c1.y, c2.y, c3.y), result);
    result = fma(vec4<f32>(row.z), vec4<f32>(c0.z, c1.z, c2.z, c3.z), result);
    return fma(vec4<f32>(row.w), vec4<f32>(c0.w, c1.w, c2.w, c3.w), result);
}

// sum + the combination of four columns
fn add_four(w: vec4<f32>, v0: vec4<f32>, v1: vec4<f32>, v2: vec4<f32>, v3: vec4<f32>, sum: vec4<f32>) -> vec4<f32> {
    var result = fma(vec4<f32>(w.x), v0, sum);
    result = fma(vec4<f32>(w.y), v1, result);
    result = fma(vec4<f32>(w.z), v2, result);
    return fma(vec4<f32>(w.w), v3, result);
}

// The i-th of the thread's keys
fn row_of(i: u32) -> u32 {
    return score_row + i % KEY_RUN + i / KEY_RUN * (KEY_RUN * SCORE_ROW_THREADS);
}

// scores of four rows and four columns += one quad of their dot products
fn add_scores_rows(first: u32, j: u32, quad: u32, chunk: u32) {
    let column = (score_col + j * SCORE_COLS) * DIM_STRIDE + chunk + quad;
    let c0 = query_tile[column];
    let c1 = query_tile[column + QUERY_QUADS * DIM_STRIDE];
    let c2 = query_tile[column + 2u * QUERY_QUADS * DIM_STRIDE];
    let c3 = query_tile[column + 3u * QUERY_QUADS * DIM_STRIDE];
    scores[j * SCORE_ROWS + first + 0u] = four_dots(
        row_tile[(row_of(first)) * CHUNK_STRIDE + quad],
        c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 0u]);
    if (SCORE_ROWS > 1u) {
        scores[j * SCORE_ROWS + first + 1u] = four_dots(
            row_tile[(row_of((first + 1u))) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 1u]);
    }
    if (SCORE_ROWS > 2u) {
        scores[j * SCORE_ROWS + first + 2u] = four_dots(
            row_tile[(row_of((first + 2u))) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 2u]);
    }
    if (SCORE_ROWS > 3u) {
        scores[j * SCORE_ROWS + first + 3u] = four_dots(
            row_tile[(row_of((first + 3u))) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 3u]);
    }
}

fn add_scores_quad(quad: u32, chunk: u32) {
    add_scores_rows(0u, 0u, quad, chunk);
    if (SCORE_ROWS > 4u) { add_scores_rows(4u, 0u, quad, chunk); }
    if (SCORE_QUADS > 1u) {
        add_scores_rows(0u, 1u, quad, chunk);
        if (SCORE_ROWS > 4u) { add_scores_rows(4u, 1u, quad, chunk); }
    }
}

// gradients of four rows and four columns += one quad of their dot products
fn add_gradients_rows(first: u32, j: u32, quad: u32, chunk: u32) {
    let column = (score_col + j * SCORE_COLS) * DIM_STRIDE + chunk + quad;
    let c0 = dout_tile[column];
    let c1 = dout_tile[column + QUERY_QUADS * DIM_STRIDE];
    let c2 = dout_tile[column + 2u * QUERY_QUADS * DIM_STRIDE];
    let c3 = dout_tile[column + 3u * QUERY_QUADS * DIM_STRIDE];
    gradients[j * SCORE_ROWS + first + 0u] = four_dots(
        row_tile[(row_of(first)) * CHUNK_STRIDE + quad],
        c0, c1, c2, c3, gradients[j * SCORE_ROWS + first + 0u]);
    if (SCORE_ROWS > 1u) {
        gradients[j * SCORE_ROWS + first + 1u] = four_dots(
            row_tile[(row_of((first + 1u))) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, gradients[j * SCORE_ROWS + first + 1u]);
    }
    if (SCORE_ROWS > 2u) {
        gradients[j * SCORE_ROWS + first + 2u] = four_dots(
            row_tile[(row_of((first + 2u))) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, gradients[j * SCORE_ROWS + first + 2u]);
    }
    if (SCORE_ROWS > 3u) {
        gradients[j * SCORE_ROWS + first + 3u] = four_dots(
            row_tile[(row_of((first + 3u))) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, gradients[j * SCORE_ROWS + first + 3u]);
    }
}

fn add_gradients_quad(quad: u32, chunk: u32) {
    add_gradients_rows(0u, 0u, quad, chunk);
    if (SCORE_ROWS > 4u) { add_gradients_rows(4u, 0u, quad, chunk); }
    if (SCORE_QUADS > 1u) {
        add_gradients_rows(0u, 1u, quad, chunk);
        if (SCORE_ROWS > 4u) { add_gradients_rows(4u, 1u, quad, chunk); }
    }
}

// value_gradient of four rows and one quad of columns += four queries of dropout(P') dOut
fn add_dv_rows(first: u32, j: u32, score_quad: u32, tile_quad: u32) {
    let weights = score_quad * SCORE_STRIDE + out_row + first * OUT_ROW_STEP;
    let column = tile_quad * DIM_STRIDE + out_col + j * OUT_COLS;
    let v0 = dout_tile[column];
    let v1 = dout_tile[column + QUERY_QUADS * DIM_STRIDE];
    let v2 = dout_tile[column + 2u * QUERY_QUADS * DIM_STRIDE];
    let v3 = dout_tile[column + 3u * QUERY_QUADS * DIM_STRIDE];
    value_gradient[j * OUT_ROWS + first] = add_four(
        score_tile[weights], v0, v1, v2, v3, value_gradient[j * OUT_ROWS + first]);
    if (OUT_ROWS > 1u) {
        value_gradient[j * OUT_ROWS + first + 1u] = add_four(
            score_tile[weights + 1u * OUT_ROW_STEP], v0, v1, v2, v3, value_gradient[j * OUT_ROWS + first + 1u]);
    }
    if (OUT_ROWS > 2u) {
        value_gradient[j * OUT_ROWS + first + 2u] = add_four(
            score_tile[weights + 2u * OUT_ROW_STEP], v0, v1, v2, v3, value_gradient[j * OUT_ROWS + first + 2u]);
    }
    if (OUT_ROWS > 3u) {
        value_gradient[j * OUT_ROWS + first + 3u] = add_four(
            score_tile[weights + 3u * OUT_ROW_STEP], v0, v1, v2, v3, value_gradient[j * OUT_ROWS + first + 3u]);
    }
}

fn add_dv_quad(j: u32, score_quad: u32, tile_quad: u32) {
    add_dv_rows(0u, j, score_quad, tile_quad);
    if (OUT_ROWS > 4u) { add_dv_rows(4u, j, score_quad, tile_quad); }
}

fn add_dv(score_quad: u32, tile_quad: u32) {
    add_dv_quad(0u, score_quad, tile_quad);
    if (OUT_QUADS > 1u) { add_dv_quad(1u, score_quad, tile_quad); }
    if (OUT_QUADS > 2u) { add_dv_quad(2u, score_quad, tile_quad); }
    if (OUT_QUADS > 3u) { add_dv_quad(3u, score_quad, tile_quad); }
    if (OUT_QUADS > 4u) { add_dv_quad(4u, score_quad, tile_quad); }
}

// key_gradient of four rows and one quad of columns += four queries of dS' Q
fn add_dk_rows(first: u32, j: u32, score_quad: u32, tile_quad: u32) {
    let weights = score_quad * SCORE_STRIDE + out_row + first * OUT_ROW_STEP;
    let column = tile_quad * DIM_STRIDE + out_col + j * OUT_COLS;
    let v0 = query_tile[column];
    let v1 = query_tile[column + QUERY_QUADS * DIM_STRIDE];
    let v2 = query_tile[column + 2u * QUERY_QUADS * DIM_STRIDE];
    let v3 = query_tile[column + 3u * QUERY_QUADS * DIM_STRIDE];
    key_gradient[j * OUT_ROWS + first] = add_four(
        score_tile[weights], v0, v1, v2, v3, key_gradient[j * OUT_ROWS + first]);
    if (OUT_ROWS > 1u) {
        key_gradient[j * OUT_ROWS + first + 1u] = add_four(
            score_tile[weights + 1u * OUT_ROW_STEP], v0, v1, v2, v3, key_gradient[j * OUT_ROWS + first + 1u]);
    }
    if (OUT_ROWS > 2u) {
        key_gradient[j * OUT_ROWS + first + 2u] = add_four(
            score_tile[weights + 2u * OUT_ROW_STEP], v0, v1, v2, v3, key_gradient[j * OUT_ROWS + first + 2u]);
    }
    if (OUT_ROWS > 3u) {
        key_gradient[j * OUT_ROWS + first + 3u] = add_four(
            score_tile[weights + 3u * OUT_ROW_STEP], v0, v1, v2, v3, key_gradient[j * OUT_ROWS + first + 3u]);
    }
}

fn add_dk_quad(j: u32, score_quad: u32, tile_quad: u32) {
    add_dk_rows(0u, j, score_quad, tile_quad);
    if (OUT_ROWS > 4u) { add_dk_rows(4u, j, score_quad, tile_quad); }
}

fn add_dk(score_quad: u32, tile_quad: u32) {
    add_dk_quad(0u, score_quad, tile_quad);
    if (OUT_QUADS > 1u) { add_dk_quad(1u, score_quad, tile_quad); }
    if (OUT_QUADS > 2u) { add_dk_quad(2u, score_quad, tile_quad); }
    if (OUT_QUADS > 3u) { add_dk_quad(3u, score_quad, tile_quad); }
    if (OUT_QUADS > 4u) { add_dk_quad(4u, score_quad, tile_quad); }
}

// P' of one key and four queries: it stays in scores, a dropped one with a minus sign
fn write_probability(i: u32, j: u32, key_start: u32, query_start: u32, batch_head: u32, exponent_scale: f32) {
    let row = row_of(i);
    let key = key_start + row;
    let query_quad = score_col + j * SCORE_COLS;
    let first = 4u * query_quad;
    let queries = vec4<u32>(query_start + first) + vec4<u32>(0u, 1u, 2u, 3u);
    let lse_quad = vec4<f32>(query_lse[first], query_lse[first + 1u], query_lse[first + 2u], query_lse[first + 3u]);
    let exponents = scores[j * SCORE_ROWS + i] * exponent_scale - lse_quad;
    var probabilities = exp2(select(exponents, vec4<f32>(MASKED), queries < vec4<u32>(key)));
    var weights = probabilities;
    if (DROPOUT) {
        if (i % KEY_RUN == 0u) {
            let rows = queries + vec4<u32>(batch_head * params.seq_len);
            let seed = vec2<u32>(params.seed_lo, params.seed_hi);
            random[4u * j] = philox4x32(vec4<u32>(key / 4u, rows.x, params.step, params.site), seed);
            random[4u * j + 1u] = philox4x32(vec4<u32>(key / 4u, rows.y, params.step, params.site), seed);
            random[4u * j + 2u] = philox4x32(vec4<u32>(key / 4u, rows.z, params.step, params.site), seed);
            random[4u * j + 3u] = philox4x32(vec4<u32>(key / 4u, rows.w, params.step, params.site), seed);
        }
        let word = key % 4u;
        let words = vec4<u32>(
            random[4u * j][word], random[4u * j + 1u][word], random[4u * j + 2u][word], random[4u * j + 3u][word]);
        let kept = words >= vec4<u32>(params.drop_threshold);
        weights = select(vec4<f32>(), probabilities * params.keep_scale, kept);
        probabilities = select(-probabilities, probabilities, kept);
    }
    scores[j * SCORE_ROWS + i] = probabilities;
    score_tile[query_quad * SCORE_STRIDE + row] = weights;
}

fn write_probabilities(i: u32, key_start: u32, query_start: u32, batch_head: u32, exponent_scale: f32) {
    write_probability(i, 0u, key_start, query_start, batch_head, exponent_scale);
    if (SCORE_QUADS > 1u) { write_probability(i, 1u, key_start, query_start, batch_head, exponent_scale); }
}

// dS' = P' * (dP' - delta) of one key
fn write_score_gradients(i: u32) {
    for (var j = 0u; j < SCORE_QUADS; j++) {
        let query_quad = score_col + j * SCORE_COLS;
        let first = 4u * query_quad;
        let delta_quad = vec4<f32>(
            query_delta[first], query_delta[first + 1u], query_delta[first + 2u], query_delta[first + 3u]);
        let probabilities = scores[j * SCORE_ROWS + i];
        var gradient = gradients[j * SCORE_ROWS + i];
        if (DROPOUT) {
            gradient = select(vec4<f32>(), gradient * params.keep_scale, probabilities > vec4<f32>());
        }
        score_tile[query_quad * SCORE_STRIDE + row_of(i)] = abs(probabilities) * (gradient - delta_quad);
    }
}

fn store_gradients(i: u32, key_start: u32, key_base: u32, value_base: u32, qkv_stride: u32, scale: f32) {
    let key = key_start + out_row + i * OUT_ROW_STEP;
    if (key < params.seq_len) {
        for (var j = 0u; j < OUT_QUADS; j++) {
            let index = key * qkv_stride + out_col + j * OUT_COLS;
            dqkv[key_base + index] = vec4<elem>(key_gradient[j * OUT_ROWS + i] * scale);
            dqkv[value_base + index] = vec4<elem>(value_gradient[j * OUT_ROWS + i]);
        }
    }
}

// Rows beyond the end are read as the last row and given probability 0 (or never stored): guards around the loads cost
// 15 to 40 %.
@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let seq_len = params.seq_len;
    let head_count = params.batch * params.heads;
    let key_tiles = (seq_len + BLOCK_K - 1u) / BLOCK_K;
    let tile = workgroup.y * grid.x + workgroup.x;
    if (tile >= head_count * key_tiles) {
        return;
    }
    let key_start = tile / head_count * BLOCK_K;  // the longest columns first
    let batch_head = tile % head_count;
    let batch = batch_head / params.heads;
    let head = batch_head % params.heads;
    let channel_quads = params.heads * DIM_QUADS; // C / 4
    let qkv_stride = 3u * channel_quads;          // quads of one token of qkv
    let query_base = batch * seq_len * qkv_stride + head * DIM_QUADS;
    let key_base = query_base + channel_quads;
    let value_base = key_base + channel_quads;
    let dout_base = batch * seq_len * channel_quads + head * DIM_QUADS;
    let scale = 1.0 / sqrt(f32(HEAD_DIM));
    let exponent_scale = scale * LOG2_E;

    score_row = thread / SCORE_COLS * KEY_RUN; // the first of its run of keys
    score_col = thread % SCORE_COLS;
    out_row = thread / OUT_COLS;
    out_col = thread % OUT_COLS;

    for (var query_start = key_start / BLOCK_Q * BLOCK_Q; query_start < seq_len; query_start += BLOCK_Q) {
        // S' = K Q^T
        workgroupBarrier(); // the tiles' last readers are done
        for (var step = 0u; step < (BLOCK_Q * DIM_QUADS + THREADS - 1u) / THREADS; step++) {
            let index = thread + step * THREADS;
            if ((BLOCK_Q * DIM_QUADS) % THREADS == 0u || index < BLOCK_Q * DIM_QUADS) {
                let row = index / DIM_QUADS;
                let quad = index % DIM_QUADS;
                let source_row = min(query_start + row, seq_len - 1u);
                let query_value = vec4<f32>(qkv[query_base + source_row * qkv_stride + quad]);
                let dout_value = vec4<f32>(dout[dout_base + source_row * channel_quads + quad]);
                let slot = (row % 4u) * QUERY_QUADS + row / 4u;
                query_tile[slot * DIM_STRIDE + quad] = query_value;
                dout_tile[slot * DIM_STRIDE + quad] = dout_value;
            }
        }
        for (var index = thread; index < BLOCK_Q; index += THREADS) {
            var lse_value = NO_QUERY;
            var delta_value = 0.0;
            if (query_start + index < seq_len) {
                lse_value = lse[batch_head * seq_len + query_start + index] * LOG2_E;
                delta_value = delta[batch_head * seq_len + query_start + index];
            }
            query_lse[index] = lse_value;
            query_delta[index] = delta_value;
        }
        scores = array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>();
        gradients = array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>();
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            if (chunk > 0u) {
                workgroupBarrier();
            }
            for (var step = 0u; step < (BLOCK_K * CHUNK_QUADS + THREADS - 1u) / THREADS; step++) {
                let index = thread + step * THREADS;
                if ((BLOCK_K * CHUNK_QUADS) % THREADS == 0u || index < BLOCK_K * CHUNK_QUADS) {
                    let row = index / CHUNK_QUADS;
                    let quad = index % CHUNK_QUADS;
                    let source = min(key_start + row, seq_len - 1u);
                    let value = vec4<f32>(qkv[key_base + source * qkv_stride + chunk + quad]);
                    row_tile[row * CHUNK_STRIDE + quad] = value;
                }
            }
            workgroupBarrier();
            for (var quad = 0u; quad < CHUNK_QUADS; quad += 2u) {
                add_scores_quad(quad, chunk);
                add_scores_quad(quad + 1u, chunk);
            }
        }

        write_probabilities(0u, key_start, query_start, batch_head, exponent_scale);
        if (SCORE_ROWS > 1u) { write_probabilities(1u, key_start, query_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 2u) { write_probabilities(2u, key_start, query_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 3u) { write_probabilities(3u, key_start, query_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 4u) { write_probabilities(4u, key_start, query_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 5u) { write_probabilities(5u, key_start, query_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 6u) { write_probabilities(6u, key_start, query_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 7u) { write_probabilities(7u, key_start, query_start, batch_head, exponent_scale); }
        workgroupBarrier();

        // dV += dropout(P') dOut
        for (var query_quad = 0u; query_quad < QUERY_QUADS; query_quad += 2u) {
            add_dv(query_quad, query_quad);
            add_dv(query_quad + 1u, query_quad + 1u);
        }

        // V dOut^T
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            workgroupBarrier();
            for (var step = 0u; step < (BLOCK_K * CHUNK_QUADS + THREADS - 1u) / THREADS; step++) {
                let index = thread + step * THREADS;
                if ((BLOCK_K * CHUNK_QUADS) % THREADS == 0u || index < BLOCK_K * CHUNK_QUADS) {
                    let row = index / CHUNK_QUADS;
                    let quad = index % CHUNK_QUADS;
                    let source = min(key_start + row, seq_len - 1u);
                    let value = vec4<f32>(qkv[value_base + source * qkv_stride + chunk + quad]);
                    row_tile[row * CHUNK_STRIDE + quad] = value;
                }
            }
            workgroupBarrier();
            for (var quad = 0u; quad < CHUNK_QUADS; quad += 2u) {
                add_gradients_quad(quad, chunk);
                add_gradients_quad(quad + 1u, chunk);
            }
        }

        // dS' = P' * (dP' - delta): the barriers above also freed score_tile
        write_score_gradients(0u);
        if (SCORE_ROWS > 1u) { write_score_gradients(1u); }
        if (SCORE_ROWS > 2u) { write_score_gradients(2u); }
        if (SCORE_ROWS > 3u) { write_score_gradients(3u); }
        if (SCORE_ROWS > 4u) { write_score_gradients(4u); }
        if (SCORE_ROWS > 5u) { write_score_gradients(5u); }
        if (SCORE_ROWS > 6u) { write_score_gradients(6u); }
        if (SCORE_ROWS > 7u) { write_score_gradients(7u); }
        workgroupBarrier();

        // dK += dS' Q
        for (var query_quad = 0u; query_quad < QUERY_QUADS; query_quad += 2u) {
            add_dk(query_quad, query_quad);
            add_dk(query_quad + 1u, query_quad + 1u);
        }
    }

    store_gradients(0u, key_start, key_base, value_base, qkv_stride, scale);
    if (OUT_ROWS > 1u) { store_gradients(1u, key_start, key_base, value_base, qkv_stride, scale); }
    if (OUT_ROWS > 2u) { store_gradients(2u, key_start, key_base, value_base, qkv_stride, scale); }
    if (OUT_ROWS > 3u) { store_gradients(3u, key_start, key_base, value_base, qkv_stride, scale); }
    if (OUT_ROWS > 4u) { store_gradients(4u, key_start, key_base, value_base, qkv_stride, scale); }
    if (OUT_ROWS > 5u) { store_gradients(5u, key_start, key_base, value_base, qkv_stride, scale); }
    if (OUT_ROWS > 6u) { store_gradients(6u, key_start, key_base, value_base, qkv_stride, scale); }
    if (OUT_ROWS > 7u) { store_gradients(7u, key_start, key_base, value_base, qkv_stride, scale); }
}
