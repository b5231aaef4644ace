// What the scalar attention kernels share: their tiles in workgroup memory, the way there, and the products of two tiles.
//
// A workgroup owns OWN rows of one head (queries; keys in dK/dV) and streams OTHER rows of the other kind. A thread has
// ROW_QUADS quads of the own rows, SCORE_QUADS quads of the others, and of a result with D columns the same own rows and
// OUT_QUADS quads of columns. A "quad" is four neighbours that move as one vec4.
//
// Both products step over k, CHUNK of them in workgroup memory at a time and the next in registers:
//     scores (OWN, OTHER) += left (k, OWN)^T right (k, OTHER)    k are dimensions: rows are turned on their way to both tiles
//     sums (OWN, D)       += left (k, OWN)^T right (k, D)        k are rows of the others; left are weights, one for each score
// A step of k reads ROW_QUADS quads of rows and one to three of columns for all its products: 8 x 8 sums a thread need four
// loads for 64 products, and registers are what bounds them.
//
// Header (beside it philox.wgsl, and a kernel that binds qkv and params):
//     elem           f32 or f16, the storage type; all arithmetic is f32
//     HEAD_DIM       D, a multiple of 16
//     ROW_THREADS    threads over the own rows, a multiple of 8
//     COL_THREADS    threads over columns, 4 to 24, divides HEAD_DIM / 4
//     ROW_QUADS      1 or 2
//     SCORE_QUADS    1 or 2; COL_THREADS * SCORE_QUADS is a multiple of 4
//     DROPOUT        bool
// HEAD_DIM / 4 / COL_THREADS is at most 3, (OWN + OTHER) / THREADS too.

const CHUNK: u32 = 16u; // the steps of k are written out
const LOG2_E: f32 = 1.4426950408889634;
const MASKED: f32 = -1e30; // finite: fast math may assume that no infinity exists

const THREADS: u32 = ROW_THREADS * COL_THREADS;
const OWN_QUADS: u32 = ROW_QUADS * ROW_THREADS;
const OTHER_QUADS: u32 = SCORE_QUADS * COL_THREADS;
const OWN: u32 = 4u * OWN_QUADS;
const OTHER: u32 = 4u * OTHER_QUADS;
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const CHUNK_QUADS: u32 = CHUNK / 4u;
const OUT_QUADS: u32 = DIM_QUADS / COL_THREADS;
// Indices that are constants even where there is one quad
const LAST_ROW_QUAD: u32 = ROW_QUADS - 1u;
const LAST_SCORE_QUAD: u32 = SCORE_QUADS - 1u;
// Rows of threads that run together, in 32 threads: they own neighbouring rows, and so skip tiles together.
const NEIGHBOURS: u32 = select(select(2u, 4u, COL_THREADS <= 8u), 8u, COL_THREADS <= 4u);

// The left tile, quads of own rows at each k, and behind it the right one, quads of columns at each k.
const RIGHT_PITCH: u32 = max((OTHER_QUADS + 7u) / 8u * 8u, DIM_QUADS);
const RIGHT: u32 = CHUNK * OWN_QUADS;
var<workgroup> tiles: array<vec4<f32>, RIGHT + CHUNK * RIGHT_PITCH>;

// Blocks of 4 rows x 4 dimensions, and quads of rows as they lie, that a thread moves
const BLOCKS: u32 = (OWN + OTHER + THREADS - 1u) / THREADS;
const ROW_STEPS: u32 = CHUNK * DIM_QUADS / THREADS;

// What a thread holds: of column j of the scores its quad h of rows at ROW_QUADS * j + h; of row i of a result its quad c of
// columns at OUT_QUADS * i + c. Whatever indexes these arrays is written out as calls, or a loop of four short steps at most:
// NVIDIA's compiler does not unroll others, and an array that it cannot index by constants leaves the registers.
alias Scores = array<vec4<f32>, 4u * SCORE_QUADS * ROW_QUADS>;
alias Sums = array<vec4<f32>, 4u * ROW_QUADS * OUT_QUADS>;
var<private> next_blocks: array<vec4<f32>, 4u * BLOCKS>;
var<private> next_rows: array<vec4<f32>, ROW_STEPS>;
var<private> thread: u32;
var<private> thread_row: u32;
var<private> thread_col: u32;

