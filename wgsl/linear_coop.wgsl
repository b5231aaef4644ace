// A matrix product with cooperative matrices: edge 16 on NVIDIA's Vulkan, edge 8 on Metal.
//
// One workgroup computes BLOCK_M x BLOCK_N of out over its part of K:
//     for each BLOCK_K of k (in workgroup memory, the next ones in registers):
//         sums += A B                                     matrices; a subgroup owns ROW_TILES x COL_TILES of them
//     the sums pass through the subgroup's scratch, EDGE rows at a time, to the epilogue
// The tiles keep the order of storage; a matrix is loaded by rows or by columns to suit.
//
// Header (beside it philox, gelu, linear_params, linear_quads, _octs or _singles, linear_bias, an epilogue, linear_coop_memory):
//     enable f16 (unless everything is f32); enable wgpu_cooperative_matrix
//     mat_elem            f16, or f32 where the matrices have it: what is multiplied; sums are f32
//     mat_a, mat_b        coop_matNxN<mat_elem, A> and <mat_elem, B>
//     mat_c               coop_matNxN<f32, C>
//     EDGE                N
//     SUBGROUP_SIZE       exact (32)
//     SUBGROUP_ROWS, SUBGROUP_COLS   subgroups of the workgroup over BLOCK_M and BLOCK_N, at least 2 in all
//     BLOCK_M, BLOCK_N    1, 2 or 4 * EDGE a subgroup (rows: 3 too)
//     BLOCK_K             1 to 4 * EDGE; at most 8 packs of A and of B a thread
//     EXTRA_ROWS          rows of the subgroup's matrices that extra is loaded ahead: 0 or 1, before the sums
//     SCRATCH_PAD         floats behind each row of a subgroup's scratch, against bank conflicts
//     A_BY_K, B_BY_N      bool: A is stored (K, M), else (M, K); B is stored (N, K), else (K, N)
//     RAGGED      bool: whether M or N is no multiple of BLOCK_M or BLOCK_N
//     K_RAGGED    bool: whether K is no multiple of BLOCK_K
//     A_SCALED            bool: whether A is multiplied by params.a_scale before it is rounded to mat_elem
//     IS_ONE              bool: whether A is A, and not some times A, when it is multiplied
// Workgroup: THREADS = SUBGROUP_ROWS * SUBGROUP_COLS * SUBGROUP_SIZE.
// Grid: splits * ceil(M / BLOCK_M) * ceil(N / BLOCK_N) workgroups, folded into (x, y) when over 65535.

const THREADS: u32 = SUBGROUP_ROWS * SUBGROUP_COLS * SUBGROUP_SIZE;
const ROW_TILES: u32 = BLOCK_M / SUBGROUP_ROWS / EDGE;
const COL_TILES: u32 = BLOCK_N / SUBGROUP_COLS / EDGE;
// A "pack" is PACK neighbours in storage that move at once, a "quad" four neighbours in a vec4.
const A_ROW_PACKS: u32 = select(BLOCK_K, BLOCK_M, A_BY_K) / PACK; // of a row of the tile as stored
const B_ROW_PACKS: u32 = select(BLOCK_N, BLOCK_K, B_BY_N) / PACK;
const A_STEPS: u32 = BLOCK_M * BLOCK_K / PACK / THREADS; // packs that a thread moves
const B_STEPS: u32 = BLOCK_N * BLOCK_K / PACK / THREADS;
// Pack i of a thread lies so many rows of the tile below its pack i - 1, in the same column.
const A_ROWS_APART: u32 = THREADS / A_ROW_PACKS;
const B_ROWS_APART: u32 = THREADS / B_ROW_PACKS;
const_assert THREADS % A_ROW_PACKS == 0u && THREADS % B_ROW_PACKS == 0u;
// Scratch: 16 columns for each subgroup, one matrix or two of edge 8 side by side.
const SCRATCH_TILES: u32 = 16u / EDGE;
const SCRATCH_COLS: u32 = SCRATCH_TILES * EDGE;
const SCRATCH_STRIDE: u32 = SCRATCH_COLS + SCRATCH_PAD;
const SUBGROUP_SCRATCH: u32 = EDGE * SCRATCH_STRIDE;
const LANE_QUADS: u32 = EDGE * SCRATCH_COLS / 4u / SUBGROUP_SIZE;
const ROW_QUADS: u32 = COL_TILES / SCRATCH_TILES * LANE_QUADS; // a lane's, of a row of matrices
const HELD_ROWS: u32 = EXTRA_ROWS + 1u; // rows whose share of extra is held at a time

