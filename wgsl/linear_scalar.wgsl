// A matrix product in f32, without subgroups or cooperative matrices: it runs everywhere.
//
// One workgroup computes BLOCK_M x BLOCK_N of out over its part of K; a thread 8 x 8 or 8 x 16, two quads of rows by two or four of
// columns:
//     for each BLOCK_K of k (in workgroup memory, the next ones in registers):
//         for each two k:
//             sums += A B               two outer products, everything in registers
//     the sums pass to the epilogue
// A "quad" is four neighbours that move as one vec4. A tile has a row of quads for each k: quads of rows of A, or of columns
// of B. So a step of k reads four quads for 64 products, or six for 128.
//
// A matrix whose rows run along k is turned on its way there. A thread fetches two neighbouring rows x0 and x1 of it and stores
//     of A: x0 and x1 as one vec2 for each k; the next vec2 of the quad is another thread's
//     of B: a block of 2 x 2 as one vec4; rows k and k + 1 of the tile hold, of a quad,
//           (x0 at k, x1 at k, x0 at k + 1, x1 at k + 1) and (x2 at k, x3 at k, x2 at k + 1, x3 at k + 1)
// Who reads both has the quads of k and of k + 1 by other names. It keeps all of them at once, so one matrix alone may be
// turned so; A, which 16 threads read at the same place, loses least by the vec2. No thread writes one component of a vector:
// MSL leaves undefined what becomes of the others.
//
// Header (beside it linear_params, linear_quads or _singles, linear_bias or _no_bias, an epilogue):
//     THREAD_ROWS, THREAD_COLS   8 or 16: threads of the workgroup over BLOCK_M and BLOCK_N
//     BLOCK_M     8 * THREAD_ROWS
//     BLOCK_N     8 or 16 * THREAD_COLS
//     BLOCK_K     16: the steps of k are written out
//     A_BY_K, B_BY_N   bool: A is stored (K, M), else (M, K); B is stored (N, K), else (K, N)
//     RAGGED      bool: whether M or N is no multiple of BLOCK_M or BLOCK_N
//     K_RAGGED    bool: whether K is no multiple of BLOCK_K
//     IS_ONE      bool: false, though nothing is rounded: without the multiplication by 1 NVIDIA's compiler made a product with GELU 15 %
//                 slower, others up to 5 %
//     FIRST_SHUFFLE   0 or 1: see shuffle
//     EXTRA_ROWS  rows of the thread's sums that extra is loaded ahead, behind the sums: 0 or 2
// Workgroup: THREADS = THREAD_ROWS * THREAD_COLS.
// Grid: splits * ceil(M / BLOCK_M) * ceil(N / BLOCK_N) workgroups, folded into (x, y) when over 65535.

const THREADS: u32 = THREAD_ROWS * THREAD_COLS;
const M_QUADS: u32 = BLOCK_M / 4u;
const N_QUADS: u32 = BLOCK_N / 4u;
const K_QUADS: u32 = BLOCK_K / 4u;
const A_STEPS: u32 = BLOCK_M * K_QUADS / THREADS; // quads that a thread moves: 2 or 4
const B_STEPS: u32 = BLOCK_N * K_QUADS / THREADS;
const HELD_ROWS: u32 = max(EXTRA_ROWS, 1u);
const COL_QUADS: u32 = N_QUADS / THREAD_COLS; // quads of columns of a thread: 2 or 4

var<workgroup> tile_a: array<vec2<f32>, BLOCK_K * M_QUADS * 2u>; // halves of quads
var<workgroup> tile_b: array<vec4<f32>, BLOCK_K * N_QUADS>;

// What a thread holds. Loops over these arrays are at most four steps long and short of text, or written out as calls:
// NVIDIA's compiler does not unroll others, and an array that it cannot index by constants leaves the registers (measured:
// a third slower for a loop over k, four times for one around the epilogue with dropout alone).
var<private> sums: array<vec4<f32>, 8u * COL_QUADS>; // row i, quad j of columns at COL_QUADS * i + j
var<private> next_a: array<vec4<f32>, A_STEPS>;
var<private> next_b: array<vec4<f32>, B_STEPS>;
var<private> at_a: u32; // where the thread's first quads are loaded from, where no edge is to be minded
var<private> at_b: u32;
var<private> others: array<vec4<extra_elem>, COL_QUADS * HELD_ROWS>; // quads of extra

// Where a quad begins in its block of A or B: at row (of A) or column (of B) x, and k.
struct Corner {
    x: u32,
    k: u32,
}