// Rows in storage: quad q of row i at base + i * stride + q. Rows beyond the end are read as the last row, and given
// probability 0 or never stored: guards around the loads cost 15 to 40 %.
struct Rows {
    base: u32,
    stride: u32,
    first: u32,
}

// By what the quads at k of a turned tile, or of weights, change places (exclusive or): threads go to two quads of rows at
// four k, and so write all 32 banks at once; threads that read neighbouring quads still do. Below 8, and the same for four k.
fn shuffle(k: u32) -> u32 {
    return k / 4u % 4u * 2u;
}

// The thread's quad h among the quads of own rows
fn own_quad(h: u32) -> u32 {
    return thread_row / NEIGHBOURS * (ROW_QUADS * NEIGHBOURS) + h * NEIGHBOURS + thread_row % NEIGHBOURS;
}

// Where a quad of own rows lies in the left tile: a thread's quad h at thread_row + h * ROW_THREADS
fn own_slot(quad: u32) -> u32 {
    return quad / NEIGHBOURS % ROW_QUADS * ROW_THREADS + quad / (ROW_QUADS * NEIGHBOURS) * NEIGHBOURS + quad % NEIGHBOURS;
}

// The first of the rows of the thread's NEIGHBOURS among the own rows; they have 4 * ROW_QUADS * NEIGHBOURS.
fn first_neighbour() -> u32 {
    return thread_row / NEIGHBOURS * (4u * ROW_QUADS * NEIGHBOURS);
}

// Block i of those that a thread moves: four rows that begin at 4 * quad, own ones or others, at four dimensions.
struct Block {
    is_own: bool,
    quad: u32,
    dim_quad: u32, // of the chunk
}

fn block_of(i: u32) -> Block {
    let index = thread + i * THREADS;
    let is_own = index < OWN;
    let block = select(index - OWN, index, is_own);
    return Block(is_own, block / CHUNK_QUADS, block % CHUNK_QUADS);
}

// Registers -> both tiles
fn stage_block(i: u32) {
    let block = block_of(i);
    let k = 4u * block.dim_quad;
    let pitch = select(RIGHT_PITCH, OWN_QUADS, block.is_own);
    let slot = select(block.quad, own_slot(block.quad), block.is_own) ^ shuffle(k);
    let at = select(RIGHT, 0u, block.is_own) + k * pitch + slot;
    let x0 = next_blocks[4u * i];
    let x1 = next_blocks[4u * i + 1u];
    let x2 = next_blocks[4u * i + 2u];
    let x3 = next_blocks[4u * i + 3u];
    if (BLOCKS * THREADS == OWN + OTHER || block.is_own || block.quad < OTHER_QUADS) {
        tiles[at] = vec4<f32>(x0.x, x1.x, x2.x, x3.x);
        tiles[at + pitch] = vec4<f32>(x0.y, x1.y, x2.y, x3.y);
        tiles[at + 2u * pitch] = vec4<f32>(x0.z, x1.z, x2.z, x3.z);
        tiles[at + 3u * pitch] = vec4<f32>(x0.w, x1.w, x2.w, x3.w);
    }
}

fn stage_blocks() {
    stage_block(0u);
    if (BLOCKS > 1u) { stage_block(1u); }
    if (BLOCKS > 2u) { stage_block(BLOCKS - 1u); }
}

// Four rows of qkv at four dimensions -> registers
fn fetch_qkv_block(i: u32, block: Block, rows: Rows, chunk: u32) {
    let last = params.seq_len - 1u;
    let row = rows.first + 4u * block.quad;
    let at = rows.base + chunk + block.dim_quad;
    next_blocks[4u * i] = vec4<f32>(qkv[at + min(row, last) * rows.stride]);
    next_blocks[4u * i + 1u] = vec4<f32>(qkv[at + min(row + 1u, last) * rows.stride]);
    next_blocks[4u * i + 2u] = vec4<f32>(qkv[at + min(row + 2u, last) * rows.stride]);
    next_blocks[4u * i + 3u] = vec4<f32>(qkv[at + min(row + 3u, last) * rows.stride]);
}

