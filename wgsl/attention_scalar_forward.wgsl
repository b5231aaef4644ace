// Causal attention, forward, without subgroups, f16 arithmetic or cooperative matrices: it runs everywhere.
//
// One workgroup computes BLOCK_Q queries of one head, all D columns, and their log-sum-exp:
//     out = 0, reference = -1e30, sum = 0                                          (a row each)
//     for each tile of BLOCK_K keys up to the diagonal:
//         S = Q K^T                               register tiles; Q and K pass in chunks of DIM_CHUNK columns
//         new = max(reference, rowmax(S * scale)); shrink = exp2(reference - new); reference = new
//         P = exp2(S * scale - reference); sum = sum * shrink + rowsum(P)          one thread a row (ROW_THREADS)
//         out = out * shrink + dropout(P) V       register tiles; V passes in chunks of KEY_CHUNK keys
//     out /= sum; lse = reference + log(sum)
// Workgroups of the longest rows are launched first; tiles above the diagonal are never visited.
//
// Header:
//     elem           f32 or f16, the storage type; all arithmetic is f32
//     HEAD_DIM       D, a multiple of 16
//     THREADS        of the workgroup, a multiple of BLOCK_Q
//     BLOCK_Q        queries of the workgroup
//     BLOCK_K        keys of a tile, a multiple of 4 * SCORE_COLS
//     DIM_CHUNK      columns of Q and K in workgroup memory at once, divides HEAD_DIM, a multiple of 8
//     KEY_CHUNK      keys of V in workgroup memory at once, divides BLOCK_K, a multiple of 8
//     SCORE_COLS     threads side by side over the keys of S; THREADS / SCORE_COLS divides BLOCK_Q
//     OUT_COLS       threads side by side over the columns of out, divides HEAD_DIM / 4; THREADS / OUT_COLS divides
//                    BLOCK_Q
//     DROPOUT        bool; philox.wgsl is prepended too, always
// BLOCK_Q * SCORE_COLS / THREADS and BLOCK_Q * OUT_COLS / THREADS are 1, 2, 4 or 8, BLOCK_K / 4 / SCORE_COLS at most 2
// and HEAD_DIM / 4 / OUT_COLS at most 5. A thread holds in registers
// BLOCK_Q * BLOCK_K / THREADS scores and BLOCK_Q * HEAD_DIM / THREADS outputs.
// Grid: batch * heads * ceil(seq_len / BLOCK_Q) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 out (B, T, C) elem, written; 2 lse (B, H, T) f32, written; 3 params.

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
@group(0) @binding(1) var<storage, read_write> out: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
@group(0) @binding(3) var<uniform> params: Params;

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
const MASKED: f32 = -1e30; // finite: fast math may assume that no infinity exists

// A "quad" is four neighbours that move as one vec4.
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const CHUNK_QUADS: u32 = DIM_CHUNK / 4u;
const CHUNK_STRIDE: u32 = CHUNK_QUADS + 1u; // odd: threads on neighbouring rows read without bank conflicts
const KEY_QUADS: u32 = BLOCK_K / 4u;
const SCORE_STRIDE: u32 = BLOCK_Q + 1u;
const SCORE_ROW_STEP: u32 = THREADS / SCORE_COLS;
const SCORE_ROWS: u32 = BLOCK_Q / SCORE_ROW_STEP;
const SCORE_QUADS: u32 = KEY_QUADS / SCORE_COLS;
const OUT_ROW_STEP: u32 = THREADS / OUT_COLS;
const OUT_ROWS: u32 = BLOCK_Q / OUT_ROW_STEP;
const OUT_QUADS: u32 = DIM_QUADS / OUT_COLS;
const ROW_THREADS: u32 = THREADS / BLOCK_Q;
const ROW_QUADS: u32 = KEY_QUADS / ROW_THREADS;

// Keys lie permuted in key_value_tile while it holds K: key 4 q + j at slot j * KEY_QUADS + q. Neighbouring threads
// then own neighbouring quads of keys and still read neighbouring slots.
const KEY_VALUE_SIZE: u32 = max(BLOCK_K * CHUNK_STRIDE, KEY_CHUNK * DIM_QUADS);
var<workgroup> query_tile: array<vec4<f32>, BLOCK_Q * CHUNK_STRIDE>;   // [query][chunk quad]
var<workgroup> key_value_tile: array<vec4<f32>, KEY_VALUE_SIZE>;       // K: [slot][chunk quad]; V: [key][quad]
var<workgroup> score_tile: array<vec4<f32>, KEY_QUADS * SCORE_STRIDE>; // [key quad][query]
var<workgroup> row_shrink: array<f32, BLOCK_Q>;
var<workgroup> row_sums: array<f32, THREADS>;

