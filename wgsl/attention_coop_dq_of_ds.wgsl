// Causal attention, backward, dQ out of the dS' that dK/dV kept (attention_coop_kept.wgsl, which is prepended), with cooperative matrices: edge
// 16 on NVIDIA's Vulkan, edge 8 on Metal. One product where attention_coop_dq.wgsl, which gets nothing, makes three.
//
// One workgroup computes the gradient of BLOCK_Q = SUBGROUPS * ROW_BLOCKS * EDGE queries of one head, all D columns. A subgroup owns ROW_BLOCKS
// blocks of EDGE queries:
//     sums = 0
//     for each tile of BLOCK_K keys up to the last of the queries (K in workgroup memory, the next in registers):
//         sums += dS K                                         matrices; those of dS come straight from storage, read by columns
//     dQ = sums * scale, through the subgroup's scratch, EDGE columns at a time
// Workgroups of the longest rows are launched first.
//
// Header:
//     enable f16 (unless both types are f32); enable wgpu_cooperative_matrix
//     elem           f32 or f16, the type of qkv and dqkv
//     mat_elem       f16, or f32 where the matrices have it: what is multiplied; sums are f32
//     mat_a, mat_b   coop_matNxN<mat_elem, A> and <mat_elem, B>
//     mat_c          coop_matNxN<f32, C>
//     EDGE           N
//     SUBGROUP_SIZE  exact (32), a multiple of EDGE
//     HEAD_DIM       D, a multiple of 16, at most 16 * EDGE
//     SUBGROUPS      of the workgroup, at least 2
//     ROW_BLOCKS     row blocks of a subgroup, 1 or 2
//     BLOCK_K        keys of a tile, 1 to 4 * EDGE
//     KEPT           1, the binding of kept
// Workgroup: SUBGROUPS * SUBGROUP_SIZE threads.
// Grid: head_count * ceil(seq_len / BLOCK_Q) workgroups, folded into (x, y) when over 65535.
//
// Bindings: 0 qkv (B, T, 3C) elem; 1 kept; 2 dqkv (B, T, 3C) elem, its q third is written; 3 params.

struct Params {
    head_count: u32, // of the batch * heads, those of this launch ...
    heads: u32,
    seq_len: u32,
    first_head: u32, // ... from this one on
    seed_lo: u32,    // unused, as all that follows but the last
    seed_hi: u32,
    step: u32,
    site: u32,
    drop_threshold: u32,
    keep_scale: f32,
    gradient_scale: f32,
    result_scale: f32, // what dqkv is multiplied by: the inverse of dS's factor, or 1 where it keeps the factor
}

@group(0) @binding(0) var<storage, read_write> qkv: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> dqkv: array<vec4<elem>>;
@group(0) @binding(3) var<uniform> params: Params;

const THREADS: u32 = SUBGROUPS * SUBGROUP_SIZE;
const BLOCK_Q: u32 = SUBGROUPS * ROW_BLOCKS * EDGE;
const HEAD_TILES: u32 = HEAD_DIM / EDGE;
// A "quad" is four neighbours that move as one vec4.
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const STAGE_QUADS: u32 = BLOCK_K * DIM_QUADS;
const STAGE_STEPS: u32 = (STAGE_QUADS + THREADS - 1u) / THREADS;
const TILE_STRIDE: u32 = HEAD_DIM + 8u; // 8 elements of padding against bank conflicts
const SCRATCH_STRIDE: u32 = EDGE + 4u;
const SUBGROUP_SCRATCH: u32 = EDGE * SCRATCH_STRIDE;
const LANES_PER_ROW: u32 = SUBGROUP_SIZE / EDGE;
const LANE_QUADS: u32 = max(EDGE / 4u / LANES_PER_ROW, 1u); // of a row of a matrix
const KEY_TILES: u32 = BLOCK_K / EDGE;
// Indices that are constants even where a configuration has fewer
const LAST_BLOCK: u32 = ROW_BLOCKS - 1u;
const K1: u32 = min(1u, KEY_TILES - 1u);
const K2: u32 = min(2u, KEY_TILES - 1u);
const K3: u32 = min(3u, KEY_TILES - 1u);

// Single elements: Metal's simdgroup_load wants a pointer to the matrix's element type.
var<workgroup> keys: array<mat_elem, BLOCK_K * TILE_STRIDE>;
var<workgroup> scratch: array<f32, SUBGROUPS * SUBGROUP_SCRATCH>;