// Own rows and others, both of qkv, at the dimensions from quad `chunk` on
fn fetch_block(i: u32, own: Rows, other: Rows, chunk: u32) {
    let block = block_of(i);
    let first = select(other.first, own.first, block.is_own);
    let base = select(other.base, own.base, block.is_own);
    fetch_qkv_block(i, block, Rows(base, own.stride, first), chunk);
}

fn fetch_blocks(own: Rows, other: Rows, chunk: u32) {
    fetch_block(0u, own, other, chunk);
    if (BLOCKS > 1u) { fetch_block(1u, own, other, chunk); }
    if (BLOCKS > 2u) { fetch_block(BLOCKS - 1u, own, other, chunk); }
}

// CHUNK rows of qkv as they lie -> registers
fn fetch_rows(rows: Rows) {
    for (var i = 0u; i < ROW_STEPS; i++) {
        let index = thread + i * THREADS;
        let row = min(rows.first + index / DIM_QUADS, params.seq_len - 1u);
        next_rows[i] = vec4<f32>(qkv[rows.base + row * rows.stride + index % DIM_QUADS]);
    }
}

// Registers -> the right tile
fn stage_rows() {
    for (var i = 0u; i < ROW_STEPS; i++) {
        let index = thread + i * THREADS;
        tiles[RIGHT + index / DIM_QUADS * RIGHT_PITCH + index % DIM_QUADS] = next_rows[i];
    }
}

// Weights -> the left tile, where the columns of the scores are k. `chunk` counts the CHUNKs of columns.
fn stage_weights_column(weights: ptr<private, Scores>, j: u32, at: u32) {
    tiles[at] = (*weights)[ROW_QUADS * j];
    if (ROW_QUADS > 1u) { tiles[at + ROW_THREADS] = (*weights)[ROW_QUADS * j + LAST_ROW_QUAD]; }
}

fn stage_weights_quad(weights: ptr<private, Scores>, j: u32, chunk: u32) {
    let quad = thread_col + j * COL_THREADS;
    if (quad / CHUNK_QUADS == chunk) {
        let k = quad % CHUNK_QUADS * 4u;
        let at = k * OWN_QUADS + (thread_row ^ shuffle(k));
        stage_weights_column(weights, 4u * j, at);
        stage_weights_column(weights, 4u * j + 1u, at + OWN_QUADS);
        stage_weights_column(weights, 4u * j + 2u, at + 2u * OWN_QUADS);
        stage_weights_column(weights, 4u * j + 3u, at + 3u * OWN_QUADS);
    }
}

fn stage_weights(weights: ptr<private, Scores>, chunk: u32) {
    stage_weights_quad(weights, 0u, chunk);
    if (SCORE_QUADS > 1u) { stage_weights_quad(weights, LAST_SCORE_QUAD, chunk); }
}

fn add_score(scores: ptr<private, Scores>, j: u32, value: f32, rows_0: vec4<f32>, rows_1: vec4<f32>) {
    (*scores)[ROW_QUADS * j] = fma(rows_0, vec4<f32>(value), (*scores)[ROW_QUADS * j]);
    if (ROW_QUADS > 1u) {
        (*scores)[ROW_QUADS * j + LAST_ROW_QUAD] =
            fma(rows_1, vec4<f32>(value), (*scores)[ROW_QUADS * j + LAST_ROW_QUAD]);
    }
}

fn add_score_quad(scores: ptr<private, Scores>, j: u32, k: u32, rows_0: vec4<f32>, rows_1: vec4<f32>) {
    let values = tiles[RIGHT + k * RIGHT_PITCH + ((thread_col + j * COL_THREADS) ^ shuffle(k))];
    add_score(scores, 4u * j, values.x, rows_0, rows_1);
    add_score(scores, 4u * j + 1u, values.y, rows_0, rows_1);
    add_score(scores, 4u * j + 2u, values.z, rows_0, rows_1);
    add_score(scores, 4u * j + 3u, values.w, rows_0, rows_1);
}

