// Causal attention, forward, without subgroups, f16 arithmetic or cooperative matrices: it runs everywhere.
//
// One workgroup computes OWN queries of one head, all D columns, and their log-sum-exp:
//     sums = 0, reference = -1e30, total = 0                                       (a row each)
//     for each tile of OTHER keys up to the diagonal:
//         scores = Q K^T * scale                  CHUNK dimensions of Q and K at a time
//         new = max(reference, rowmax(scores)); shrink = exp2(reference - new); reference = new
//         P = exp2(scores - reference); total = total * shrink + rowsum(P)
//         sums = sums * shrink + dropout(P) V     CHUNK keys of P and V at a time
//     out = sums / total; lse = reference + log(total)
// The threads of a row tell each other their columns' maxima where the tiles lie. Workgroups of the longest rows are launched
// first; tiles above the diagonal are never visited, and threads whose rows all lie above one skip its products.
//
// Header: as attention_scalar_products.wgsl, which is prepended, says.
// Grid: batch * heads * ceil(seq_len / OWN) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 out (B, T, C) elem, written; 2 lse (B, H, T) f32, written; 3 clock (4) u32; 4 params.

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
@group(0) @binding(1) var<storage, read_write> out: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> clock: array<u32>;
@group(0) @binding(4) var<uniform> params: Params;

var<private> drop_step: u32; // the counter of the masks

const LN_2: f32 = 0.6931471805599453;

var<private> scores: Scores; // then P, then dropout(P)
var<private> sums: Sums;
var<private> reference: array<vec4<f32>, ROW_QUADS>; // in units of log 2
var<private> total: array<vec4<f32>, ROW_QUADS>;     // of the thread's columns

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

// The maximum of four columns for quad h of the thread's rows
fn maximum_of_quad(j: u32, h: u32) -> vec4<f32> {
    let at = 4u * ROW_QUADS * j + h;
    return max(max(scores[at], scores[at + ROW_QUADS]), max(scores[at + 2u * ROW_QUADS], scores[at + 3u * ROW_QUADS]));
}

fn maximum(h: u32) -> vec4<f32> {
    return max(maximum_of_quad(0u, h), maximum_of_quad(LAST_SCORE_QUAD, h));
}

// What the threads of a row tell each other about it, where the tiles lie: a vec4 for each quad of rows from each of them
fn tell(h: u32, value: vec4<f32>) {
    tiles[thread_col * OWN_QUADS + ((thread_row + h * ROW_THREADS) ^ (thread_col % 8u))] = value;
}

fn told(h: u32, col: u32) -> vec4<f32> {
    return tiles[col * OWN_QUADS + ((thread_row + h * ROW_THREADS) ^ (col % 8u))];
}

// A new reference for quad h of the thread's rows
fn rescale(h: u32) {
    var new_reference = reference[h];
    for (var col = 0u; col < COL_THREADS; col++) {
        new_reference = max(new_reference, told(h, col));
    }
    let shrink = exp2(reference[h] - new_reference);
    reference[h] = new_reference;
    total[h] *= shrink;
    for (var c = 0u; c < OUT_QUADS; c++) {
        sums[OUT_QUADS * (4u * h) + c] *= shrink.x;
        sums[OUT_QUADS * (4u * h + 1u) + c] *= shrink.y;
        sums[OUT_QUADS * (4u * h + 2u) + c] *= shrink.z;
        sums[OUT_QUADS * (4u * h + 3u) + c] *= shrink.w;
    }
}

fn kept(probabilities: vec4<f32>, random: vec4<u32>) -> vec4<f32> {
    return select(vec4<f32>(), probabilities * params.keep_scale, random >= vec4<u32>(params.drop_threshold));
}

// P of four columns, and what they add to the totals of quad h of the rows, which begins at `row` of (B, H, T); then dropout
fn probabilities(j: u32, h: u32, key_quad: u32, row: u32, scale: f32) {
    let at = 4u * ROW_QUADS * j + h;
    let p0 = exp2(scores[at] * scale - reference[h]);
    let p1 = exp2(scores[at + ROW_QUADS] * scale - reference[h]);
    let p2 = exp2(scores[at + 2u * ROW_QUADS] * scale - reference[h]);
    let p3 = exp2(scores[at + 3u * ROW_QUADS] * scale - reference[h]);
    total[h] += (p0 + p1) + (p2 + p3);
    scores[at] = p0;
    scores[at + ROW_QUADS] = p1;
    scores[at + 2u * ROW_QUADS] = p2;
    scores[at + 3u * ROW_QUADS] = p3;
    if (DROPOUT) {
        let seed = vec2<u32>(params.seed_lo, params.seed_hi);
        let r0 = philox4x32(vec4<u32>(key_quad, row, drop_step, params.site), seed);
        let r1 = philox4x32(vec4<u32>(key_quad, row + 1u, drop_step, params.site), seed);
        let r2 = philox4x32(vec4<u32>(key_quad, row + 2u, drop_step, params.site), seed);
        let r3 = philox4x32(vec4<u32>(key_quad, row + 3u, drop_step, params.site), seed);
        scores[at] = kept(p0, vec4<u32>(r0.x, r1.x, r2.x, r3.x));
        scores[at + ROW_QUADS] = kept(p1, vec4<u32>(r0.y, r1.y, r2.y, r3.y));
        scores[at + 2u * ROW_QUADS] = kept(p2, vec4<u32>(r0.z, r1.z, r2.z, r3.z));
        scores[at + 3u * ROW_QUADS] = kept(p3, vec4<u32>(r0.w, r1.w, r2.w, r3.w));
    }
}

