// Causal attention, backward, dQ, without subgroups, f16 arithmetic or cooperative matrices: it runs everywhere.
//
// One workgroup computes the gradient of BLOCK_Q queries of one head, all D columns:
//     dQ = 0
//     for each tile of BLOCK_K keys up to the diagonal (K and V whole, Q and dOut in chunks of DIM_CHUNK columns):
//         S = Q K^T;  P = exp(S * scale - lse)             the forward: out = dropout(P) V
//         dP = dropout'(dOut V^T);  dS = P * (dP - delta)  register tiles, dS through workgroup memory
//         dQ += dS K
//     dQ *= scale
// Workgroups of the longest rows are launched first; tiles above the diagonal are never visited.
//
// Header:
//     elem           f32 or f16, the storage type; all arithmetic is f32
//     HEAD_DIM       D, a multiple of 16
//     THREADS        of the workgroup
//     BLOCK_Q        queries of the workgroup
//     BLOCK_K        keys of a tile, a multiple of 8 and of 4 * SCORE_COLS
//     DIM_CHUNK      columns of Q or dOut in workgroup memory at once, divides HEAD_DIM, a multiple of 8
//     SCORE_COLS     threads side by side over the keys of S; THREADS / SCORE_COLS divides BLOCK_Q
//     OUT_COLS       threads side by side over the columns of dQ, divides HEAD_DIM / 4; THREADS / OUT_COLS divides
//                    BLOCK_Q
//     DROPOUT        bool; philox.wgsl is prepended too, always
// BLOCK_Q * SCORE_COLS / THREADS and BLOCK_Q * OUT_COLS / THREADS are 1, 2, 4 or 8, BLOCK_K / 4 / SCORE_COLS at most 2
// and HEAD_DIM / 4 / OUT_COLS at most 5. A thread holds in registers
// 2 * BLOCK_Q * BLOCK_K / THREADS scores and BLOCK_Q * HEAD_DIM / THREADS of dQ.
// Grid: batch * heads * ceil(seq_len / BLOCK_Q) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 dout (B, T, C) elem; 2 lse (B, H, T) f32; 3 delta (B, H, T) f32;
//           4 dqkv (B, T, 3C) elem, its q third is written; 5 params.

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
const MASKED: f32 = -1e30; // finite: fast math may assume that no infinity exists

// A "quad" is four neighbours that move as one vec4.
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const DIM_STRIDE: u32 = DIM_QUADS + 1u;     // odd: threads on neighbouring rows read without bank conflicts
const CHUNK_QUADS: u32 = DIM_CHUNK / 4u;
const CHUNK_STRIDE: u32 = CHUNK_QUADS + 1u;
const KEY_QUADS: u32 = BLOCK_K / 4u;
const SCORE_STRIDE: u32 = BLOCK_Q + 1u;
const SCORE_ROW_STEP: u32 = THREADS / SCORE_COLS;
const SCORE_ROWS: u32 = BLOCK_Q / SCORE_ROW_STEP;
const SCORE_QUADS: u32 = KEY_QUADS / SCORE_COLS;
const OUT_ROW_STEP: u32 = THREADS / OUT_COLS;
const OUT_ROWS: u32 = BLOCK_Q / OUT_ROW_STEP;
const OUT_QUADS: u32 = DIM_QUADS / OUT_COLS;

// Keys lie permuted in the tiles: key 4 q + j at slot j * KEY_QUADS + q. Neighbouring threads then own neighbouring
// quads of keys and still read neighbouring slots.
var<workgroup> key_tile: array<vec4<f32>, BLOCK_K * DIM_STRIDE>;      // [slot][quad]
var<workgroup> value_tile: array<vec4<f32>, BLOCK_K * DIM_STRIDE>;    // [slot][quad]
var<workgroup> row_tile: array<vec4<f32>, BLOCK_Q * CHUNK_STRIDE>;    // [query][chunk quad] of Q, then of dOut
var<workgroup> score_tile: array<vec4<f32>, KEY_QUADS * SCORE_STRIDE>; // dS, [key quad][query]
var<workgroup> row_lse: array<f32, BLOCK_Q>;                          // in units of log 2
var<workgroup> row_delta: array<f32, BLOCK_Q>;