fn add_scores_at(scores: ptr<private, Scores>, k: u32) {
    let at = k * OWN_QUADS + (thread_row ^ shuffle(k));
    let rows_0 = tiles[at];
    let rows_1 = tiles[at + LAST_ROW_QUAD * ROW_THREADS];
    add_score_quad(scores, 0u, k, rows_0, rows_1);
    if (SCORE_QUADS > 1u) { add_score_quad(scores, LAST_SCORE_QUAD, k, rows_0, rows_1); }
}

// scores += left^T right, both turned
fn add_scores(scores: ptr<private, Scores>) {
    add_scores_at(scores, 0u);
    add_scores_at(scores, 1u);
    add_scores_at(scores, 2u);
    add_scores_at(scores, 3u);
    add_scores_at(scores, 4u);
    add_scores_at(scores, 5u);
    add_scores_at(scores, 6u);
    add_scores_at(scores, 7u);
    add_scores_at(scores, 8u);
    add_scores_at(scores, 9u);
    add_scores_at(scores, 10u);
    add_scores_at(scores, 11u);
    add_scores_at(scores, 12u);
    add_scores_at(scores, 13u);
    add_scores_at(scores, 14u);
    add_scores_at(scores, 15u);
}

fn add_row(sums: ptr<private, Sums>, i: u32, c: u32, weight: f32, values: vec4<f32>) {
    (*sums)[OUT_QUADS * i + c] = fma(vec4<f32>(weight), values, (*sums)[OUT_QUADS * i + c]);
}

fn add_rows_quad(sums: ptr<private, Sums>, c: u32, k: u32, weights_0: vec4<f32>, weights_1: vec4<f32>) {
    let values = tiles[RIGHT + k * RIGHT_PITCH + thread_col + c * COL_THREADS];
    add_row(sums, 0u, c, weights_0.x, values);
    add_row(sums, 1u, c, weights_0.y, values);
    add_row(sums, 2u, c, weights_0.z, values);
    add_row(sums, 3u, c, weights_0.w, values);
    if (ROW_QUADS > 1u) {
        add_row(sums, 4u * LAST_ROW_QUAD, c, weights_1.x, values);
        add_row(sums, 4u * LAST_ROW_QUAD + 1u, c, weights_1.y, values);
        add_row(sums, 4u * LAST_ROW_QUAD + 2u, c, weights_1.z, values);
        add_row(sums, 4u * LAST_ROW_QUAD + 3u, c, weights_1.w, values);
    }
}

fn add_rows_at(sums: ptr<private, Sums>, k: u32) {
    let at = k * OWN_QUADS + (thread_row ^ shuffle(k));
    let weights_0 = tiles[at];
    let weights_1 = tiles[at + LAST_ROW_QUAD * ROW_THREADS];
    add_rows_quad(sums, 0u, k, weights_0, weights_1);
    if (OUT_QUADS > 1u) { add_rows_quad(sums, 1u, k, weights_0, weights_1); }
    if (OUT_QUADS > 2u) { add_rows_quad(sums, OUT_QUADS - 1u, k, weights_0, weights_1); }
}

// sums += left^T right: weights, and rows as they lie
fn add_rows(sums: ptr<private, Sums>) {
    add_rows_at(sums, 0u);
    add_rows_at(sums, 1u);
    add_rows_at(sums, 2u);
    add_rows_at(sums, 3u);
    add_rows_at(sums, 4u);
    add_rows_at(sums, 5u);
    add_rows_at(sums, 6u);
    add_rows_at(sums, 7u);
    add_rows_at(sums, 8u);
    add_rows_at(sums, 9u);
    add_rows_at(sums, 10u);
    add_rows_at(sums, 11u);
    add_rows_at(sums, 12u);
    add_rows_at(sums, 13u);
    add_rows_at(sums, 14u);
    add_rows_at(sums, 15u);
}