// Indices that are constants even where a configuration has fewer
const R1: u32 = min(1u, ROW_TILES - 1u);
const R2: u32 = min(2u, ROW_TILES - 1u);
const R3: u32 = min(3u, ROW_TILES - 1u);
const C1: u32 = min(1u, COL_TILES - 1u);
const C2: u32 = min(2u, COL_TILES - 1u);
const C3: u32 = min(3u, COL_TILES - 1u);

var<workgroup> scratch: array<f32, SUBGROUP_ROWS * SUBGROUP_COLS * SUBGROUP_SCRATCH>;

// What a lane and its subgroup hold. Whatever indexes these arrays is written out as calls: NVIDIA's compiler does not
// unroll nested loops, and an array that it cannot index by constants leaves the registers (measured: six times slower).
var<private> sums: array<mat_c, ROW_TILES * COL_TILES>;
var<private> left: array<mat_a, ROW_TILES>;
var<private> next_a: array<a_pack, A_STEPS>;
var<private> next_b: array<b_pack, B_STEPS>;
var<private> at_a: array<u32, A_STEPS>; // where they were loaded from, for load_a and load_b
var<private> at_b: array<u32, B_STEPS>;
var<private> step_a: u32; // what leads to the next tile
var<private> step_b: u32;
var<private> slot_a: u32; // where the thread's first packs stand in the tiles
var<private> slot_b: u32;
var<private> others: array<vec4<extra_elem>, HELD_ROWS * ROW_QUADS>; // the lane's quads of extra
var<private> tile_row: u32; // the subgroup's place in the block
var<private> tile_col: u32;

// The row of a tile that a thread's first pack is in. Threads write 128 bytes at once; where that is two rows of 32 f16, they lie four
// rows apart, since neighbouring ones meet in the same banks (5 to 9 % of a product's time).
fn row_in(thread: u32, row_packs: u32) -> u32 {
    let row = thread / row_packs;
    return select(row, row / 8u * 8u + row % 8u / 2u + row % 2u * 4u, row_packs * PACK == 32u);
}

// Where pack i of the tile that begins at first_k stands in storage. Rows beyond the matrix repeat its last.
fn index_a(i: u32, place: Place, first_k: u32, thread: u32) -> u32 {
    let row = row_in(thread, A_ROW_PACKS) + i * A_ROWS_APART;
    let col = thread % A_ROW_PACKS * PACK;
    if (A_BY_K) {
        return (row_of_k(first_k + row) * params.a_stride + pack_of_m(place.first_row + col)) / UNIT;
    }
    return (row_of_m(place.first_row + row) * params.a_stride + pack_of_k(first_k + col)) / UNIT;
}

fn index_b(i: u32, place: Place, first_k: u32, thread: u32) -> u32 {
    let row = row_in(thread, B_ROW_PACKS) + i * B_ROWS_APART;
    let col = thread % B_ROW_PACKS * PACK;
    if (B_BY_N) {
        return (row_of_n(place.first_col + row) * params.b_stride + pack_of_k(first_k + col)) / UNIT;
    }
    return (row_of_k(first_k + row) * params.b_stride + pack_of_n(place.first_col + col)) / UNIT;
}

// One pack of the tile of A that begins at first_k -> registers. k beyond the end counts 0 in A, so what it meets in B only has to
// be a number, which the padding of a row need not be. Without an end to mind a pack is found by one addition: worked out from
// its row and column anew, the addresses cost 4 % of a product's time.
fn fetch_a(i: u32, place: Place, first_k: u32, thread: u32) {
    if (!K_RAGGED) {
        at_a[i] += step_a;
        next_a[i] = load_a(at_a[i]);
        return;
    }
    let k = first_k + select(thread % A_ROW_PACKS * PACK, row_in(thread, A_ROW_PACKS) + i * A_ROWS_APART, A_BY_K);
    let inside = max(k, place.end_k) - k;
    next_a[i] = first_of_a(
        load_a(index_a(i, place, first_k, thread)), select(inside, select(0u, PACK, inside > 0u), A_BY_K));
}

fn fetch_b(i: u32, place: Place, first_k: u32, thread: u32) {
    if (!K_RAGGED) {
        at_b[i] += step_b;
        next_b[i] = load_b(at_b[i]);
        return;
    }
    next_b[i] = load_b(index_b(i, place, first_k, thread));
    if (B_BY_N) {
        let k = first_k + thread % B_ROW_PACKS * PACK;
        next_b[i] = first_of_b(next_b[i], max(k, params.k) - k);
    }
}

fn rounded_a(value: vec4<f32>) -> vec4<mat_elem> {
    if (A_SCALED) {
        return vec4<mat_elem>(value * params.a_scale);
    }
    return vec4<mat_elem>(value);
}