// Quad i of those that a thread moves. Where it runs along k, quads i and i + 1 (i even) are neighbours in x.
fn corner_a(i: u32, thread: u32) -> Corner {
    if (A_BY_K) {
        let index = thread + i * THREADS;
        return Corner(index % M_QUADS * 4u, index / M_QUADS);
    }
    let index = thread + i / 2u * THREADS;
    return Corner(index / K_QUADS * 2u + i % 2u, index % K_QUADS * 4u);
}

// Neighbouring threads go to the same half of neighbouring quads.
fn corner_b(i: u32, thread: u32) -> Corner {
    if (B_BY_N) {
        let index = thread + i / 2u * THREADS;
        let two = index / K_QUADS;
        return Corner(two % N_QUADS * 4u + two / N_QUADS * 2u + i % 2u, index % K_QUADS * 4u);
    }
    let index = thread + i * THREADS;
    return Corner(index % N_QUADS * 4u, index / N_QUADS);
}

// By what the quads in row k of a turned tile change places (exclusive or): threads go to two quads of x at four k, and so
// write all 32 banks at once; threads that read neighbouring quads still do. Below 8, and the same for four k. Where it is 0, NVIDIA's
// compiler no longer sees that a quad lies at a multiple of 16 bytes and loads its halves, unless FIRST_SHUFFLE is 1.
fn shuffle(k: u32) -> u32 {
    return k / 4u * 2u + FIRST_SHUFFLE;
}

// Rows of storage between the first quad that a thread moves and quad i.
fn rows_of_a(i: u32) -> u32 {
    return select(i % 2u + i / 2u * (THREADS / K_QUADS * 2u), i * (THREADS / M_QUADS), A_BY_K);
}

fn rows_of_b(i: u32) -> u32 {
    return select(i * (THREADS / N_QUADS), i, B_BY_N);
}

fn begin(place: Place, thread: u32) {
    let a = corner_a(0u, thread);
    let b = corner_b(0u, thread);
    let row = place.first_row + a.x;
    let col = place.first_col + b.x;
    let a_k = place.first_k + a.k;
    let b_k = place.first_k + b.k;
    at_a = select(row * params.a_stride + a_k, a_k * params.a_stride + row, A_BY_K) / UNIT;
    at_b = select(b_k * params.b_stride + col, col * params.b_stride + b_k, B_BY_N) / UNIT;
}

// One quad of the tile of A that begins at first_k -> registers; without an edge to mind, by one addition (1 to 3 %). Rows beyond the matrix repeat its last; k beyond the end
// counts 0 in A, so what it meets in B only has to be a number, which the padding of a row need not be.
fn fetch_a(i: u32, place: Place, first_k: u32, thread: u32) {
    if (!RAGGED && !K_RAGGED) {
        next_a[i] = quad_of_a(load_a(at_a + rows_of_a(i) * params.a_stride / UNIT), 0u);
        return;
    }
    let at = corner_a(i, thread);
    let row = place.first_row + at.x;
    let k = first_k + at.k;
    if (A_BY_K) {
        var pack = load_a((row_of_k(k) * params.a_stride + pack_of_m(row)) / UNIT);
        if (K_RAGGED) {
            pack = first_of_a(pack, select(0u, PACK, k < place.end_k));
        }
        next_a[i] = quad_of_a(pack, 0u);
    } else {
        var pack = load_a((row_of_m(row) * params.a_stride + pack_of_k(k)) / UNIT);
        if (K_RAGGED) {
            pack = first_of_a(pack, max(k, place.end_k) - k);
        }
        next_a[i] = quad_of_a(pack, 0u);
    }
}

fn fetch_b(i: u32, place: Place, first_k: u32, thread: u32) {
    if (!RAGGED && !K_RAGGED) {
        next_b[i] = quad_of_b(load_b(at_b + rows_of_b(i) * params.b_stride / UNIT), 0u);
        return;
    }
    let at = corner_b(i, thread);
    let col = place.first_col + at.x;
    let k = first_k + at.k;
    if (B_BY_N) {
        var pack = load_b((row_of_n(col) * params.b_stride + pack_of_k(k)) / UNIT);
        if (K_RAGGED) {
            pack = first_of_b(pack, max(k, params.k) - k);
        }
        next_b[i] = quad_of_b(pack, 0u);
    } else {
        next_b[i] = quad_of_b(load_b((row_of_k(k) * params.b_stride + pack_of_n(col)) / UNIT), 0u);
    }
}

