// A matrix product in f32, without subgroups or cooperative matrices: it runs everywhere.
//
// One workgroup computes BLOCK_M x BLOCK_N of out over its part of K; a thread ROWS rows of COL_QUADS quads of columns:
//     for each BLOCK_K of k (in workgroup memory, the next ones in registers):
//         for each quad of k:
//             sums += A B               four outer products, everything in registers
//     the sums pass to the epilogue
// The tiles keep the order of storage. Where k runs along a row, a thread reads four k at once; where it runs down, it
// reads four rows of A or columns of B at once and turns them by hand.
//
// Header (beside it linear_params, linear_quads or _singles, linear_bias or _no_bias, an epilogue):
//     THREAD_ROWS, THREAD_COLS   threads of the workgroup over BLOCK_M and BLOCK_N
//     BLOCK_M     4 or 8 * THREAD_ROWS
//     BLOCK_N     4 or 8 * THREAD_COLS
//     BLOCK_K     16 or 32; BLOCK_K / 4 divides THREAD_ROWS and THREAD_COLS; at most 8 quads of A and of B a thread
//     A_BY_K, B_BY_N   bool: A is stored (K, M), else (M, K); B is stored (N, K), else (K, N)
//     RAGGED      bool: whether M or N is no multiple of BLOCK_M or BLOCK_N
//     K_RAGGED    bool: whether K is no multiple of BLOCK_K
// Workgroup: THREADS = THREAD_ROWS * THREAD_COLS.
// Grid: splits * ceil(M / BLOCK_M) * ceil(N / BLOCK_N) workgroups, folded into (x, y) when over 65535.

const THREADS: u32 = THREAD_ROWS * THREAD_COLS;
const ROWS: u32 = BLOCK_M / THREAD_ROWS;
const COL_QUADS: u32 = BLOCK_N / THREAD_COLS / 4u;
// A "quad" is four neighbours that move as one vec4.
const A_ROW_QUADS: u32 = select(BLOCK_K, BLOCK_M, A_BY_K) / 4u; // of a row of the tile as stored
const B_ROW_QUADS: u32 = select(BLOCK_N, BLOCK_K, B_BY_N) / 4u;
const A_STEPS: u32 = BLOCK_M * BLOCK_K / 4u / THREADS;
const B_STEPS: u32 = BLOCK_N * BLOCK_K / 4u / THREADS;
const N_QUADS: u32 = BLOCK_N / 4u;

// Indices that are constants even where a configuration has fewer
const R4: u32 = min(4u, ROWS - 1u);
const R5: u32 = min(5u, ROWS - 1u);
const R6: u32 = min(6u, ROWS - 1u);
const R7: u32 = min(7u, ROWS - 1u);

var<workgroup> tile_a: array<vec4<f32>, select(BLOCK_M, BLOCK_K, A_BY_K) * A_ROW_QUADS>;
// Stored (N, K), columns lie permuted: column 4 q + j at row j * N_QUADS + q. Neighbouring threads own neighbouring quads
// of columns and still read neighbouring rows.
var<workgroup> tile_b: array<vec4<f32>, select(BLOCK_K, BLOCK_N, B_BY_N) * B_ROW_QUADS>;

// What a thread holds. Loops over these arrays are at most four steps long and short of text, or written out as calls:
// NVIDIA's compiler does not unroll others, and an array that it cannot index by constants leaves the registers (measured:
// four times slower, for a loop around the epilogue with dropout alone).
var<private> sums: array<vec4<f32>, ROWS * COL_QUADS>;
var<private> next_a: array<vec4<f32>, A_STEPS>;
var<private> next_b: array<vec4<f32>, B_STEPS>;
var<private> right: array<vec4<f32>, 4u * COL_QUADS>; // of four k, the thread's quads of B

// Where a quad of k lies in its row of a tile: shuffled by the row, so that threads on neighbouring rows read without bank
// conflicts, in no more memory than the quads need (Metal has 32 KiB, and this fills them).
fn place_in_row(quad: u32, row: u32) -> u32 {
    return quad ^ (row % (BLOCK_K / 4u));
}

// One quad of the tile of A that begins at first_k -> registers. Rows beyond the matrix repeat its last; k beyond the end
// counts 0 in A, so what it meets in B only has to be a number, which the padding of a row need not be.
fn fetch_a(i: u32, place: Place, first_k: u32, thread: u32) {
    let index = thread + i * THREADS;
    let row = index / A_ROW_QUADS;
    let col = index % A_ROW_QUADS * 4u;
    if (A_BY_K) {
        let k = first_k + row;
        var pack = load_a(row_of_k(k) * params.a_stride + pack_of_m(place.first_row + col));
        if (K_RAGGED) {
            pack = first_of_a(pack, select(0u, PACK, k < place.end_k));
        }
        next_a[i] = quad_of_a(pack, 0u);
    } else {
        let k = first_k + col;
        var pack = load_a(row_of_m(place.first_row + row) * params.a_stride + pack_of_k(k));
        if (K_RAGGED) {
            pack = first_of_a(pack, max(k, place.end_k) - k);
        }
        next_a[i] = quad_of_a(pack, 0u);
    }
}