fn stage_a(i: u32) {
    let slot = slot_a + i * A_ROWS_APART * A_PITCH;
    store_a(slot, rounded_a(quad_of_a(next_a[i], 0u)));
    if (PACK > 4u) {
        store_a(slot + 4u / SLOT, rounded_a(quad_of_a(next_a[i], 1u)));
    }
}

fn stage_b(i: u32) {
    let slot = slot_b + i * B_ROWS_APART * B_PITCH;
    store_b(slot, vec4<mat_elem>(quad_of_b(next_b[i], 0u)));
    if (PACK > 4u) {
        store_b(slot + 4u / SLOT, vec4<mat_elem>(quad_of_b(next_b[i], 1u)));
    }
}

// The first tile -> registers
fn begin(place: Place, thread: u32) {
    slot_a = row_in(thread, A_ROW_PACKS) * A_PITCH + thread % A_ROW_PACKS * PACK / SLOT;
    slot_b = row_in(thread, B_ROW_PACKS) * B_PITCH + thread % B_ROW_PACKS * PACK / SLOT;
    for (var i = 0u; i < min(4u, A_STEPS); i++) { at_a[i] = index_a(i, place, place.first_k, thread); }
    for (var i = 4u; i < A_STEPS; i++) { at_a[i] = index_a(i, place, place.first_k, thread); }
    for (var i = 0u; i < min(4u, B_STEPS); i++) { at_b[i] = index_b(i, place, place.first_k, thread); }
    for (var i = 4u; i < B_STEPS; i++) { at_b[i] = index_b(i, place, place.first_k, thread); }
    fetch(place, place.first_k, thread);
}

fn fetch(place: Place, first_k: u32, thread: u32) {
    for (var i = 0u; i < min(4u, A_STEPS); i++) { fetch_a(i, place, first_k, thread); }
    for (var i = 4u; i < A_STEPS; i++) { fetch_a(i, place, first_k, thread); }
    for (var i = 0u; i < min(4u, B_STEPS); i++) { fetch_b(i, place, first_k, thread); }
    for (var i = 4u; i < B_STEPS; i++) { fetch_b(i, place, first_k, thread); }
}

fn stage() {
    for (var i = 0u; i < min(4u, A_STEPS); i++) { stage_a(i); }
    for (var i = 4u; i < A_STEPS; i++) { stage_a(i); }
    for (var i = 0u; i < min(4u, B_STEPS); i++) { stage_b(i); }
    for (var i = 4u; i < B_STEPS; i++) { stage_b(i); }
}

fn load_left(i: u32, k: u32) {
    let row = tile_row + i * EDGE;
    if (A_BY_K) {
        left[i] = coopLoad<mat_a>(&tile_a[k * A_PITCH + row / SLOT], A_PITCH);
    } else {
        left[i] = coopLoadT<mat_a>(&tile_a[row * A_PITCH + k / SLOT], A_PITCH);
    }
}

// Column j of the subgroup's matrices += left times one matrix of B
fn multiply_column(j: u32, k: u32) {
    let col = tile_col + j * EDGE;
    var right: mat_b;
    if (B_BY_N) {
        right = coopLoad<mat_b>(&tile_b[col * B_PITCH + k / SLOT], B_PITCH);
    } else {
        right = coopLoadT<mat_b>(&tile_b[k * B_PITCH + col / SLOT], B_PITCH);
    }
    sums[j] = coopMultiplyAdd(left[0], right, sums[j]);
    if (ROW_TILES > 1u) { sums[R1 * COL_TILES + j] = coopMultiplyAdd(left[R1], right, sums[R1 * COL_TILES + j]); }
    if (ROW_TILES > 2u) { sums[R2 * COL_TILES + j] = coopMultiplyAdd(left[R2], right, sums[R2 * COL_TILES + j]); }
    if (ROW_TILES > 3u) { sums[R3 * COL_TILES + j] = coopMultiplyAdd(left[R3], right, sums[R3 * COL_TILES + j]); }
}

fn multiply(k: u32) {
    load_left(0u, k);
    if (ROW_TILES > 1u) { load_left(R1, k); }
    if (ROW_TILES > 2u) { load_left(R2, k); }
    if (ROW_TILES > 3u) { load_left(R3, k); }
    multiply_column(0u, k);
    if (COL_TILES > 1u) { multiply_column(C1, k); }
    if (COL_TILES > 2u) { multiply_column(C2, k); }
    if (COL_TILES > 3u) { multiply_column(C3, k); }
}

fn place_of_other(q: u32, i: u32, j: u32) -> u32 {
    return i % HELD_ROWS * ROW_QUADS + j / SCRATCH_TILES * LANE_QUADS + q;
}