// What a thread holds. Loops over these arrays are written out as calls: NVIDIA's compiler does not unroll long ones,
// and an array that it cannot index by constants leaves the registers (measured: up to 30 % slower).
var<private> scores: array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>;
var<private> gradients: array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>;
var<private> accumulator: array<vec4<f32>, OUT_ROWS * OUT_QUADS>;
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

// scores of four rows and four columns += one quad of their dot products
fn add_scores_rows(first: u32, j: u32, quad: u32, chunk: u32) {
    let column = (score_col + j * SCORE_COLS) * DIM_STRIDE + chunk + quad;
    let c0 = key_tile[column];
    let c1 = key_tile[column + KEY_QUADS * DIM_STRIDE];
    let c2 = key_tile[column + 2u * KEY_QUADS * DIM_STRIDE];
    let c3 = key_tile[column + 3u * KEY_QUADS * DIM_STRIDE];
    scores[j * SCORE_ROWS + first + 0u] = four_dots(
        row_tile[(score_row + first * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
        c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 0u]);
    if (SCORE_ROWS > 1u) {
        scores[j * SCORE_ROWS + first + 1u] = four_dots(
            row_tile[(score_row + (first + 1u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 1u]);
    }
    if (SCORE_ROWS > 2u) {
        scores[j * SCORE_ROWS + first + 2u] = four_dots(
            row_tile[(score_row + (first + 2u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 2u]);
    }
    if (SCORE_ROWS > 3u) {
        scores[j * SCORE_ROWS + first + 3u] = four_dots(
            row_tile[(score_row + (first + 3u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
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
    let c0 = value_tile[column];
    let c1 = value_tile[column + KEY_QUADS * DIM_STRIDE];
    let c2 = value_tile[column + 2u * KEY_QUADS * DIM_STRIDE];
    let c3 = value_tile[column + 3u * KEY_QUADS * DIM_STRIDE];
    gradients[j * SCORE_ROWS + first + 0u] = four_dots(
        row_tile[(score_row + first * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
        c0, c1, c2, c3, gradients[j * SCORE_ROWS + first + 0u]);
    if (SCORE_ROWS > 1u) {
        gradients[j * SCORE_ROWS + first + 1u] = four_dots(
            row_tile[(score_row + (first + 1u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, gradients[j * SCORE_ROWS + first + 1u]);
    }
    if (SCORE_ROWS > 2u) {
        gradients[j * SCORE_ROWS + first + 2u] = four_dots(
            row_tile[(score_row + (first + 2u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, gradients[j * SCORE_ROWS + first + 2u]);
    }
    if (SCORE_ROWS > 3u) {
        gradients[j * SCORE_ROWS + first + 3u] = four_dots(
            row_tile[(score_row + (first + 3u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
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

// accumulator of four rows and one quad of columns += four keys of dS K
fn add_dq_rows(first: u32, j: u32, score_quad: u32, tile_quad: u32) {
    let weights = score_quad * SCORE_STRIDE + out_row + first * OUT_ROW_STEP;
    let column = tile_quad * DIM_STRIDE + out_col + j * OUT_COLS;
    let v0 = key_tile[column];
    let v1 = key_tile[column + KEY_QUADS * DIM_STRIDE];
    let v2 = key_tile[column + 2u * KEY_QUADS * DIM_STRIDE];
    let v3 = key_tile[column + 3u * KEY_QUADS * DIM_STRIDE];
    accumulator[j * OUT_ROWS + first] = add_four(
        score_tile[weights], v0, v1, v2, v3, accumulator[j * OUT_ROWS + first]);
    if (OUT_ROWS > 1u) {
        accumulator[j * OUT_ROWS + first + 1u] = add_four(
            score_tile[weights + 1u * OUT_ROW_STEP], v0, v1, v2, v3, accumulator[j * OUT_ROWS + first + 1u]);
    }
    if (OUT_ROWS > 2u) {
        accumulator[j * OUT_ROWS + first + 2u] = add_four(
            score_tile[weights + 2u * OUT_ROW_STEP], v0, v1, v2, v3, accumulator[j * OUT_ROWS + first + 2u]);
    }
    if (OUT_ROWS > 3u) {
        accumulator[j * OUT_ROWS + first + 3u] = add_four(
            score_tile[weights + 3u * OUT_ROW_STEP], v0, v1, v2, v3, accumulator[j * OUT_ROWS + first + 3u]);
    }
}

fn add_dq_quad(j: u32, score_quad: u32, tile_quad: u32) {
    add_dq_rows(0u, j, score_quad, tile_quad);
    if (OUT_ROWS > 4u) { add_dq_rows(4u, j, score_quad, tile_quad); }
}

fn add_dq(score_quad: u32, tile_quad: u32) {
    add_dq_quad(0u, score_quad, tile_quad);
    if (OUT_QUADS > 1u) { add_dq_quad(1u, score_quad, tile_quad); }
    if (OUT_QUADS > 2u) { add_dq_quad(2u, score_quad, tile_quad); }
    if (OUT_QUADS > 3u) { add_dq_quad(3u, score_quad, tile_quad); }
    if (OUT_QUADS > 4u) { add_dq_quad(4u, score_quad, tile_quad); }
}

// dS = P * (dP - delta) of one row and four keys
fn write_score_gradient(i: u32, j: u32, query_start: u32, key_start: u32, batch_head: u32, exponent_scale: f32) {
    let row = score_row + i * SCORE_ROW_STEP;
    let query = query_start + row;
    let key_quad = score_col + j * SCORE_COLS;
    let keys = vec4<u32>(key_start + 4u * key_quad) + vec4<u32>(0u, 1u, 2u, 3u);
    let exponents = scores[j * SCORE_ROWS + i] * exponent_scale - vec4<f32>(row_lse[row]);
    let probabilities = exp2(select(exponents, vec4<f32>(MASKED), keys > vec4<u32>(query)));
    var gradient = gradients[j * SCORE_ROWS + i];
    if (DROPOUT) {
        let random = philox4x32(
            vec4<u32>(keys.x / 4u, batch_head * params.seq_len + query, params.step, params.site),
            vec2<u32>(params.seed_lo, params.seed_hi),
        );
        let kept = random >= vec4<u32>(params.drop_threshold);
        gradient = select(vec4<f32>(), gradient * params.keep_scale, kept);
    }
    score_tile[key_quad * SCORE_STRIDE + row] = probabilities * (gradient - vec4<f32>(row_delta[row]));
}

fn write_score_gradients(i: u32, query_start: u32, key_start: u32, batch_head: u32, exponent_scale: f32) {
    write_score_gradient(i, 0u, query_start, key_start, batch_head, exponent_scale);
    if (SCORE_QUADS > 1u) { write_score_gradient(i, 1u, query_start, key_start, batch_head, exponent_scale); }
}

fn store_dq(i: u32, query_start: u32, query_base: u32, qkv_stride: u32, scale: f32) {
    let query = query_start + out_row + i * OUT_ROW_STEP;
    if (query < params.seq_len) {
        for (var j = 0u; j < OUT_QUADS; j++) {
            let index = query_base + query * qkv_stride + out_col + j * OUT_COLS;
            dqkv[index] = vec4<elem>(accumulator[j * OUT_ROWS + i] * scale);
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

    score_row = thread / SCORE_COLS;
    score_col = thread % SCORE_COLS;
    out_row = thread / OUT_COLS;
    out_col = thread % OUT_COLS;

    for (var row = thread; row < BLOCK_Q; row += THREADS) {
        var lse_value = -MASKED; // beyond the end: every probability 0
        var delta_value = 0.0;
        if (query_start + row < seq_len) {
            lse_value = lse[batch_head * seq_len + query_start + row] * LOG2_E;
            delta_value = delta[batch_head * seq_len + query_start + row];
        }
        row_lse[row] = lse_value;
        row_delta[row] = delta_value;
    }

    let key_end = min(query_start + BLOCK_Q, seq_len);
    for (var key_start = 0u; key_start < key_end; key_start += BLOCK_K) {
        scores = array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>();
        gradients = array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>();

        // S = Q K^T
        workgroupBarrier(); // the tiles' last readers are done
        for (var step = 0u; step < (BLOCK_K * DIM_QUADS + THREADS - 1u) / THREADS; step++) {
            let index = thread + step * THREADS;
            if ((BLOCK_K * DIM_QUADS) % THREADS == 0u || index < BLOCK_K * DIM_QUADS) {
                let row = index / DIM_QUADS;
                let quad = index % DIM_QUADS;
                let source_row = min(key_start + row, seq_len - 1u);
                let source = source_row * qkv_stride + quad;
                let key_value = vec4<f32>(qkv[key_base + source]);
                let value_value = vec4<f32>(qkv[value_base + source]);
                let slot = (row % 4u) * KEY_QUADS + row / 4u;
                key_tile[slot * DIM_STRIDE + quad] = key_value;
                value_tile[slot * DIM_STRIDE + quad] = value_value;
            }
        }
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            if (chunk > 0u) {
                workgroupBarrier();
            }
            for (var step = 0u; step < (BLOCK_Q * CHUNK_QUADS + THREADS - 1u) / THREADS; step++) {
                let index = thread + step * THREADS;
                if ((BLOCK_Q * CHUNK_QUADS) % THREADS == 0u || index < BLOCK_Q * CHUNK_QUADS) {
                    let row = index / CHUNK_QUADS;
                    let quad = index % CHUNK_QUADS;
                    let source = min(query_start + row, seq_len - 1u);
                    let value = vec4<f32>(qkv[query_base + source * qkv_stride + chunk + quad]);
                    row_tile[row * CHUNK_STRIDE + quad] = value;
                }
            }
            workgroupBarrier();
            for (var quad = 0u; quad < CHUNK_QUADS; quad += 2u) {
                add_scores_quad(quad, chunk);
                add_scores_quad(quad + 1u, chunk);
            }
        }

        // dOut V^T
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            workgroupBarrier();
            for (var step = 0u; step < (BLOCK_Q * CHUNK_QUADS + THREADS - 1u) / THREADS; step++) {
                let index = thread + step * THREADS;
                if ((BLOCK_Q * CHUNK_QUADS) % THREADS == 0u || index < BLOCK_Q * CHUNK_QUADS) {
                    let row = index / CHUNK_QUADS;
                    let quad = index % CHUNK_QUADS;
                    let source = min(query_start + row, seq_len - 1u);
                    let value = vec4<f32>(dout[dout_base + source * channel_quads + chunk + quad]);
                    row_tile[row * CHUNK_STRIDE + quad] = value;
                }
            }
            workgroupBarrier();
            for (var quad = 0u; quad < CHUNK_QUADS; quad += 2u) {
                add_gradients_quad(quad, chunk);
                add_gradients_quad(quad + 1u, chunk);
            }
        }

        // dS = P * (dP - delta)
        write_score_gradients(0u, query_start, key_start, batch_head, exponent_scale);
        if (SCORE_ROWS > 1u) { write_score_gradients(1u, query_start, key_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 2u) { write_score_gradients(2u, query_start, key_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 3u) { write_score_gradients(3u, query_start, key_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 4u) { write_score_gradients(4u, query_start, key_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 5u) { write_score_gradients(5u, query_start, key_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 6u) { write_score_gradients(6u, query_start, key_start, batch_head, exponent_scale); }
        if (SCORE_ROWS > 7u) { write_score_gradients(7u, query_start, key_start, batch_head, exponent_scale); }
        workgroupBarrier();

        // dQ += dS K
        for (var key_quad = 0u; key_quad < KEY_QUADS; key_quad += 2u) {
            add_dq(key_quad, key_quad);
            add_dq(key_quad + 1u, key_quad + 1u);
        }
    }

    store_dq(0u, query_start, query_base, qkv_stride, scale);
    if (OUT_ROWS > 1u) { store_dq(1u, query_start, query_base, qkv_stride, scale); }
    if (OUT_ROWS > 2u) { store_dq(2u, query_start, query_base, qkv_stride, scale); }
    if (OUT_ROWS > 3u) { store_dq(3u, query_start, query_base, qkv_stride, scale); }
    if (OUT_ROWS > 4u) { store_dq(4u, query_start, query_base, qkv_stride, scale); }
    if (OUT_ROWS > 5u) { store_dq(5u, query_start, query_base, qkv_stride, scale); }
    if (OUT_ROWS > 6u) { store_dq(6u, query_start, query_base, qkv_stride, scale); }
    if (OUT_ROWS > 7u) { store_dq(7u, query_start, query_base, qkv_stride, scale); }
}