fn fetch_b(i: u32, place: Place, first_k: u32, thread: u32) {
    let index = thread + i * THREADS;
    let row = index / B_ROW_QUADS;
    let col = index % B_ROW_QUADS * 4u;
    if (B_BY_N) {
        let k = first_k + col;
        var pack = load_b(row_of_n(place.first_col + row) * params.b_stride + pack_of_k(k));
        if (K_RAGGED) {
            pack = first_of_b(pack, max(k, params.k) - k);
        }
        next_b[i] = quad_of_b(pack, 0u);
    } else {
        next_b[i] = quad_of_b(load_b(row_of_k(first_k + row) * params.b_stride + pack_of_n(place.first_col + col)), 0u);
    }
}

fn stage_a(i: u32, thread: u32) {
    let index = thread + i * THREADS;
    let row = index / A_ROW_QUADS;
    let quad = index % A_ROW_QUADS;
    tile_a[row * A_ROW_QUADS + select(place_in_row(quad, row), quad, A_BY_K)] = next_a[i];
}

fn stage_b(i: u32, thread: u32) {
    let index = thread + i * THREADS;
    let row = index / B_ROW_QUADS;
    let quad = index % B_ROW_QUADS;
    if (B_BY_N) {
        let slot = row % 4u * N_QUADS + row / 4u;
        tile_b[slot * B_ROW_QUADS + place_in_row(quad, slot)] = next_b[i];
    } else {
        tile_b[row * B_ROW_QUADS + quad] = next_b[i];
    }
}

fn fetch(place: Place, first_k: u32, thread: u32) {
    for (var i = 0u; i < min(4u, A_STEPS); i++) { fetch_a(i, place, first_k, thread); }
    for (var i = 4u; i < A_STEPS; i++) { fetch_a(i, place, first_k, thread); }
    for (var i = 0u; i < min(4u, B_STEPS); i++) { fetch_b(i, place, first_k, thread); }
    for (var i = 4u; i < B_STEPS; i++) { fetch_b(i, place, first_k, thread); }
}

fn stage(thread: u32) {
    for (var i = 0u; i < min(4u, A_STEPS); i++) { stage_a(i, thread); }
    for (var i = 4u; i < A_STEPS; i++) { stage_a(i, thread); }
    for (var i = 0u; i < min(4u, B_STEPS); i++) { stage_b(i, thread); }
    for (var i = 4u; i < B_STEPS; i++) { stage_b(i, thread); }
}

// right = B at the four k of quad k_quad, and the thread's columns
fn load_right(k_quad: u32, thread_col: u32) {
    for (var j = 0u; j < COL_QUADS; j++) {
        let quad = thread_col + j * THREAD_COLS;
        if (B_BY_N) {
            // N_QUADS and THREAD_COLS are multiples of a row's quads: all four lie at the same place of their rows.
            let place = place_in_row(k_quad, thread_col);
            let c0 = tile_b[quad * B_ROW_QUADS + place];
            let c1 = tile_b[(N_QUADS + quad) * B_ROW_QUADS + place];
            let c2 = tile_b[(2u * N_QUADS + quad) * B_ROW_QUADS + place];
            let c3 = tile_b[(3u * N_QUADS + quad) * B_ROW_QUADS + place];
            right[j] = vec4<f32>(c0.x, c1.x, c2.x, c3.x);
            right[COL_QUADS + j] = vec4<f32>(c0.y, c1.y, c2.y, c3.y);
            right[2u * COL_QUADS + j] = vec4<f32>(c0.z, c1.z, c2.z, c3.z);
            right[3u * COL_QUADS + j] = vec4<f32>(c0.w, c1.w, c2.w, c3.w);
        } else {
            right[j] = tile_b[4u * k_quad * B_ROW_QUADS + quad];
            right[COL_QUADS + j] = tile_b[(4u * k_quad + 1u) * B_ROW_QUADS + quad];
            right[2u * COL_QUADS + j] = tile_b[(4u * k_quad + 2u) * B_ROW_QUADS + quad];
            right[3u * COL_QUADS + j] = tile_b[(4u * k_quad + 3u) * B_ROW_QUADS + quad];
        }
    }
}

