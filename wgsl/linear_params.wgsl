// What the linear_* kernels are told at run time, and where a workgroup of them works.
//
//     out (M, N) = epilogue(A (M, K) B (K, N)), every matrix row-major
//
// Expects from the header: BLOCK_M, BLOCK_N (rows and columns of out that a workgroup computes); RAGGED and
// K_RAGGED (bool: whether M or N, or K, is no multiple of the block's); IS_ONE (bool: whether out_scale is known to be 1); PARAMS, the
// binding.

struct Params {
    m: u32,
    n: u32,
    k: u32,
    k_split: u32,        // k that a workgroup sums over: all of it, or a part (then out is (splits, M, N))
    a_stride: u32,       // elements from row to row of A as it is stored
    b_stride: u32,
    out_stride: u32,     // of out and extra
    a_last: u32,         // index of the last element of A
    b_last: u32,
    a_scale: f32,        // what A is multiplied by before it is rounded to f16 ...
    out_scale: f32,      // ... and its inverse, for the sums
    drop_threshold: u32, // an element is kept when its random word is >= this
    seed_lo: u32,
    seed_hi: u32,
    step: u32, // of the masks, counted from the clock
    site: u32,
    keep_scale: f32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(PARAMS) var<uniform> params: Params;

struct Place {
    first_row: u32, // of out
    first_col: u32,
    first_k: u32,
    end_k: u32,
    split: u32,
    out_row: u32,   // first_row, or beyond the last where there is nothing to do
}

// Which part of out is workgroup `index`'s. Neighbours share their columns of B: blocks go down GROUP_ROWS rows of blocks
// before they step right, so that what is in the cache is used again.
const GROUP_ROWS: u32 = 8u;

fn place_of(index: u32) -> Place {
    let block_rows = (params.m + BLOCK_M - 1u) / BLOCK_M;
    let block_cols = (params.n + BLOCK_N - 1u) / BLOCK_N;
    let blocks = block_rows * block_cols;
    let splits = (params.k + params.k_split - 1u) / params.k_split;
    let split = index / blocks;
    let block = index % blocks;
    let group = block / (GROUP_ROWS * block_cols);
    let rows_in_group = min(GROUP_ROWS, block_rows - group * GROUP_ROWS);
    let rest = block - group * GROUP_ROWS * block_cols;
    if (index >= blocks * splits) {
        return Place(0u, 0u, 0u, 0u, 0u, params.m); // the grid was folded: nothing to do
    }
    let first_k = split * params.k_split;
    let first_row = (group * GROUP_ROWS + rest % rows_in_group) * BLOCK_M;
    return Place(
        first_row,
        rest / rows_in_group * BLOCK_N,
        first_k,
        min(first_k + params.k_split, params.k),
        split,
        first_row,
    );
}

// A row, or the first element of a pack (PACK neighbours, from linear_quads, _octs or _singles), that exists; the identity
// where nothing is ragged.
fn row_of_m(m: u32) -> u32 { return select(m, min(m, params.m - 1u), RAGGED); }
fn row_of_n(n: u32) -> u32 { return select(n, min(n, params.n - 1u), RAGGED); }
fn row_of_k(k: u32) -> u32 { return select(k, min(k, params.k - 1u), K_RAGGED); }
fn pack_of_m(m: u32) -> u32 { return select(m, min(m, (params.m - 1u) / PACK * PACK), RAGGED); }
fn pack_of_n(n: u32) -> u32 { return select(n, min(n, (params.n - 1u) / PACK * PACK), RAGGED); }
fn pack_of_k(k: u32) -> u32 { return select(k, min(k, (params.k - 1u) / PACK * PACK), K_RAGGED); }

// Sums without the factor on A. Where it is known to be 1, a multiplication for each element would be 1 % of a cooperative product's time.
fn unscaled(sum: vec4<f32>) -> vec4<f32> {
    return sum * select(params.out_scale, 1.0, IS_ONE);
}
