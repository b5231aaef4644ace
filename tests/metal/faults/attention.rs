//! Faults in attention and dropout.

use super::{Fault, Layer};

const F32: &str = "alias elem = f32;";
const D32: &str = "const HEAD_DIM: u32 = 32u;";
const D64: &str = "const HEAD_DIM: u32 = 64u;";
const DROPS: &str = "const DROPOUT: bool = true;";
const KEEPS: &str = "const DROPOUT: bool = false;";
const F16_PRODUCTS: &str = "alias mat_elem = f16;";

#[rustfmt::skip] // a table
pub const FAULTS: &[Fault] = &[
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
        from: ">= lane_words(params.drop_threshold)", to: "< lane_words(params.drop_threshold)", found_by: Layer::Values,
    },
    Fault {
        what: "one word for four columns", kernel: "dropout", constants: &["const WIDTH: u32 = 1u;"],
        from: "block[first_column % 4u]", to: "block[0]", found_by: Layer::Values,
    },
    Fault {
        what: "one lane more than there are", kernel: "dropout", constants: &[],
        from: "if (index >= params.rows", to: "if (index > params.rows", found_by: Layer::Bounds,
    },
    Fault {
        what: "a product in f16", kernel: "dropout", constants: &["alias elem = f16;"],
        from: "value * params.keep_scale", to: "lanes(x[index] * elem(params.keep_scale))", found_by: Layer::Limits,
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
        what: "a product's lower half", kernel: "dropout", constants: &[],
        from: "u32(product >> 32u)", to: "u32(product)", found_by: Layer::Values,
    },
    Fault {
        what: "no barrier between the tellers of a row and who is told", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "        workgroupBarrier();\n        if (visible) {\n            rescale(0u);",
        to: "        if (visible) {\n            rescale(0u);", found_by: Layer::Race,
    },
    Fault {
        what: "no barrier between readers of a tile and its next writers", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "            workgroupBarrier();\n            stage_blocks();",
        to: "            stage_blocks();", found_by: Layer::Race,
    },
    Fault {
        what: "a barrier that not all threads reach", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "            workgroupBarrier();\n            stage_blocks();",
        to: "            if (thread < 48u) { workgroupBarrier(); }\n            stage_blocks();", found_by: Layer::Parting,
    },
    Fault {
        what: "one key of the future", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "vec4<u32>(key) > queries)",
        to: "vec4<u32>(key) > queries + 1u)", found_by: Layer::Values,
    },
    Fault {
        what: "rows and columns of a block changed round", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "tiles[at] = vec4<f32>(x0.x, x1.x, x2.x, x3.x);",
        to: "tiles[at] = x0;", found_by: Layer::Values,
    },
    Fault {
        what: "neighbours that skip a tile of theirs", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "4u * ROW_QUADS * NEIGHBOURS - 1u;",
        to: "4u * ROW_QUADS * NEIGHBOURS - 9u;", found_by: Layer::Values,
    },
    Fault {
        what: "keys behind the last", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "qkv[at + min(row + 3u, last) * rows.stride]",
        to: "qkv[at + (row + 3u) * rows.stride]", found_by: Layer::Bounds,
    },
    Fault {
        what: "a result for rows behind the last", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "if (thread_col == 0u && query < params.seq_len)",
        to: "if (thread_col == 0u)", found_by: Layer::Bounds,
    },
    Fault {
        what: "a read past the end of a workgroup array", kernel: "attention_scalar_forward", constants: &[F32, D64, DROPS],
        from: "tiles[RIGHT + k * RIGHT_PITCH + thread_col",
        to: "tiles[RIGHT + (k + 1u) * RIGHT_PITCH + thread_col", found_by: Layer::Bounds,
    },
    Fault {
        what: "the grid's second row forgotten", kernel: "attention_scalar_forward", constants: &[F32, D32, DROPS],
        from: "workgroup.y * grid.x + workgroup.x",
        to: "workgroup.x", found_by: Layer::Race,
    },
    Fault {
        what: "a tile overwritten while it is read", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "            workgroupBarrier();\n            if (visible) { stage_weights(",
        to: "            if (visible) { stage_weights(", found_by: Layer::Race,
    },
    Fault {
        what: "columns in another order", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "qkv_stride + thread_col + c * COL_THREADS;",
        to: "qkv_stride + (thread_col ^ 1u) + c * COL_THREADS;", found_by: Layer::Values,
    },
    Fault {
        what: "one row more than there are, written", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "if (query < params.seq_len)",
        to: "if (query <= params.seq_len)", found_by: Layer::Bounds,
    },
    Fault {
        what: "a product in f16", kernel: "attention_scalar_dq", constants: &["alias elem = f16;", D64, KEEPS],
        from: "vec4<elem>(sums[OUT_QUADS * i + c] * scale)",
        to: "vec4<elem>(sums[OUT_QUADS * i + c]) * elem(scale)", found_by: Layer::Limits,
    },
    Fault {
        what: "a private array with one element too few", kernel: "attention_scalar_dq", constants: &[F32, D64, KEEPS],
        from: "alias Sums = array<vec4<f32>, 4u * ROW_QUADS * OUT_QUADS>;",
        to: "alias Sums = array<vec4<f32>, 4u * ROW_QUADS * OUT_QUADS - 1u>;", found_by: Layer::Bounds,
    },
    Fault {
        what: "a tile overwritten while it is read", kernel: "attention_scalar_dkv", constants: &[F32, D64, KEEPS],
        from: "            workgroupBarrier();\n            stage_blocks();\n            workgroupBarrier();\n            fetch_gradient_blocks(",
        to: "            stage_blocks();\n            workgroupBarrier();\n            fetch_gradient_blocks(", found_by: Layer::Race,
    },
    Fault {
        what: "a write one element further", kernel: "attention_scalar_dkv", constants: &[F32, D64, KEEPS],
        from: "next_rows[i] = vec4<f32>(dout[",
        to: "next_rows[i + 1u] = vec4<f32>(dout[", found_by: Layer::Bounds,
    },
    Fault {
        what: "a tile left out", kernel: "attention_scalar_dkv", constants: &[F32, D64, KEEPS],
        from: "for (var query_start = key_start / OTHER * OTHER;",
        to: "for (var query_start = (key_start / OTHER + 1u) * OTHER;", found_by: Layer::Values,
    },
    Fault {
        what: "dS with keys and queries changed round", kernel: "attention_scalar_dkv_ds", constants: &[F32, D64, KEEPS],
        from: "keep_key(key, at, vec4<f32>(x0.x, x1.x, x2.x, x3.x));", to: "keep_key(key, at, x0);", found_by: Layer::Values,
    },
    Fault {
        what: "dS of one key more than there are", kernel: "attention_scalar_dkv_ds", constants: &[F32, D64, KEEPS],
        from: "if (key < params.seq_len) { kept", to: "if (key <= params.seq_len) { kept", found_by: Layer::Bounds,
    },
    Fault {
        what: "dS of queries behind the last", kernel: "attention_scalar_dkv_ds", constants: &[F32, D64, KEEPS],
        from: "if (quad < row_quads)", to: "if (true)", found_by: Layer::Race,
    },
    Fault {
        what: "dS counted from the first of all heads", kernel: "attention_scalar_dkv_ds", constants: &[F32, D32, KEEPS],
        from: "return (launch_head * params.seq_len + key)",
        to: "return ((params.first_head + launch_head) * params.seq_len + key)", found_by: Layer::Bounds,
    },
    Fault {
        what: "no barrier between writers and readers", kernel: "attention_scalar_dq_of_ds", constants: &[F32, D64],
        from: "        stage_rows();\n        workgroupBarrier();\n", to: "        stage_rows();\n", found_by: Layer::Race,
    },
    Fault {
        what: "dS that nobody wrote", kernel: "attention_scalar_dq_of_ds", constants: &[F32, D64],
        from: "key <= min(4u * quad + 3u, last)", to: "key <= last", found_by: Layer::Values,
    },
    Fault {
        what: "the head of another launch", kernel: "attention_scalar_dq_of_ds", constants: &[F32, D32],
        from: "let batch_head = params.first_head + launch_head;", to: "let batch_head = launch_head;", found_by: Layer::Values,
    },
    Fault {
        what: "the keys on the diagonal left out", kernel: "attention_scalar_dq_of_ds", constants: &[F32, D64],
        from: "let key_end = min(query_start + OWN, seq_len);", to: "let key_end = min(query_start + 1u, seq_len);", found_by: Layer::Values,
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
        from: "let value_factor = params.result_scale;", to: "let value_factor = 1.0;", found_by: Layer::Values,
    },
    Fault {
        what: "a held gradient whose factor is taken out", kernel: "attention_coop_dq", constants: &["alias elem = f16;", "alias out_elem = f32;", D64, DROPS],
        from: "let factor = scale * params.result_scale;", to: "let factor = scale / params.gradient_scale;", found_by: Layer::Values,
    },
    Fault {
        what: "a matrix of dS written by columns", kernel: "attention_coop_dkv_ds", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "coopStoreT(score_gradients[i], &kept[at], edge);", to: "coopStore(score_gradients[i], &kept[at], edge);", found_by: Layer::Values,
    },
    Fault {
        what: "matrices of dS behind the last", kernel: "attention_coop_dkv_ds", constants: &[F32, D64, KEEPS, F16_PRODUCTS],
        from: "if (first_key / EDGE < kept_row_tiles() && first_query", to: "if (first_query", found_by: Layer::Bounds,
    },
    Fault {
        what: "dS of keys above the diagonal", kernel: "attention_coop_dq_of_ds", constants: &[F32, D64, F16_PRODUCTS],
        from: "if (key_tile + j > query)", to: "if (key_tile + j > query + 1u)", found_by: Layer::Values,
    },
    Fault {
        what: "a matrix of dS behind the last", kernel: "attention_coop_dq_of_ds", constants: &[F32, D64, F16_PRODUCTS],
        from: "let query = min(query_tile, kept_row_tiles() - 1u);", to: "let query = query_tile;", found_by: Layer::Bounds,
    },
    Fault {
        what: "a tile overwritten while it is read", kernel: "attention_coop_dq_of_ds", constants: &[F32, D64, F16_PRODUCTS],
        from: "        workgroupBarrier(); // the last tile's readers are done\n", to: "", found_by: Layer::Race,
    },
    Fault {
        what: "no barrier between a matrix and its lanes", kernel: "attention_coop_dq_of_ds", constants: &[F32, D64, F16_PRODUCTS],
        from: "&scratch[subgroup_scratch], stride);\n    workgroupBarrier();", to: "&scratch[subgroup_scratch], stride);", found_by: Layer::Race,
    },
    Fault {
        what: "a held gradient without its factor", kernel: "dropout", constants: &["alias elem = f32;", "alias out_elem = f16;", KEEPS],
        from: "made(value * params.factor)", to: "made(value)", found_by: Layer::Values,
    },
];
