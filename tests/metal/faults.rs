//! Seeded faults: one wrong line in a real kernel each, and which check must find it. A fault that passes is a hole.

use std::fmt;

use gpt_wgpu::kernel::Kernel;

use crate::cases::{self, Case};
use crate::clang::{BUILDS, Clang};
use crate::execute::{Failure, execute, parallel};
use crate::limits;
use crate::lower::{self, Shader};

/// What found a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    /// naga's validation.
    Naga,
    /// The table of limits and rules.
    Limits,
    /// The runtime: two threads, one place, no barrier.
    Race,
    /// The runtime: an access outside of its buffer, variable or array.
    Bounds,
    /// The runtime: threads wait at different barriers, or lanes in different functions.
    Parting,
    /// The result differs from the twin.
    Values,
}

/// One fault. `kernel` and `constants` choose whose text is changed: `constants` are lines of its header.
struct Fault {
    what: &'static str,
    kernel: &'static str,
    constants: &'static [&'static str],
    /// What the text has exactly once, and what takes its place.
    from: &'static str,
    to: &'static str,
    found_by: Layer,
}

const F32: &str = "alias elem = f32;";
const D32: &str = "const HEAD_DIM: u32 = 32u;";
const D64: &str = "const HEAD_DIM: u32 = 64u;";
const DROPS: &str = "const DROPOUT: bool = true;";
const KEEPS: &str = "const DROPOUT: bool = false;";
const F16_PRODUCTS: &str = "alias mat_elem = f16;";
const SMALL: &str = "const THREAD_ROWS: u32 = 8u;";
const LARGE: &str = "const THREAD_ROWS: u32 = 16u;";
const SINGLES: &str = "// plain, singles, bias: true";
const QUADS: &str = "// plain, quads, bias: true";
const BARE_QUADS: &str = "// plain, quads, bias: false";
const GELU_QUADS: &str = "// gelu, quads, bias: true";
const A_BY_K: &str = "const A_BY_K: bool = true;";
const A_BY_M: &str = "const A_BY_K: bool = false;";
const B_BY_K: &str = "const B_BY_N: bool = false;";
const EXACT: &str = "const RAGGED: bool = false;";
const SCALED: &str = "const A_SCALED: bool = true;";
const GRADIENT: &str = "const GRADIENT: bool = true;";
const SIXTEEN_ROWS: &str = "const ROWS: u32 = 16u;";
const LANES67: &str = "const LANES: u32 = 67u;";