// What a lane and its subgroup hold. Every loop over these arrays is at most four steps long or written out as calls: NVIDIA's compiler does
// not unroll longer ones, and an array that it cannot index by constants leaves the registers.
var<private> sums: array<mat_c, ROW_BLOCKS * HEAD_TILES>; // dQ
var<private> score_gradients: array<mat_a, KEY_TILES * ROW_BLOCKS>;
var<private> next_keys: array<vec4<elem>, STAGE_STEPS>;

// The tile of K that begins at first_key -> registers. The last row stands in for those beyond the end, which meet zeros.
fn fetch_step(i: u32, key_base: u32, qkv_stride: u32, first_key: u32, thread: u32) {
    let index = thread + i * THREADS;
    let key = min(first_key + index / DIM_QUADS, params.seq_len - 1u);
    next_keys[i] = qkv[key_base + key * qkv_stride + index % DIM_QUADS];
}

fn fetch_tile(key_base: u32, qkv_stride: u32, first_key: u32, thread: u32) {
    for (var i = 0u; i < min(4u, STAGE_STEPS); i++) { fetch_step(i, key_base, qkv_stride, first_key, thread); }
    for (var i = 4u; i < STAGE_STEPS; i++) { fetch_step(i, key_base, qkv_stride, first_key, thread); }
}

fn stage_step(i: u32, thread: u32) {
    let index = thread + i * THREADS;
    if (STAGE_QUADS % THREADS == 0u || index < STAGE_QUADS) {
        let place = index / DIM_QUADS * TILE_STRIDE + index % DIM_QUADS * 4u;
        keys[place] = mat_elem(next_keys[i].x);
        keys[place + 1u] = mat_elem(next_keys[i].y);
        keys[place + 2u] = mat_elem(next_keys[i].z);
        keys[place + 3u] = mat_elem(next_keys[i].w);
    }
}

// Registers -> workgroup memory
fn stage_tile(thread: u32) {
    for (var i = 0u; i < min(4u, STAGE_STEPS); i++) { stage_step(i, thread); }
    for (var i = 4u; i < STAGE_STEPS; i++) { stage_step(i, thread); }
}

// Matrix j of the tile's keys for one row block of queries. Nobody wrote those above the diagonal: the one on it is loaded, since loads must
// not branch, and dropped.
fn load_score_gradients(j: u32, block: u32, launch_head: u32, key_tile: u32, query_tile: u32) {
    let query = min(query_tile, kept_row_tiles() - 1u);
    let at = kept_at(launch_head, min(key_tile + j, query), query);
    let edge = EDGE;
    score_gradients[j * ROW_BLOCKS + block] = coopLoad<mat_a>(&kept[at], edge);
    if (key_tile + j > query) {
        score_gradients[j * ROW_BLOCKS + block] = mat_a();
    }
}

// The tile's matrices of one row block
fn load_all_score_gradients(block: u32, launch_head: u32, key_tile: u32, query_tile: u32) {
    load_score_gradients(0u, block, launch_head, key_tile, query_tile);
    if (KEY_TILES > 1u) { load_score_gradients(K1, block, launch_head, key_tile, query_tile); }
    if (KEY_TILES > 2u) { load_score_gradients(K2, block, launch_head, key_tile, query_tile); }
    if (KEY_TILES > 3u) { load_score_gradients(K3, block, launch_head, key_tile, query_tile); }
}

// sums += dS K over matrix j of the tile's keys
fn add_dq(j: u32) {
    for (var d = 0u; d < HEAD_TILES; d++) {
        let place = j * EDGE * TILE_STRIDE + d * EDGE;
        let columns = coopLoadT<mat_b>(&keys[place], TILE_STRIDE);
        sums[d] = coopMultiplyAdd(score_gradients[j * ROW_BLOCKS], columns, sums[d]);
        if (ROW_BLOCKS > 1u) {
            sums[LAST_BLOCK * HEAD_TILES + d] = coopMultiplyAdd(
                score_gradients[j * ROW_BLOCKS + LAST_BLOCK], columns, sums[LAST_BLOCK * HEAD_TILES + d]);
        }
    }
}