fn fetch_others(i: u32, j: u32, place: Place, lane: u32) {
    for (var q = 0u; q < LANE_QUADS; q++) {
        let quad = lane + q * SUBGROUP_SIZE;
        let row = quad / (SCRATCH_COLS / 4u);
        let col = quad % (SCRATCH_COLS / 4u) * 4u;
        others[place_of_other(q, i, j)] = fetch_extra(
            place.out_row + tile_row + i * EDGE + row, place.first_col + tile_col + j * EDGE + col);
    }
}

fn fetch_row_of_others(i: u32, place: Place, lane: u32) {
    fetch_others(i, 0u, place, lane);
    if (COL_TILES > 1u && SCRATCH_TILES == 1u) { fetch_others(i, C1, place, lane); }
    if (COL_TILES > 2u) { fetch_others(i, C2, place, lane); }
    if (COL_TILES > 3u && SCRATCH_TILES == 1u) { fetch_others(i, C3, place, lane); }
}

// SCRATCH_TILES matrices side by side -> the epilogue
fn finish_tiles(i: u32, j: u32, place: Place, subgroup: u32, lane: u32) {
    let base = subgroup * SUBGROUP_SCRATCH;
    let stride = SCRATCH_STRIDE;
    coopStoreT(sums[i * COL_TILES + j], &scratch[base], stride);
    if (SCRATCH_TILES > 1u) {
        let second = base + EDGE;
        coopStoreT(sums[i * COL_TILES + j + C1], &scratch[second], stride);
    }
    workgroupBarrier();
    for (var q = 0u; q < LANE_QUADS; q++) {
        let quad = lane + q * SUBGROUP_SIZE;
        let row = quad / (SCRATCH_COLS / 4u);
        let col = quad % (SCRATCH_COLS / 4u) * 4u;
        let at = base + row * SCRATCH_STRIDE + col;
        finish(
            place.out_row + tile_row + i * EDGE + row,
            place.first_col + tile_col + j * EDGE + col,
            place.split,
            vec4<f32>(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]),
            others[place_of_other(q, i, j)],
        );
    }
    workgroupBarrier();
}

fn finish_row_of_tiles(i: u32, place: Place, subgroup: u32, lane: u32) {
    if (i + EXTRA_ROWS < ROW_TILES) { fetch_row_of_others(i + EXTRA_ROWS, place, lane); }
    finish_tiles(i, 0u, place, subgroup, lane);
    if (COL_TILES > 1u && SCRATCH_TILES == 1u) { finish_tiles(i, C1, place, subgroup, lane); }
    if (COL_TILES > 2u) { finish_tiles(i, C2, place, subgroup, lane); }
    if (COL_TILES > 3u && SCRATCH_TILES == 1u) { finish_tiles(i, C3, place, subgroup, lane); }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let place = place_of(group.y * groups.x + group.x);
    if (place.out_row >= params.m) {
        return;
    }
    let subgroup = thread / SUBGROUP_SIZE;
    let lane = thread % SUBGROUP_SIZE;
    tile_row = subgroup / SUBGROUP_COLS * ROW_TILES * EDGE;
    tile_col = subgroup % SUBGROUP_COLS * COL_TILES * EDGE;

    if (EXTRA_ROWS > 0u) { fetch_row_of_others(0u, place, lane); }
    begin(place, thread);
    // Behind the last tile the first is fetched again, rather than branch.
    let along_a = select(BLOCK_K, BLOCK_K * params.a_stride, A_BY_K) / UNIT;
    let along_b = select(BLOCK_K * params.b_stride, BLOCK_K, B_BY_N) / UNIT;
    let tiles = (place.end_k - place.first_k) / BLOCK_K;
    for (var first_k = place.first_k; first_k < place.end_k; first_k += BLOCK_K) {
        let is_last = first_k + BLOCK_K >= place.end_k;
        step_a = select(along_a, along_a * (1u - tiles), is_last);
        step_b = select(along_b, along_b * (1u - tiles), is_last);
        workgroupBarrier();
        stage();
        workgroupBarrier();
        fetch(place, select(first_k + BLOCK_K, place.first_k, is_last), thread);
        // Written out: the compiler does not unroll a loop in a loop, and its loads would wait for its products (8 %).
        multiply(0u);
        if (BLOCK_K > EDGE) { multiply(EDGE); }
        if (BLOCK_K > 2u * EDGE) { multiply(2u * EDGE); }
        if (BLOCK_K > 3u * EDGE) { multiply(3u * EDGE); }
    }

    finish_row_of_tiles(0u, place, subgroup, lane);
    if (ROW_TILES > 1u) { finish_row_of_tiles(R1, place, subgroup, lane); }
    if (ROW_TILES > 2u) { finish_row_of_tiles(R2, place, subgroup, lane); }
    if (ROW_TILES > 3u) { finish_row_of_tiles(R3, place, subgroup, lane); }
}