#[rustfmt::skip] // a table
const FAULTS: &[Fault] = &[
    Fault {
        what: "no barrier between writers and readers", kernel: "attention_delta", constants: &[F32, D64],
        from: "    workgroupBarrier();\n", to: "", found_by: Layer::Race,
    },
    Fault {
        what: "one thread more than there are rows", kernel: "attention_delta", constants: &[F32, D64],
        from: "thread < ROWS && row", to: "thread <= ROWS && row", found_by: Layer::Bounds,
    },
    Fault {
        what: "one row more than there are", kernel: "attention_delta", constants: &[F32, D64],
        from: "if (first_row + row < rows)", to: "if (first_row + row <= rows)", found_by: Layer::Bounds,
    },
    Fault {
        what: "rows that overlap", kernel: "attention_delta", constants: &[F32, D64],
        from: "= DIM_QUADS + 1u;", to: "= DIM_QUADS - 1u;", found_by: Layer::Race,
    },
    Fault {
        what: "a sum that leaves out its first term", kernel: "attention_delta", constants: &[F32, D64],
        from: "for (var quad = 0u;", to: "for (var quad = 1u;", found_by: Layer::Values,
    },
    Fault {
        what: "the mask the other way round", kernel: "dropout", constants: &[],
        from: ">= params.drop_threshold", to: "< params.drop_threshold", found_by: Layer::Values,
    },
    Fault {
        what: "four columns where fewer are left", kernel: "dropout", constants: &[],
        from: "min(4u, params.columns - block * 4u)", to: "4u", found_by: Layer::Bounds,
    },
    Fault {
        what: "one group more than there are", kernel: "dropout", constants: &[],
        from: "if (group >= params.rows", to: "if (group > params.rows", found_by: Layer::Bounds,
    },
    Fault {
        what: "the grid's second row forgotten", kernel: "dropout", constants: &[],
        from: "id.y * grid.x * 256u + id.x", to: "id.x", found_by: Layer::Race,
    },
    Fault {
        what: "one bit of a random generator", kernel: "dropout", constants: &[],
        from: "0xbb67ae85u", to: "0xbb67ae84u", found_by: Layer::Values,
    },
    Fault {
        what: "no barrier between the scores and their readers", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "        workgroupBarrier();\n\n        // P", to: "        // P", found_by: Layer::Race,
    },
    Fault {
        what: "no barrier between readers of a row and its next writers", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "workgroupBarrier(); // all parts", to: "// all parts", found_by: Layer::Race,
    },
    Fault {
        what: "a barrier that not all threads reach", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "row_sums[thread] = sum;\n    workgroupBarrier();", to: "row_sums[thread] = sum;\n    if (thread < 96u) { workgroupBarrier(); }", found_by: Layer::Parting,
    },
    Fault {
        what: "one key of the future", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "let visible_scores = select(row_scores, vec4<f32>(MASKED), keys > vec4<u32>(query))",
        to: "let visible_scores = select(row_scores, vec4<f32>(MASKED), keys > vec4<u32>(query + 1u))", found_by: Layer::Values,
    },
    Fault {
        what: "rows and columns of a tile changed round", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "((row % 4u) * KEY_QUADS + row / 4u)", to: "((row % 4u) + row / 4u * 4u)", found_by: Layer::Values,
    },
    Fault {
        what: "keys behind the last", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "let source = min(key_start + row, seq_len - 1u);", to: "let source = key_start + row;", found_by: Layer::Bounds,
    },
    Fault {
        what: "a result for rows behind the last", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "if (thread < BLOCK_Q && query < seq_len)", to: "if (thread < BLOCK_Q)", found_by: Layer::Bounds,
    },
    Fault {
        what: "a read past the end of a workgroup array", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "row_sums[part * BLOCK_Q + thread]", to: "row_sums[part * BLOCK_Q + thread + 1u]", found_by: Layer::Bounds,
    },
    Fault {
        what: "the grid's second row forgotten", kernel: "attention_scalar_forward", constants: &[F32, D32, DROPS],
        from: "workgroup.y * grid.x + workgroup.x", to: "workgroup.x", found_by: Layer::Race,
    },
    Fault {
        what: "a tile overwritten while it is read", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "workgroupBarrier(); // the tiles' last readers are done", to: "", found_by: Layer::Race,
    },
    Fault {
        what: "columns in another order", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "qkv_stride + out_col + j * OUT_COLS;", to: "qkv_stride + out_col + (OUT_QUADS - 1u - j) * OUT_COLS + 1u;", found_by: Layer::Values,
    },
    Fault {
        what: "one row more than there are, written", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "if (query < params.seq_len)", to: "if (query <= params.seq_len)", found_by: Layer::Bounds,
    },
    Fault {
        what: "a product in f16", kernel: "attention_scalar_dq", constants: &["alias elem = f16;", D64, KEEPS],
        from: "vec4<elem>(accumulator[j * OUT_ROWS + i] * scale)", to: "vec4<elem>(accumulator[j * OUT_ROWS + i]) * elem(scale)", found_by: Layer::Limits,
    },
    Fault {
        what: "a private array with one element too few", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "var<private> accumulator: array<vec4<f32>, OUT_ROWS * OUT_QUADS>;",
        to: "var<private> accumulator: array<vec4<f32>, OUT_ROWS * OUT_QUADS - 1u>;", found_by: Layer::Bounds,
    },
    Fault {
        what: "a tile overwritten while it is read", kernel: "attention_scalar_dkv", constants: &[F32, D64, KEEPS],
        from: "workgroupBarrier(); // the tiles' last readers are done", to: "", found_by: Layer::Race,
    },
    Fault {
        what: "a write one element further", kernel: "attention_scalar_dkv", constants: &[F32, D64, KEEPS],
        from: "query_delta[index] = delta_value;", to: "query_delta[index + 1u] = delta_value;", found_by: Layer::Bounds,
    },
    Fault {
        what: "a tile left out", kernel: "attention_scalar_dkv", constants: &[F32, D64, KEEPS],
        from: "for (var query_start = key_start / BLOCK_Q * BLOCK_Q;", to: "for (var query_start = (key_start / BLOCK_Q + 1u) * BLOCK_Q;", found_by: Layer::Values,
    },
    Fault {
        what: "no barrier behind a staged tile", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "stage_tile(thread);\n        workgroupBarrier();", to: "stage_tile(thread);", found_by: Layer::Race,
    },
    Fault {
        what: "no barrier between lanes and their matrix", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "(part_sum.z + part_sum.w);\n    workgroupBarrier();", to: "(part_sum.z + part_sum.w);", found_by: Layer::Race,
    },
    Fault {
        what: "two subgroups in one scratch", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "scratch_base = subgroup * SUBGROUP_SCRATCH;", to: "scratch_base = subgroup / 2u * SUBGROUP_SCRATCH;", found_by: Layer::Race,
    },
    Fault {
        what: "a matrix read by columns", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "probabilities[block * SCORE_TILES + j] =\n            coopLoadT", to: "probabilities[block * SCORE_TILES + j] =\n            coopLoad", found_by: Layer::Values,
    },
    Fault {
        what: "another stride for the matrix than for the lanes", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "const TILE_PITCH: u32 = TILE_STRIDE / PACK;", to: "const TILE_PITCH: u32 = HEAD_DIM / PACK;", found_by: Layer::Values,
    },
    Fault {
        what: "a matrix that reaches behind its tile", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "const TILE_PITCH: u32 = TILE_STRIDE / PACK;", to: "const TILE_PITCH: u32 = TILE_STRIDE / PACK + 8u;", found_by: Layer::Bounds,
    },
    Fault {
        what: "sums that are never rescaled", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "atomicMax(&rescale_request[0], number);", to: "", found_by: Layer::Values,
    },
    Fault {
        what: "each lane rescales when it wants to", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "var rescale = atomicLoad(&rescale_request[0]) == number;",
        to: "var rescale = atomicLoad(&rescale_request[0]) == number && shrink[0] < 1.0;", found_by: Layer::Parting,
    },
    Fault {
        what: "a broadcast without atomics", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "        atomicMax(&rescale_request[0], number);", to: "        scratch[SCRATCH_SIZE - 1u] = f32(number);", found_by: Layer::Race,
    },
    Fault {
        what: "half of the lanes of a row", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "distance < LANES_PER_ROW; distance *= 2u) {\n        total", to: "distance < LANES_PER_ROW / 2u; distance *= 2u) {\n        total", found_by: Layer::Values,
    },
    Fault {
        what: "all lanes of a row write its result", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "if (query < params.seq_len && lane_part == 0u)", to: "if (query < params.seq_len)", found_by: Layer::Race,
    },
    Fault {
        what: "matrices behind a variable of four bytes", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "array<atomic<u32>, 4>", to: "array<atomic<u32>, 1>", found_by: Layer::Limits,
    },
    Fault {
        what: "more workgroup memory than there is", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "const TILE_SIZE: u32 = BLOCK_K * TILE_STRIDE;", to: "const TILE_SIZE: u32 = BLOCK_K * TILE_STRIDE * 8u;", found_by: Layer::Limits,
    },
    Fault {
        what: "matrices that some lanes skip", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "        add_scores(0u);", to: "        if (query < seq_len) { add_scores(0u); }", found_by: Layer::Parting,
    },
    Fault {
        what: "a left factor on the right", kernel: "attention_coop_forward", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "let columns = coopLoad<mat_b>(&stream_a[place], TILE_PITCH);\n            scores[0u]",
        to: "let columns = coopLoad<mat_a>(&stream_a[place], TILE_PITCH);\n            scores[0u]", found_by: Layer::Naga,
    },
    Fault {
        what: "no barrier behind a staged tile", kernel: "attention_coop_dq", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "stage_tile(thread);\n        workgroupBarrier();", to: "stage_tile(thread);", found_by: Layer::Race,
    },
    Fault {
        what: "rows behind the last", kernel: "attention_coop_dkv", constants: &[F32, D64, DROPS, F16_PRODUCTS],
        from: "min(first_row + index / DIM_QUADS, params.seq_len - 1u)", to: "min(first_row + index / DIM_QUADS, params.seq_len)", found_by: Layer::Bounds,
    },
    Fault {
        what: "the diagonal masked away", kernel: "attention_coop_dkv", constants: &[F32, D64, DROPS, F16_PRODUCTS],
        from: "queries < vec4<u32>(key)", to: "queries <= vec4<u32>(key)", found_by: Layer::Values,
    },
    Fault {
        what: "a gradient without dropout's factor", kernel: "attention_coop_dkv", constants: &[F32, D64, DROPS, F16_PRODUCTS],
        from: "gradient * params.keep_scale", to: "gradient", found_by: Layer::Values,
    },
    Fault {
        what: "a gradient that stays scaled", kernel: "attention_coop_dkv", constants: &[F32, D64, DROPS, F16_PRODUCTS],
        from: "let value_factor = 1.0 / params.gradient_scale;", to: "let value_factor = 1.0;", found_by: Layer::Values,
    },
    Fault {
        what: "no barrier between writers and readers of a tile", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "        stage(thread);\n        workgroupBarrier();", to: "        stage(thread);", found_by: Layer::Race,
    },
    Fault {
        what: "a tile overwritten while it is read", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "        workgroupBarrier();\n        stage(thread);", to: "        stage(thread);", found_by: Layer::Race,
    },
    Fault {
        what: "rows of a tile that overlap", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "A_ROW_QUADS + select(1u, 0u, A_BY_K)", to: "A_ROW_QUADS - select(1u, 0u, A_BY_K)", found_by: Layer::Race,
    },
    Fault {
        what: "more workgroup memory than there is", kernel: "linear_scalar", constants: &[LARGE, QUADS],
        from: "const BLOCK_K: u32 = 16u;", to: "const BLOCK_K: u32 = 32u;", found_by: Layer::Limits,
    },
    Fault {
        what: "one row more than there are", kernel: "linear_scalar", constants: &[SMALL, GELU_QUADS],
        from: "min(m, params.m - 1u), RAGGED", to: "min(m, params.m), RAGGED", found_by: Layer::Bounds,
    },
    Fault {
        what: "elements behind the last", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "a[min(index + 3u, last)]", to: "a[index + 3u]", found_by: Layer::Bounds,
    },
    Fault {
        what: "one column more than there are, written", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "store_out(index, min(4u, params.n - col), sum", to: "store_out(index, min(4u, params.n - col + 1u), sum", found_by: Layer::Race,
    },
    Fault {
        what: "k behind the last", kernel: "linear_scalar", constants: &[SMALL, BARE_QUADS, A_BY_M, B_BY_K],
        from: "< vec4<u32>(place.end_k)", to: "<= vec4<u32>(place.end_k)", found_by: Layer::Values,
    },
    Fault {
        what: "parts of a sum in one place", kernel: "linear_scalar", constants: &[SMALL, BARE_QUADS, A_BY_K, EXACT],
        from: "(split * params.m + row)", to: "row", found_by: Layer::Race,
    },
    Fault {
        what: "one group more than there are", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "if (index >= blocks * splits)", to: "if (index > blocks * splits)", found_by: Layer::Bounds,
    },
    Fault {
        what: "blocks of rows in another order than of places", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "rest / rows_in_group * BLOCK_N", to: "rest / GROUP_ROWS * BLOCK_N", found_by: Layer::Race,
    },
    Fault {
        what: "a matrix stored in another pitch than it is read", kernel: "linear_coop", constants: &[F16_PRODUCTS, SINGLES],
        from: "let stride = SCRATCH_STRIDE;", to: "let stride = SCRATCH_COLS;", found_by: Layer::Values,
    },
    Fault {
        what: "subgroups that share their scratch", kernel: "linear_coop", constants: &[F16_PRODUCTS, SINGLES],
        from: "let base = subgroup * SUBGROUP_SCRATCH;", to: "let base = subgroup * SCRATCH_STRIDE;", found_by: Layer::Race,
    },
    Fault {
        what: "no barrier between a matrix and its readers", kernel: "linear_coop", constants: &[F16_PRODUCTS, SINGLES],
        from: "    workgroupBarrier();\n    for (var q", to: "    for (var q", found_by: Layer::Race,
    },
    Fault {
        what: "no barrier before the next matrix", kernel: "linear_coop", constants: &[F16_PRODUCTS, SINGLES],
        from: "        );\n    }\n    workgroupBarrier();", to: "        );\n    }", found_by: Layer::Race,
    },
    Fault {
        what: "a left factor of another row", kernel: "linear_coop", constants: &[F16_PRODUCTS, SINGLES],
        from: "coopMultiplyAdd(left[R1], right", to: "coopMultiplyAdd(left[0], right", found_by: Layer::Values,
    },
    Fault {
        what: "a matrix read by columns", kernel: "linear_coop", constants: &[F16_PRODUCTS, SINGLES],
        from: "left[i] = coopLoadT<mat_a>(&tile_a[row", to: "left[i] = coopLoad<mat_a>(&tile_a[row", found_by: Layer::Values,
    },
    Fault {
        what: "a sum that stays scaled", kernel: "linear_coop", constants: &[F16_PRODUCTS, SCALED],
        from: "sum * params.out_scale + bias_at(col)", to: "sum + bias_at(col)", found_by: Layer::Values,
    },
    Fault {
        what: "one row more than there are, summed", kernel: "column_sum", constants: &[],
        from: "min(first + BLOCK_ROWS, params.rows)", to: "first + BLOCK_ROWS", found_by: Layer::Bounds,
    },
    Fault {
        what: "a decay that grows", kernel: "gelu_gradient", constants: &["const GELU_TANH: bool = true;"],
        from: "exp(-2.0 * abs(argument))", to: "exp(-2.0 * argument)", found_by: Layer::Values,
    },
    Fault {
        what: "one quad more than there are", kernel: "gelu_gradient", constants: &["const GELU_TANH: bool = false;"],
        from: "if (quad >= params.quads)", to: "if (quad > params.quads)", found_by: Layer::Bounds,
    },
    Fault {
        what: "a part left out", kernel: "sum_parts", constants: &["const ACCUMULATE: bool = true;"],
        from: "var part = 0u;", to: "var part = 1u;", found_by: Layer::Values,
    },
    Fault {
        what: "no barrier between a team's writers and readers", kernel: "layer_norm_forward", constants: &[LANES67],
        from: "    partial[thread] = value;\n    workgroupBarrier();", to: "    partial[thread] = value;", found_by: Layer::Race,
    },
    Fault {
        what: "one row more than there are", kernel: "layer_norm_forward", constants: &[LANES67],
        from: "if (row >= params.rows)", to: "if (row > params.rows)", found_by: Layer::Race,
    },
    Fault {
        what: "sums overwritten while they are read", kernel: "layer_norm_backward", constants: &[LANES67],
        from: "        workgroupBarrier();\n    }\n}", to: "    }\n}", found_by: Layer::Race,
    },
    Fault {
        what: "a row counted twice", kernel: "layer_norm_backward", constants: &[LANES67],
        from: "                if (has_row) {\n                    dw[i]", to: "                if (true) {\n                    dw[i]", found_by: Layer::Values,
    },
    Fault {
        what: "the grid's second row forgotten", kernel: "column_sums", constants: &[],
        from: "(workgroup.y * grid.x + workgroup.x) * TILE", to: "workgroup.x * TILE", found_by: Layer::Race,
    },
    Fault {
        what: "keys that swap without a barrier", kernel: "embedding_sort", constants: &[],
        from: "            workgroupBarrier();\n            for (var pair", to: "            for (var pair", found_by: Layer::Race,
    },
    Fault {
        what: "a key that counts itself", kernel: "embedding_rank", constants: &[],
        from: "if (sorted[start + count + reach - 1u] < bound)", to: "if (sorted[start + count + reach - 1u] <= bound)", found_by: Layer::Values,
    },
    Fault {
        what: "a row's sums overwritten while they are read", kernel: "embedding_backward", constants: &[KEEPS, SIXTEEN_ROWS],
        from: "    workgroupBarrier(); // the next row's sums may come", to: "", found_by: Layer::Race,
    },
    Fault {
        what: "items of a list behind its last", kernel: "embedding_backward", constants: &[KEEPS, SIXTEEN_ROWS],
        from: "list_item(row, min(i, length - 1u))", to: "list_item(row, i)", found_by: Layer::Bounds,
    },
    Fault {
        what: "positions of another sequence", kernel: "embedding_forward", constants: &[KEEPS],
        from: "row % params.time", to: "row", found_by: Layer::Bounds,
    },
    Fault {
        what: "one lane more than there are", kernel: "adamw", constants: &[],
        from: "if (index >= params.count)", to: "if (index > params.count)", found_by: Layer::Bounds,
    },
    Fault {
        what: "a slope without the clip", kernel: "adamw", constants: &[],
        from: "g[index] * scale[0]", to: "g[index]", found_by: Layer::Limits,
    },
    Fault {
        what: "lanes behind the last", kernel: "square_sums", constants: &[],
        from: "g[min(index, params.count - 1u)]", to: "g[index]", found_by: Layer::Bounds,
    },
    Fault {
        what: "a tree that stops early", kernel: "gradient_norm", constants: &[],
        from: "reach > 0u", to: "reach > 1u", found_by: Layer::Values,
    },
    Fault {
        what: "a gradient before the target's logit is read", kernel: "cross_entropy", constants: &[GRADIENT],
        from: "storageBarrier(); // thread 0", to: "// thread 0", found_by: Layer::Race,
    },
    Fault {
        what: "a gradient of the padding", kernel: "cross_entropy", constants: &[GRADIENT],
        from: ", columns < vec4<u32>(params.vocab)", to: ", columns <= vec4<u32>(params.vocab)", found_by: Layer::Values,
    },
    Fault {
        what: "no target to divide by", kernel: "cross_entropy_count", constants: &[],
        from: "max(sums[0], 1u)", to: "sums[0]", found_by: Layer::Values,
    },
    Fault {
        what: "no barrier in a tree", kernel: "cross_entropy_mean", constants: &[],
        from: "        workgroupBarrier();\n", to: "", found_by: Layer::Race,
    },
];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.kernel, self.what)
    }
}