fn store_row(i: u32, query: u32, out_base: u32, channel_quads: u32, sum: f32) {
    if (query < params.seq_len) {
        for (var c = 0u; c < OUT_QUADS; c++) {
            let at = out_base + query * channel_quads + thread_col + c * COL_THREADS;
            out[at] = vec4<elem>(sums[OUT_QUADS * i + c] / sum);
        }
    }
}

fn store_lse(query: u32, row_base: u32, value: f32) {
    if (thread_col == 0u && query < params.seq_len) {
        lse[row_base + query] = value;
    }
}

fn store_quad(h: u32, query: u32, out_base: u32, channel_quads: u32, row_base: u32) {
    var sum = vec4<f32>();
    for (var col = 0u; col < COL_THREADS; col++) {
        sum += told(h, col);
    }
    store_row(4u * h, query, out_base, channel_quads, sum.x);
    store_row(4u * h + 1u, query + 1u, out_base, channel_quads, sum.y);
    store_row(4u * h + 2u, query + 2u, out_base, channel_quads, sum.z);
    store_row(4u * h + 3u, query + 3u, out_base, channel_quads, sum.w);
    let values = reference[h] * LN_2 + log(sum);
    store_lse(query, row_base, values.x);
    store_lse(query + 1u, row_base, values.y);
    store_lse(query + 2u, row_base, values.z);
    store_lse(query + 3u, row_base, values.w);
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
    let row_base = batch_head * seq_len;
    let scale = LOG2_E / sqrt(f32(HEAD_DIM));

    thread = local;
    thread_row = thread / COL_THREADS;
    thread_col = thread % COL_THREADS;
    let query_0 = query_start + 4u * own_quad(0u);
    let query_1 = query_start + 4u * own_quad(LAST_ROW_QUAD);
    let last_query = query_start + first_neighbour() + 4u * ROW_QUADS * NEIGHBOURS - 1u;
    let queries = Rows(query_base, qkv_stride, query_start);

    for (var h = 0u; h < ROW_QUADS; h++) { reference[h] = vec4<f32>(MASKED); }
    let key_end = min(query_start + OWN, seq_len);
    for (var key_start = 0u; key_start < key_end; key_start += OTHER) {
        let visible = key_start <= last_query; // to one of the neighbours

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
        if (key_start + OTHER > query_start + 1u) { // on the diagonal
            mask_quad(0u, key_start, query_start);
            if (SCORE_QUADS > 1u) { mask_quad(LAST_SCORE_QUAD, key_start, query_start); }
        }

        // P = exp2(scores - reference)
        workgroupBarrier();
        tell(0u, maximum(0u) * scale);
        if (ROW_QUADS > 1u) { tell(LAST_ROW_QUAD, maximum(LAST_ROW_QUAD) * scale); }
        workgroupBarrier();
        if (visible) {
            rescale(0u);
            if (ROW_QUADS > 1u) { rescale(LAST_ROW_QUAD); }
            let key_quad = key_start / 4u + thread_col;
            probabilities(0u, 0u, key_quad, row_base + query_0, scale);
            if (ROW_QUADS > 1u) { probabilities(0u, LAST_ROW_QUAD, key_quad, row_base + query_1, scale); }
            if (SCORE_QUADS > 1u) {
                probabilities(LAST_SCORE_QUAD, 0u, key_quad + COL_THREADS, row_base + query_0, scale);
                if (ROW_QUADS > 1u) {
                    probabilities(LAST_SCORE_QUAD, LAST_ROW_QUAD, key_quad + COL_THREADS, row_base + query_1, scale);
                }
            }
        }

        // sums += dropout(P) V
        fetch_rows(Rows(value_base, qkv_stride, key_start));
        for (var chunk = 0u; chunk < OTHER / CHUNK; chunk++) {
            let first_key = key_start + chunk * CHUNK;
            workgroupBarrier();
            if (visible) { stage_weights(&scores, chunk); }
            stage_rows();
            workgroupBarrier();
            fetch_rows(Rows(value_base, qkv_stride, min(first_key + CHUNK, key_start + OTHER - CHUNK)));
            if (first_key <= last_query) { add_rows(&sums); }
        }
    }

    workgroupBarrier();
    tell(0u, total[0]);
    if (ROW_QUADS > 1u) { tell(LAST_ROW_QUAD, total[LAST_ROW_QUAD]); }
    workgroupBarrier();
    let out_base = batch * seq_len * channel_quads + head * DIM_QUADS;
    store_quad(0u, query_0, out_base, channel_quads, row_base);
    if (ROW_QUADS > 1u) { store_quad(LAST_ROW_QUAD, query_1, out_base, channel_quads, row_base); }
}