// One matrix of sums -> dQ; the row of the lane is at row_base.
fn store_tile(block: u32, d: u32, row_base: u32, inside: bool, subgroup_scratch: u32, lane: u32, factor: f32) {
    workgroupBarrier();
    let stride = SCRATCH_STRIDE;
    coopStoreT(sums[block * HEAD_TILES + d], &scratch[subgroup_scratch], stride);
    workgroupBarrier();
    for (var i = 0u; i < LANE_QUADS; i++) {
        let quad = lane % LANES_PER_ROW + i * LANES_PER_ROW;
        if (inside && quad < EDGE / 4u) {
            let at = subgroup_scratch + lane / LANES_PER_ROW * SCRATCH_STRIDE + quad * 4u;
            let sum = vec4<f32>(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
            dqkv[row_base + d * (EDGE / 4u) + quad] = vec4<elem>(sum * factor);
        }
    }
}

fn store_block(block: u32, row_base: u32, inside: bool, subgroup_scratch: u32, lane: u32, factor: f32) {
    store_tile(block, 0u, row_base, inside, subgroup_scratch, lane, factor);
    if (HEAD_TILES > 1u) { store_tile(block, 1u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 2u) { store_tile(block, 2u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 3u) { store_tile(block, 3u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 4u) { store_tile(block, 4u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 5u) { store_tile(block, 5u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 6u) { store_tile(block, 6u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 7u) { store_tile(block, 7u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 8u) { store_tile(block, 8u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 9u) { store_tile(block, 9u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 10u) { store_tile(block, 10u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 11u) { store_tile(block, 11u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 12u) { store_tile(block, 12u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 13u) { store_tile(block, 13u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 14u) { store_tile(block, 14u, row_base, inside, subgroup_scratch, lane, factor); }
    if (HEAD_TILES > 15u) { store_tile(block, 15u, row_base, inside, subgroup_scratch, lane, factor); }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let seq_len = params.seq_len;
    let head_count = params.head_count;
    let query_tiles = (seq_len + BLOCK_Q - 1u) / BLOCK_Q;
    let tile = workgroup.y * grid.x + workgroup.x;
    if (tile >= head_count * query_tiles) {
        return;
    }
    let query_start = (query_tiles - 1u - tile / head_count) * BLOCK_Q; // the longest rows first
    let launch_head = tile % head_count;
    let batch_head = params.first_head + launch_head;
    let channel_quads = params.heads * DIM_QUADS;                       // C / 4
    let qkv_stride = 3u * channel_quads;                                // quads of one token of qkv
    let query_base = batch_head / params.heads * seq_len * qkv_stride + batch_head % params.heads * DIM_QUADS;
    let key_base = query_base + channel_quads;
    let subgroup = thread / SUBGROUP_SIZE;
    let lane = thread % SUBGROUP_SIZE;
    let subgroup_row = subgroup * (ROW_BLOCKS * EDGE);

    let query_tile = (query_start + subgroup_row) / EDGE;

    fetch_tile(key_base, qkv_stride, 0u, thread);
    let key_end = min(query_start + BLOCK_Q, seq_len);
    for (var key_start = 0u; key_start < key_end; key_start += BLOCK_K) {
        workgroupBarrier(); // the last tile's readers are done
        stage_tile(thread);
        load_all_score_gradients(0u, launch_head, key_start / EDGE, query_tile);
        if (ROW_BLOCKS > 1u) { load_all_score_gradients(LAST_BLOCK, launch_head, key_start / EDGE, query_tile + 1u); }
        workgroupBarrier();
        fetch_tile(key_base, qkv_stride, key_start + BLOCK_K, thread);
        add_dq(0u);
        if (KEY_TILES > 1u) { add_dq(K1); }
        if (KEY_TILES > 2u) { add_dq(K2); }
        if (KEY_TILES > 3u) { add_dq(K3); }
    }

    let factor = params.result_scale / sqrt(f32(HEAD_DIM));
    let query = query_start + subgroup_row + lane / LANES_PER_ROW; // this lane's, in row block 0
    let subgroup_scratch = subgroup * SUBGROUP_SCRATCH;
    store_block(0u, query_base + query * qkv_stride, query < seq_len, subgroup_scratch, lane, factor);
    if (ROW_BLOCKS > 1u) {
        store_block(
            LAST_BLOCK, query_base + (query + EDGE) * qkv_stride, query + EDGE < seq_len, subgroup_scratch, lane, factor);
    }
}