impl Fault {
    /// The cases of the kernel that is to be changed, all of one kernel.
    fn cases<'a>(&self, all: &'a [Case]) -> Vec<&'a Case> {
        let meant =
            |k: &Kernel| k.name() == self.kernel && self.constants.iter().all(|c| k.header().lines().any(|l| l == *c));
        let first = all.iter().find(|c| meant(&c.kernel)).unwrap_or_else(|| panic!("{self}: no case has this kernel"));
        all.iter().filter(|c| lower::label(&c.kernel) == lower::label(&first.kernel)).collect()
    }

    /// Changes the kernel and looks who notices; none: the fault passed.
    fn find(&self, number: usize, cases: &[Case], clang: &Clang) -> Option<(Layer, String)> {
        let cases = self.cases(cases);
        let kernel = &cases[0].kernel;
        let text = kernel.text();
        assert_eq!(text.matches(self.from).count(), 1, "{self}: {:?} must stand in the kernel exactly once", self.from);
        let shader = match Shader::new(kernel, text.replace(self.from, self.to)) {
            Ok(shader) => shader,
            Err(error) => return Some((Layer::Naga, error)),
        };
        if let Some((rule, how)) = limits::broken(&shader).into_iter().next() {
            return Some((Layer::Limits, format!("{rule}: {how}")));
        }
        for build in BUILDS {
            let name = format!("fault{number}");
            let object = clang.compile(&shader, &name, build).unwrap_or_else(|e| panic!("{self}: {e}"));
            let program = clang.link(&[object], &format!("{name}.{build:?}"), build).unwrap();
            for (i, case) in cases.iter().enumerate() {
                match execute(&program, &shader, case, clang.folder(), &format!("{name}.{build:?}.{i}")) {
                    Ok(()) => {}
                    Err(Failure::Wrong(text)) => return Some((Layer::Values, text)),
                    Err(Failure::Stopped(text)) => {
                        let layers =
                            [("race: ", Layer::Race), ("out of bounds: ", Layer::Bounds), ("part: ", Layer::Parting)];
                        let layer = layers.iter().find(|(word, _)| text.contains(word));
                        return Some((layer.unwrap_or_else(|| panic!("{self}: {text}")).1, text));
                    }
                }
            }
        }
        None
    }
}

#[test]
fn every_seeded_fault_is_found() {
    let Some(clang) = crate::clang() else { return };
    let cases = cases::all();
    let numbered: Vec<_> = FAULTS.iter().enumerate().collect();
    let wrong: Vec<String> = parallel(&numbered, |(number, fault)| match fault.find(*number, &cases, &clang) {
        None => Some(format!("{fault}: PASSED, should be found by {:?}", fault.found_by)),
        Some((layer, _)) if layer == fault.found_by => None,
        Some((layer, text)) => Some(format!("{fault}: found by {layer:?}, not by {:?}: {text}", fault.found_by)),
    })
    .into_iter()
    .flatten()
    .collect();
    assert!(wrong.is_empty(), "{} of {} seeded faults\n{}", wrong.len(), FAULTS.len(), wrong.join("\n"));
    eprintln!("{} seeded faults, all found", FAULTS.len());
}