// Quads i and i + 1 of A -> workgroup memory
fn stage_a(i: u32, thread: u32) {
    let at = corner_a(i, thread);
    let first = next_a[i];
    let second = next_a[i + 1u];
    if (A_BY_K) {
        let slot = 2u * (at.k * M_QUADS + at.x / 4u);
        tile_a[slot] = first.xy;
        tile_a[slot + 1u] = first.zw;
        tile_a[slot + 2u * THREADS] = second.xy;
        tile_a[slot + 2u * THREADS + 1u] = second.zw;
    } else {
        let slot = 2u * (at.k * M_QUADS + ((at.x / 4u) ^ shuffle(at.k))) + at.x % 4u / 2u;
        tile_a[slot] = vec2<f32>(first.x, second.x);
        tile_a[slot + 2u * M_QUADS] = vec2<f32>(first.y, second.y);
        tile_a[slot + 4u * M_QUADS] = vec2<f32>(first.z, second.z);
        tile_a[slot + 6u * M_QUADS] = vec2<f32>(first.w, second.w);
    }
}

fn stage_b(i: u32, thread: u32) {
    let at = corner_b(i, thread);
    let first = next_b[i];
    let second = next_b[i + 1u];
    if (B_BY_N) {
        let half = at.x % 4u / 2u;
        let slot = (at.k + half) * N_QUADS + ((at.x / 4u) ^ shuffle(at.k));
        tile_b[slot] = vec4<f32>(first.x, second.x, first.y, second.y);
        tile_b[slot + 2u * N_QUADS] = vec4<f32>(first.z, second.z, first.w, second.w);
    } else {
        let slot = at.k * N_QUADS + at.x / 4u;
        tile_b[slot] = first;
        tile_b[slot + THREADS] = second;
    }
}

fn fetch(place: Place, first_k: u32, thread: u32) {
    for (var i = 0u; i < A_STEPS; i++) { fetch_a(i, place, first_k, thread); }
    for (var i = 0u; i < B_STEPS; i++) { fetch_b(i, place, first_k, thread); }
}

fn stage(thread: u32) {
    for (var i = 0u; i < A_STEPS; i += 2u) { stage_a(i, thread); }
    for (var i = 0u; i < B_STEPS; i += 2u) { stage_b(i, thread); }
}

// A quad of rows or columns at two neighbouring k
struct Pair {
    k0: vec4<f32>,
    k1: vec4<f32>,
}

// The thread's quad i of rows at k and k + 1. THREAD_ROWS is a multiple of 8: the shuffle does not reach it.
fn read_a(i: u32, k: u32, thread_row: u32) -> Pair {
    let quad = (thread_row ^ select(shuffle(k), 0u, A_BY_K)) + i * THREAD_ROWS;
    let slot = 2u * (k * M_QUADS + quad);
    let next = slot + 2u * M_QUADS;
    return Pair(vec4<f32>(tile_a[slot], tile_a[slot + 1u]), vec4<f32>(tile_a[next], tile_a[next + 1u]));
}

// The thread's quad j of columns at k and k + 1
fn read_b(j: u32, k: u32, thread_col: u32) -> Pair {
    let quad = (thread_col ^ select(0u, shuffle(k), B_BY_N)) + j * THREAD_COLS;
    let first = tile_b[k * N_QUADS + quad];
    let second = tile_b[(k + 1u) * N_QUADS + quad];
    if (B_BY_N) {
        return Pair(vec4<f32>(first.xy, second.xy), vec4<f32>(first.zw, second.zw));
    }
    return Pair(first, second);
}

// The thread's quads of columns at one k; the last two where it has them.
struct Right {
    q0: vec4<f32>,
    q1: vec4<f32>,
    q2: vec4<f32>,
    q3: vec4<f32>,
}

// sums of row i += left * right
fn add_row(i: u32, left: f32, right: Right) {
    sums[COL_QUADS * i] = fma(vec4<f32>(left), right.q0, sums[COL_QUADS * i]);
    sums[COL_QUADS * i + 1u] = fma(vec4<f32>(left), right.q1, sums[COL_QUADS * i + 1u]);
    if (COL_QUADS > 2u) {
        sums[COL_QUADS * i + COL_QUADS - 2u] = fma(vec4<f32>(left), right.q2, sums[COL_QUADS * i + COL_QUADS - 2u]);
        sums[COL_QUADS * i + COL_QUADS - 1u] = fma(vec4<f32>(left), right.q3, sums[COL_QUADS * i + COL_QUADS - 1u]);
    }
}

// From the last row to the first, since NVIDIA's compiler gives registers in the order of the text: 2 to 4 % by which rows come first.
fn add_rows(first: u32, left: vec4<f32>, right: Right) {
    add_row(first + 3u, left.w, right);
    add_row(first + 2u, left.z, right);
    add_row(first + 1u, left.y, right);
    add_row(first, left.x, right);
}

