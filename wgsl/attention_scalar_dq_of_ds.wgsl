// Causal attention, backward, dQ out of the dS' that dK/dV kept (attention_scalar_kept.wgsl), without subgroups, f16 arithmetic or cooperative
// matrices. One product where attention_scalar_dq.wgsl, which gets nothing, makes three.
//
// One workgroup computes the gradients of OWN queries of one head, all D columns:
//     sums = 0
//     for each CHUNK of keys up to the last of the queries:
//         sums += dS K                                       dS' has a row for each key: it lies in the left tile as it is stored
//     dQ = sums * scale
// The next chunk is in registers meanwhile. Workgroups of the longest rows are launched first.
//
// Header: as attention_scalar_products.wgsl and attention_scalar_kept.wgsl, which are prepended as attention_scalar_store_dq.wgsl is, say;
//         DROPOUT and SCORE_QUADS make no difference.
// Grid: head_count * ceil(seq_len / OWN) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 kept; 2 dqkv (B, T, 3C) elem, its q third is written; 3 params.

struct Params {
    head_count: u32, // of the batch * heads, those of this launch ...
    heads: u32,
    seq_len: u32,
    first_head: u32, // ... from this one on
    seed_lo: u32,    // unused, as all that follows
    seed_hi: u32,
    step: u32,
    site: u32,
    drop_threshold: u32,
    keep_scale: f32,
    gradient_scale: f32,
    result_scale: f32,
}

@group(0) @binding(0) var<storage, read_write> qkv: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> dqkv: array<vec4<elem>>;
@group(0) @binding(3) var<uniform> params: Params;

const LEFT_QUADS: u32 = CHUNK * OWN_QUADS;
const LEFT_STEPS: u32 = (LEFT_QUADS + THREADS - 1u) / THREADS;
var<private> next_left: array<vec4<f32>, LEFT_STEPS>;
var<private> sums: Sums;

// CHUNK rows of dS' at the own queries -> registers. Quads above the diagonal, most of which nobody wrote, are zeros.
fn fetch_left(launch_head: u32, first_key: u32, query_start: u32) {
    for (var i = 0u; i < LEFT_STEPS; i++) {
        let index = thread + i * THREADS;
        let key = first_key + index / OWN_QUADS;
        let quad = query_start / 4u + index % OWN_QUADS;
        let last = params.seq_len - 1u;
        let at = kept_at(launch_head, min(key, last), min(quad, kept_row_quads() - 1u));
        next_left[i] = select(vec4<f32>(), kept[at], key <= min(4u * quad + 3u, last));
    }
}

// Registers -> the left tile
fn stage_left() {
    for (var i = 0u; i < LEFT_STEPS; i++) {
        let index = thread + i * THREADS;
        let k = index / OWN_QUADS;
        if (LEFT_STEPS * THREADS == LEFT_QUADS || index < LEFT_QUADS) {
            tiles[k * OWN_QUADS + ((index % OWN_QUADS) ^ shuffle(k))] = next_left[i];
        }
    }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let seq_len = params.seq_len;
    let head_count = params.head_count;
    let query_tiles = (seq_len + OWN - 1u) / OWN;
    let tile = workgroup.y * grid.x + workgroup.x;
    if (tile >= head_count * query_tiles) {
        return;
    }
    let query_start = (query_tiles - 1u - tile / head_count) * OWN; // the longest rows first
    let launch_head = tile % head_count;
    let batch_head = params.first_head + launch_head;
    let channel_quads = params.heads * DIM_QUADS;                   // C / 4
    let qkv_stride = 3u * channel_quads;                            // quads of one token of qkv
    let query_base = batch_head / params.heads * seq_len * qkv_stride + batch_head % params.heads * DIM_QUADS;
    let key_base = query_base + channel_quads;

    thread = local;
    thread_row = thread / COL_THREADS;
    thread_col = thread % COL_THREADS;
    let key_end = min(query_start + OWN, seq_len);
    fetch_left(launch_head, 0u, query_start);
    fetch_rows(Rows(key_base, qkv_stride, 0u));
    for (var key_start = 0u; key_start < key_end; key_start += CHUNK) {
        workgroupBarrier();
        stage_left();
        stage_rows();
        workgroupBarrier();
        let next = min(key_start + CHUNK, key_end - 1u); // the last step fetches something again rather than branch
        fetch_left(launch_head, next, query_start);
        fetch_rows(Rows(key_base, qkv_stride, next));
        add_rows(&sums);
    }

    // A quad of rows lies at its own number in the left tile: here no two quads are neighbours.
    let scale = 1.0 / sqrt(f32(HEAD_DIM));
    let query = query_start + 4u * thread_row;
    store_quad(0u, query, query_base, qkv_stride, scale);
    if (ROW_QUADS > 1u) { store_quad(LAST_ROW_QUAD, query + 4u * ROW_THREADS, query_base, qkv_stride, scale); }
}