// sums of row i += left (four k of it) times right
fn multiply_row(i: u32, left: vec4<f32>) {
    for (var j = 0u; j < COL_QUADS; j++) {
        var sum = sums[i * COL_QUADS + j];
        sum = fma(vec4<f32>(left.x), right[j], sum);
        sum = fma(vec4<f32>(left.y), right[COL_QUADS + j], sum);
        sum = fma(vec4<f32>(left.z), right[2u * COL_QUADS + j], sum);
        sums[i * COL_QUADS + j] = fma(vec4<f32>(left.w), right[3u * COL_QUADS + j], sum);
    }
}

// Four of the thread's rows: stored (K, M) they are neighbours, stored (M, K) THREAD_ROWS apart.
fn multiply_rows(first: u32, k_quad: u32, thread_row: u32) {
    if (A_BY_K) {
        let quad = thread_row + first / 4u * THREAD_ROWS;
        let k0 = tile_a[4u * k_quad * A_ROW_QUADS + quad];
        let k1 = tile_a[(4u * k_quad + 1u) * A_ROW_QUADS + quad];
        let k2 = tile_a[(4u * k_quad + 2u) * A_ROW_QUADS + quad];
        let k3 = tile_a[(4u * k_quad + 3u) * A_ROW_QUADS + quad];
        multiply_row(first, vec4<f32>(k0.x, k1.x, k2.x, k3.x));
        multiply_row(first + 1u, vec4<f32>(k0.y, k1.y, k2.y, k3.y));
        multiply_row(first + 2u, vec4<f32>(k0.z, k1.z, k2.z, k3.z));
        multiply_row(first + 3u, vec4<f32>(k0.w, k1.w, k2.w, k3.w));
    } else {
        let row = thread_row + first * THREAD_ROWS;
        let place = place_in_row(k_quad, thread_row); // THREAD_ROWS is a multiple of a row's quads
        multiply_row(first, tile_a[row * A_ROW_QUADS + place]);
        multiply_row(first + 1u, tile_a[(row + THREAD_ROWS) * A_ROW_QUADS + place]);
        multiply_row(first + 2u, tile_a[(row + 2u * THREAD_ROWS) * A_ROW_QUADS + place]);
        multiply_row(first + 3u, tile_a[(row + 3u * THREAD_ROWS) * A_ROW_QUADS + place]);
    }
}

// Row i of the thread within the block
fn row_of(i: u32, thread_row: u32) -> u32 {
    if (A_BY_K) {
        return 4u * (thread_row + i / 4u * THREAD_ROWS) + i % 4u;
    }
    return thread_row + i * THREAD_ROWS;
}

fn finish_quad(i: u32, j: u32, place: Place, thread_row: u32, thread_col: u32) {
    let col = place.first_col + 4u * (thread_col + j * THREAD_COLS);
    let row = place.out_row + row_of(i, thread_row);
    finish(row, col, place.split, sums[i * COL_QUADS + j], fetch_extra(row, col));
}

fn finish_row(i: u32, place: Place, thread_row: u32, thread_col: u32) {
    finish_quad(i, 0u, place, thread_row, thread_col);
    if (COL_QUADS > 1u) { finish_quad(i, COL_QUADS - 1u, place, thread_row, thread_col); }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let place = place_of(group.y * groups.x + group.x);
    let thread_row = thread / THREAD_COLS;
    let thread_col = thread % THREAD_COLS;

    fetch(place, place.first_k, thread);
    for (var first_k = place.first_k; first_k < place.end_k; first_k += BLOCK_K) {
        workgroupBarrier();
        stage(thread);
        workgroupBarrier();
        // The last step fetches its own tile again rather than branch.
        fetch(place, select(first_k, first_k + BLOCK_K, first_k + BLOCK_K < place.end_k), thread);
        for (var k_quad = 0u; k_quad < BLOCK_K / 4u; k_quad++) {
            load_right(k_quad, thread_col);
            multiply_rows(0u, k_quad, thread_row);
            if (ROWS > 4u) {
                multiply_rows(4u, k_quad, thread_row);
            }
        }
    }

    finish_row(0u, place, thread_row, thread_col);
    finish_row(1u, place, thread_row, thread_col);
    finish_row(2u, place, thread_row, thread_col);
    finish_row(3u, place, thread_row, thread_col);
    if (ROWS > 4u) {
        finish_row(R4, place, thread_row, thread_col);
        finish_row(R5, place, thread_row, thread_col);
        finish_row(R6, place, thread_row, thread_col);
        finish_row(R7, place, thread_row, thread_col);
    }
}