// The products of k and k + 1, k even
fn multiply(k: u32, thread_row: u32, thread_col: u32) {
    let b_0 = read_b(0u, k, thread_col);
    let b_1 = read_b(1u, k, thread_col);
    var b_2: Pair;
    var b_3: Pair;
    if (COL_QUADS > 2u) {
        b_2 = read_b(2u, k, thread_col);
        b_3 = read_b(3u, k, thread_col);
    }
    let right_0 = Right(b_0.k0, b_1.k0, b_2.k0, b_3.k0);
    let right_1 = Right(b_0.k1, b_1.k1, b_2.k1, b_3.k1);
    let left_0 = read_a(0u, k, thread_row);
    add_rows(0u, left_0.k0, right_0);
    add_rows(0u, left_0.k1, right_1);
    let left_1 = read_a(1u, k, thread_row);
    add_rows(4u, left_1.k0, right_0);
    add_rows(4u, left_1.k1, right_1);
}

fn multiply_tile(thread_row: u32, thread_col: u32) {
    multiply(0u, thread_row, thread_col);
    multiply(2u, thread_row, thread_col);
    multiply(4u, thread_row, thread_col);
    multiply(6u, thread_row, thread_col);
    multiply(8u, thread_row, thread_col);
    multiply(10u, thread_row, thread_col);
    multiply(12u, thread_row, thread_col);
    multiply(14u, thread_row, thread_col);
}

fn row_of_out(i: u32, place: Place, thread_row: u32) -> u32 {
    return place.out_row + 4u * (thread_row + i / 4u * THREAD_ROWS) + i % 4u;
}

fn col_of_out(j: u32, place: Place, thread_col: u32) -> u32 {
    return place.first_col + 4u * (thread_col + j * THREAD_COLS);
}

// Loads of two rows are all under way before the first is waited for; a store in between would keep the next back.
fn fetch_other(i: u32, j: u32, place: Place, thread_row: u32, thread_col: u32) {
    others[COL_QUADS * (i % HELD_ROWS) + j] =
        fetch_extra(row_of_out(i, place, thread_row), col_of_out(j, place, thread_col));
}

fn fetch_row_of_others(i: u32, place: Place, thread_row: u32, thread_col: u32) {
    fetch_other(i, 0u, place, thread_row, thread_col);
    fetch_other(i, 1u, place, thread_row, thread_col);
    if (COL_QUADS > 2u) {
        fetch_other(i, COL_QUADS - 2u, place, thread_row, thread_col);
        fetch_other(i, COL_QUADS - 1u, place, thread_row, thread_col);
    }
}

fn finish_quad(i: u32, j: u32, place: Place, thread_row: u32, thread_col: u32) {
    finish(
        row_of_out(i, place, thread_row),
        col_of_out(j, place, thread_col),
        place.split,
        sums[COL_QUADS * i + j],
        others[COL_QUADS * (i % HELD_ROWS) + j],
    );
}

fn finish_row(i: u32, place: Place, thread_row: u32, thread_col: u32) {
    finish_quad(i, 0u, place, thread_row, thread_col);
    finish_quad(i, 1u, place, thread_row, thread_col);
    if (COL_QUADS > 2u) {
        finish_quad(i, COL_QUADS - 2u, place, thread_row, thread_col);
        finish_quad(i, COL_QUADS - 1u, place, thread_row, thread_col);
    }
}

fn finish_two_rows(i: u32, place: Place, thread_row: u32, thread_col: u32) {
    if (EXTRA_ROWS > 0u) {
        fetch_row_of_others(i, place, thread_row, thread_col);
        fetch_row_of_others(i + 1u, place, thread_row, thread_col);
    }
    finish_row(i, place, thread_row, thread_col);
    finish_row(i + 1u, place, thread_row, thread_col);
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
    let thread_row = thread / THREAD_COLS;
    let thread_col = thread % THREAD_COLS;

    begin(place, thread);
    fetch(place, place.first_k, thread);
    let along_a = select(BLOCK_K, BLOCK_K * params.a_stride, A_BY_K) / UNIT;
    let along_b = select(BLOCK_K * params.b_stride, BLOCK_K, B_BY_N) / UNIT;
    for (var first_k = place.first_k; first_k < place.end_k; first_k += BLOCK_K) {
        workgroupBarrier();
        stage(thread);
        workgroupBarrier();
        // The last step fetches its own tile again rather than branch.
        let has_next = first_k + BLOCK_K < place.end_k;
        at_a += select(0u, along_a, has_next);
        at_b += select(0u, along_b, has_next);
        fetch(place, select(first_k, first_k + BLOCK_K, has_next), thread);
        multiply_tile(thread_row, thread_col);
    }

    finish_two_rows(0u, place, thread_row, thread_col);
    finish_two_rows(2u, place, thread_row, thread_col);
    finish_two_rows(4u, place, thread_row, thread_col);
    finish_two_rows(6u, place, thread_row, thread_col);
}