// What a thread holds. Loops over these arrays are written out as calls: NVIDIA's compiler does not unroll long ones,
// and an array that it cannot index by constants leaves the registers (measured: up to 30 % slower).
var<private> scores: array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>;
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
fn add_scores_rows(first: u32, j: u32, quad: u32) {
    let column = (score_col + j * SCORE_COLS) * CHUNK_STRIDE + quad;
    let c0 = key_value_tile[column];
    let c1 = key_value_tile[column + KEY_QUADS * CHUNK_STRIDE];
    let c2 = key_value_tile[column + 2u * KEY_QUADS * CHUNK_STRIDE];
    let c3 = key_value_tile[column + 3u * KEY_QUADS * CHUNK_STRIDE];
    scores[j * SCORE_ROWS + first + 0u] = four_dots(
        query_tile[(score_row + first * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
        c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 0u]);
    if (SCORE_ROWS > 1u) {
        scores[j * SCORE_ROWS + first + 1u] = four_dots(
            query_tile[(score_row + (first + 1u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 1u]);
    }
    if (SCORE_ROWS > 2u) {
        scores[j * SCORE_ROWS + first + 2u] = four_dots(
            query_tile[(score_row + (first + 2u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 2u]);
    }
    if (SCORE_ROWS > 3u) {
        scores[j * SCORE_ROWS + first + 3u] = four_dots(
            query_tile[(score_row + (first + 3u) * SCORE_ROW_STEP) * CHUNK_STRIDE + quad],
            c0, c1, c2, c3, scores[j * SCORE_ROWS + first + 3u]);
    }
}

fn add_scores_quad(quad: u32) {
    add_scores_rows(0u, 0u, quad);
    if (SCORE_ROWS > 4u) { add_scores_rows(4u, 0u, quad); }
    if (SCORE_QUADS > 1u) {
        add_scores_rows(0u, 1u, quad);
        if (SCORE_ROWS > 4u) { add_scores_rows(4u, 1u, quad); }
    }
}

// accumulator of four rows and one quad of columns += four keys of P V
fn add_out_rows(first: u32, j: u32, score_quad: u32, tile_quad: u32) {
    let weights = score_quad * SCORE_STRIDE + out_row + first * OUT_ROW_STEP;
    let column = 4u * tile_quad * DIM_QUADS + out_col + j * OUT_COLS;
    let v0 = key_value_tile[column];
    let v1 = key_value_tile[column + DIM_QUADS];
    let v2 = key_value_tile[column + 2u * DIM_QUADS];
    let v3 = key_value_tile[column + 3u * DIM_QUADS];
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

fn add_out_quad(j: u32, score_quad: u32, tile_quad: u32) {
    add_out_rows(0u, j, score_quad, tile_quad);
    if (OUT_ROWS > 4u) { add_out_rows(4u, j, score_quad, tile_quad); }
}

fn add_out(score_quad: u32, tile_quad: u32) {
    add_out_quad(0u, score_quad, tile_quad);
    if (OUT_QUADS > 1u) { add_out_quad(1u, score_quad, tile_quad); }
    if (OUT_QUADS > 2u) { add_out_quad(2u, score_quad, tile_quad); }
    if (OUT_QUADS > 3u) { add_out_quad(3u, score_quad, tile_quad); }
    if (OUT_QUADS > 4u) { add_out_quad(4u, score_quad, tile_quad); }
}

fn write_scores(i: u32, exponent_scale: f32) {
    for (var j = 0u; j < SCORE_QUADS; j++) {
        let index = (score_col + j * SCORE_COLS) * SCORE_STRIDE + score_row + i * SCORE_ROW_STEP;
        score_tile[index] = scores[j * SCORE_ROWS + i] * exponent_scale;
    }
}

fn shrink_out(i: u32) {
    for (var j = 0u; j < OUT_QUADS; j++) {
        accumulator[j * OUT_ROWS + i] *= row_shrink[out_row + i * OUT_ROW_STEP];
    }
}

fn store_out(i: u32, first_query: u32, out_base: u32, channel_quads: u32) {
    let row = out_row + i * OUT_ROW_STEP;
    if (first_query + row < params.seq_len) {
        var total = 0.0;
        for (var part = 0u; part < ROW_THREADS; part++) {
            total += row_sums[part * BLOCK_Q + row];
        }
        for (var j = 0u; j < OUT_QUADS; j++) {
            out[out_base + (first_query + row) * channel_quads + out_col + j * OUT_COLS] =
                vec4<elem>(accumulator[j * OUT_ROWS + i] / total);
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
    let exponent_scale = LOG2_E / sqrt(f32(HEAD_DIM));

    score_row = thread / SCORE_COLS;
    score_col = thread % SCORE_COLS;
    out_row = thread / OUT_COLS;
    out_col = thread % OUT_COLS;
    let softmax_row = thread % BLOCK_Q;
    let softmax_part = thread / BLOCK_Q;
    let query = query_start + softmax_row;

    var reference = MASKED; // of softmax_row, in units of log 2
    var sum = 0.0;          // of this thread's part of softmax_row
    let key_end = min(query_start + BLOCK_Q, seq_len);
    for (var key_start = 0u; key_start < key_end; key_start += BLOCK_K) {
        // S = Q K^T
        scores = array<vec4<f32>, SCORE_ROWS * SCORE_QUADS>();
        for (var chunk = 0u; chunk < DIM_QUADS; chunk += CHUNK_QUADS) {
            workgroupBarrier(); // the tiles' last readers are done
            if (key_start == 0u || CHUNK_QUADS < DIM_QUADS) { // an undivided Q stays
                for (var step = 0u; step < (BLOCK_Q * CHUNK_QUADS + THREADS - 1u) / THREADS; step++) {
                    let index = thread + step * THREADS;
                    if ((BLOCK_Q * CHUNK_QUADS) % THREADS == 0u || index < BLOCK_Q * CHUNK_QUADS) {
                        let row = index / CHUNK_QUADS;
                        let quad = index % CHUNK_QUADS;
                        let source = min(query_start + row, seq_len - 1u);
                        let value = vec4<f32>(qkv[query_base + source * qkv_stride + chunk + quad]);
                        query_tile[row * CHUNK_STRIDE + quad] = value;
                    }
                }
            }
            for (var step = 0u; step < (BLOCK_K * CHUNK_QUADS + THREADS - 1u) / THREADS; step++) {
                let index = thread + step * THREADS;
                if ((BLOCK_K * CHUNK_QUADS) % THREADS == 0u || index < BLOCK_K * CHUNK_QUADS) {
                    let row = index / CHUNK_QUADS;
                    let quad = index % CHUNK_QUADS;
                    let source = min(key_start + row, seq_len - 1u);
                    let value = vec4<f32>(qkv[key_base + source * qkv_stride + chunk + quad]);
                    key_value_tile[((row % 4u) * KEY_QUADS + row / 4u) * CHUNK_STRIDE + quad] = value;
                }
            }
            workgroupBarrier();
            for (var quad = 0u; quad < CHUNK_QUADS; quad += 2u) {
                add_scores_quad(quad);
                add_scores_quad(quad + 1u);
            }
        }
        write_scores(0u, exponent_scale);
        if (SCORE_ROWS > 1u) { write_scores(1u, exponent_scale); }
        if (SCORE_ROWS > 2u) { write_scores(2u, exponent_scale); }
        if (SCORE_ROWS > 3u) { write_scores(3u, exponent_scale); }
        if (SCORE_ROWS > 4u) { write_scores(4u, exponent_scale); }
        if (SCORE_ROWS > 5u) { write_scores(5u, exponent_scale); }
        if (SCORE_ROWS > 6u) { write_scores(6u, exponent_scale); }
        if (SCORE_ROWS > 7u) { write_scores(7u, exponent_scale); }
        workgroupBarrier();

        // P = exp2(S - reference): every thread of a row finds the same maximum and does its part of the row
        var new_reference = vec4<f32>(reference);
        for (var quad = 0u; quad < KEY_QUADS; quad++) {
            let keys = vec4<u32>(key_start + 4u * quad) + vec4<u32>(0u, 1u, 2u, 3u);
            let row_scores = score_tile[quad * SCORE_STRIDE + softmax_row];
            new_reference = max(new_reference, select(row_scores, vec4<f32>(MASKED), keys > vec4<u32>(query)));
        }
        let new_maximum = max(max(new_reference.x, new_reference.y), max(new_reference.z, new_reference.w));
        let shrink = exp2(reference - new_maximum);
        reference = new_maximum;
        if (ROW_THREADS > 1u) {
            workgroupBarrier(); // all parts have read the whole row
        }
        var part_sum = vec4<f32>();
        for (var i = 0u; i < ROW_QUADS; i++) {
            let quad = softmax_part * ROW_QUADS + i;
            let keys = vec4<u32>(key_start + 4u * quad) + vec4<u32>(0u, 1u, 2u, 3u);
            let row_scores = score_tile[quad * SCORE_STRIDE + softmax_row];
            let visible_scores = select(row_scores, vec4<f32>(MASKED), keys > vec4<u32>(query));
            var probabilities = exp2(visible_scores - vec4<f32>(reference));
            part_sum += probabilities;
            if (DROPOUT) {
                let random = philox4x32(
                    vec4<u32>(keys.x / 4u, batch_head * seq_len + query, params.step, params.site),
                    vec2<u32>(params.seed_lo, params.seed_hi),
                );
                let kept = random >= vec4<u32>(params.drop_threshold);
                probabilities = select(vec4<f32>(), probabilities * params.keep_scale, kept);
            }
            score_tile[quad * SCORE_STRIDE + softmax_row] = probabilities;
        }
        sum = sum * shrink + (part_sum.x + part_sum.y) + (part_sum.z + part_sum.w);
        if (softmax_part == 0u) {
            row_shrink[softmax_row] = shrink;
        }

        // out = out * shrink + P V
        for (var chunk = 0u; chunk < BLOCK_K; chunk += KEY_CHUNK) {
            if (chunk > 0u) {
                workgroupBarrier();
            }
            for (var step = 0u; step < (KEY_CHUNK * DIM_QUADS + THREADS - 1u) / THREADS; step++) {
                let index = thread + step * THREADS;
                if ((KEY_CHUNK * DIM_QUADS) % THREADS == 0u || index < KEY_CHUNK * DIM_QUADS) {
                    let key = key_start + chunk + index / DIM_QUADS;
                    let source = min(key, seq_len - 1u);
                    let value = vec4<f32>(qkv[value_base + source * qkv_stride + index % DIM_QUADS]);
                    key_value_tile[index] = value;
                }
            }
            workgroupBarrier();
            if (chunk == 0u) {
                shrink_out(0u);
                if (OUT_ROWS > 1u) { shrink_out(1u); }
                if (OUT_ROWS > 2u) { shrink_out(2u); }
                if (OUT_ROWS > 3u) { shrink_out(3u); }
                if (OUT_ROWS > 4u) { shrink_out(4u); }
                if (OUT_ROWS > 5u) { shrink_out(5u); }
                if (OUT_ROWS > 6u) { shrink_out(6u); }
                if (OUT_ROWS > 7u) { shrink_out(7u); }
            }
            for (var quad = 0u; quad < KEY_CHUNK / 4u; quad += 2u) {
                add_out(chunk / 4u + quad, quad);
                add_out(chunk / 4u + quad + 1u, quad + 1u);
            }
        }
    }

    row_sums[thread] = sum;
    workgroupBarrier();
    if (thread < BLOCK_Q && query < seq_len) {
        var total = 0.0;
        for (var part = 0u; part < ROW_THREADS; part++) {
            total += row_sums[part * BLOCK_Q + thread];
        }
        lse[batch_head * seq_len + query] = reference * LN_2 + log(total);
    }
    let out_base = batch * seq_len * channel_quads + head * DIM_QUADS;
    store_out(0u, query_start, out_base, channel_quads);
    if (OUT_ROWS > 1u) { store_out(1u, query_start, out_base, channel_quads); }
    if (OUT_ROWS > 2u) { store_out(2u, query_start, out_base, channel_quads); }
    if (OUT_ROWS > 3u) { store_out(3u, query_start, out_base, channel_quads); }
    if (OUT_ROWS > 4u) { store_out(4u, query_start, out_base, channel_quads); }
    if (OUT_ROWS > 5u) { store_out(5u, query_start, out_base, channel_quads); }
    if (OUT_ROWS > 6u) { store_out(6u, query_start, out_base, channel_quads); }
    if (OUT_ROWS > 7u) { store_out(7u, query_start, out_base, channel_quads); }
}
