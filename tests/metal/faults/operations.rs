//! Faults in the matrix products and in everything by rows and by elements.

use super::{Fault, Layer};

const KEEPS: &str = "const DROPOUT: bool = false;";
const F16_PRODUCTS: &str = "alias mat_elem = f16;";
const SMALL: &str = "const THREAD_ROWS: u32 = 8u;";
const LARGE: &str = "const THREAD_ROWS: u32 = 16u;";
const SINGLES: &str = "// plain, singles, bias: true";
const QUADS: &str = "// plain, quads, bias: true";
const BARE_QUADS: &str = "// plain, quads, bias: false";
const GELU_QUADS: &str = "// gelu, quads, bias: true";
const SLOPE_SINGLES: &str = "// gelu slope, singles, bias: false";
const SLOPE_QUADS: &str = "// gelu slope, quads, bias: false";
const ADDED_QUADS: &str = "// added, quads, bias: false";
const A_BY_K: &str = "const A_BY_K: bool = true;";
const A_BY_M: &str = "const A_BY_K: bool = false;";
const B_BY_K: &str = "const B_BY_N: bool = false;";
const EXACT: &str = "const RAGGED: bool = false;";
const K_RAGGED: &str = "const K_RAGGED: bool = true;";
const OCTS: &str = "// plain, octs, bias: true";
const BARE_OCTS: &str = "// plain, octs, bias: false";
const HALVES: &str = "alias elem = f16;";
const SCALED: &str = "const A_SCALED: bool = true;";
const NOT_SCALED: &str = "const A_SCALED: bool = false;";
const GRADIENT: &str = "const GRADIENT: bool = true;";
const SIXTEEN_ROWS: &str = "const ROWS: u32 = 16u;";
const THREE_SLOTS: &str = "const SLOTS: u32 = 3u;";
const LANES67: &str = "const LANES: u32 = 67u;";
const PAST: &str = "const PAST: bool = true;";
const RESIDUAL_SINGLES: &str = "// residual, singles, bias: true";

#[rustfmt::skip] // a table
pub const FAULTS: &[Fault] = &[
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
        from: "at.k * M_QUADS + ((", to: "at.k * (M_QUADS - 1u) + ((", found_by: Layer::Race,
    },
    Fault {
        what: "a row shuffled otherwise than it is read", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "N_QUADS + ((at.x / 4u) ^ shuffle(at.k))", to: "N_QUADS + ((at.x / 4u) ^ shuffle(at.k + 4u))", found_by: Layer::Values,
    },
    Fault {
        what: "a row read with the shuffle of a matrix that is not turned", kernel: "linear_scalar", constants: &[SMALL, BARE_QUADS, A_BY_M, B_BY_K],
        from: "select(shuffle(k), 0u, A_BY_K)", to: "select(0u, shuffle(k), B_BY_N)", found_by: Layer::Values,
    },
    Fault {
        what: "a block turned otherwise than it was stored", kernel: "linear_scalar", constants: &[SMALL, SINGLES],
        from: "vec4<f32>(first.xy, second.xy), vec4<f32>(first.zw, second.zw)", to: "vec4<f32>(first.xz, second.xz), vec4<f32>(first.yw, second.yw)", found_by: Layer::Values,
    },
    Fault {
        what: "two threads that fetch the same two rows", kernel: "linear_scalar", constants: &[LARGE, QUADS],
        from: "two / N_QUADS * 2u", to: "two / BLOCK_N * 2u", found_by: Layer::Race,
    },
    Fault {
        what: "a component of a vector written by itself", kernel: "linear_scalar", constants: &[LARGE, QUADS],
        from: "tile_b[slot] = vec4<f32>(first.x, second.x, first.y, second.y);", to: "tile_b[slot][at.x % 4u] = first.x;", found_by: Layer::Limits,
    },
    Fault {
        what: "more workgroup memory than there is", kernel: "linear_scalar", constants: &[LARGE, QUADS],
        from: "const BLOCK_K: u32 = 16u;", to: "const BLOCK_K: u32 = 64u;", found_by: Layer::Limits,
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
        from: "store_out(index, min(4u, params.n - col), unscaled", to: "store_out(index, min(4u, params.n - col + 1u), unscaled", found_by: Layer::Race,
    },
    Fault {
        what: "k behind the last", kernel: "linear_scalar", constants: &[SMALL, BARE_QUADS, A_BY_M, B_BY_K, K_RAGGED],
        from: "max(k, place.end_k) - k", to: "max(k, place.end_k + 1u) - k", found_by: Layer::Values,
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
        from: "return sum * select(params.out_scale, 1.0, IS_ONE);", to: "return sum;", found_by: Layer::Values,
    },
    Fault {
        what: "a slope of the wrong sign", kernel: "linear_scalar", constants: &[SLOPE_QUADS],
        from: "+ x * GELU_DENSITY", to: "- x * GELU_DENSITY", found_by: Layer::Values,
    },
    Fault {
        what: "a slope beyond the matrix", kernel: "linear_scalar", constants: &[SLOPE_SINGLES],
        from: "if (!RAGGED || (row < params.m && col < params.n))", to: "if (row < params.m)", found_by: Layer::Bounds,
    },
    Fault {
        what: "what was there, forgotten", kernel: "linear_scalar", constants: &[ADDED_QUADS],
        from: "vec4<f32>(other) + (sum", to: "(sum", found_by: Layer::Values,
    },
    Fault {
        what: "one row more than there are, summed", kernel: "column_sum", constants: &[],
        from: "min(first + BLOCK_ROWS, params.rows)", to: "first + BLOCK_ROWS", found_by: Layer::Bounds,
    },
    Fault {
        what: "a sum that stays held", kernel: "column_sum", constants: &[HALVES],
        from: "sum * params.factor", to: "sum", found_by: Layer::Values,
    },
    Fault {
        what: "a held gradient without its factor", kernel: "gelu_gradient", constants: &["alias elem = f32;", "alias out_elem = f16;"],
        from: " * params.factor", to: "", found_by: Layer::Values,
    },
    Fault {
        what: "sums of a held gradient that stay held", kernel: "linear_coop", constants: &[NOT_SCALED, "const IS_ONE: bool = false;", BARE_OCTS],
        from: "sum * select(params.out_scale, 1.0, IS_ONE)", to: "sum", found_by: Layer::Values,
    },
    Fault {
        what: "a residual in the type of what is multiplied", kernel: "linear_coop", constants: &["alias a_elem = f16;", "alias extra_elem = f32;", "// residual, octs, bias: true"],
        from: "vec4<f32>(other) + value", to: "vec4<f32>(vec4<a_elem>(other)) + value", found_by: Layer::Values,
    },
    Fault {
        what: "the same tile again", kernel: "linear_scalar", constants: &[LARGE, BARE_QUADS, A_BY_M, EXACT],
        from: "        at_a += select(0u, along_a, has_next);\n", to: "", found_by: Layer::Values,
    },
    Fault {
        what: "a tile beyond the last", kernel: "linear_scalar", constants: &[LARGE, BARE_QUADS, A_BY_M, EXACT],
        from: "at_b += select(0u, along_b, has_next)", to: "at_b += along_b", found_by: Layer::Bounds,
    },
    Fault {
        what: "rows of a matrix that is not turned", kernel: "linear_scalar", constants: &[SMALL, BARE_QUADS, A_BY_M, EXACT],
        from: "i % 2u + i / 2u * (THREADS / K_QUADS * 2u)", to: "i", found_by: Layer::Values,
    },
    Fault {
        what: "another row's residual", kernel: "linear_scalar", constants: &[SMALL, RESIDUAL_SINGLES],
        from: "others[COL_QUADS * (i % HELD_ROWS) + j],", to: "others[j],", found_by: Layer::Values,
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
        what: "what comes past the norm, of the row's first lane", kernel: "layer_norm_backward", constants: &[LANES67, PAST],
        from: "added[i] = past[first + lane];", to: "added[i] = past[first];", found_by: Layer::Values,
    },
    Fault {
        what: "a residual of the tiles before", kernel: "linear_coop", constants: &[RESIDUAL_SINGLES],
        from: "others[place_of_other(q, i, j)],", to: "others[q],", found_by: Layer::Values,
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
        from: "if (sorted[start + count + reach - 1u] < bound)", to: "if (sorted[start + count + reach - 1u] <= bound)", found_by: Layer::Race,
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
        from: "min(start + CHUNK, params.slots[slot].count)", to: "min(start + CHUNK, params.slots[slot].count + 1u)",
        found_by: Layer::Bounds,
    },
    Fault {
        what: "a share that goes on in the next workgroup's", kernel: "adamw", constants: &[],
        from: "min(start + CHUNK, params.slots[slot].count)", to: "params.slots[slot].count", found_by: Layer::Race,
    },
    Fault {
        what: "a share counted from the launch's first workgroup", kernel: "adamw", constants: &[THREE_SLOTS],
        from: "(group - params.slots[slot].first) * CHUNK", to: "group * CHUNK", found_by: Layer::Values,
    },
    Fault {
        what: "a slot's first workgroup in the slot before", kernel: "adamw", constants: &[THREE_SLOTS],
        from: "params.slots[i].first <= group", to: "params.slots[i].first < group", found_by: Layer::Values,
    },
    Fault {
        what: "another parameter's decay", kernel: "adamw", constants: &[THREE_SLOTS],
        from: "params.slots[SLOT_1].factor", to: "params.slots[SLOT_2].factor", found_by: Layer::Values,
    },
    Fault {
        what: "another parameter's moment", kernel: "adamw", constants: &[THREE_SLOTS],
        from: "State(p_1[i], m_1[i], v_1[i])", to: "State(p_1[i], m_2[0], v_1[i])", found_by: Layer::Race,
    },
    Fault {
        what: "a decay of what does not decay", kernel: "adamw", constants: &[],
        from: "select(1.0, verdict[4], decays != 0.0)", to: "verdict[4]", found_by: Layer::Values,
    },
    Fault {
        what: "a slope without the clip", kernel: "adamw", constants: &[],
        from: "let slope = g * verdict[0];", to: "let slope = g;", found_by: Layer::Values,
    },
    Fault {
        what: "an update that was not to be made", kernel: "adamw", constants: &[],
        from: "if (verdict[1] != 0.0)", to: "if (true)", found_by: Layer::Values,
    },
    Fault {
        what: "lanes behind the last", kernel: "square_sums", constants: &[],
        from: "g_0[min(i, end - 1u)]", to: "g_0[i]", found_by: Layer::Bounds,
    },
    Fault {
        what: "the last lane again", kernel: "square_sums", constants: &[],
        from: "select(0.0, total(value * value), i < end)", to: "total(value * value)", found_by: Layer::Values,
    },
    Fault {
        what: "a workgroup without a place", kernel: "square_sums", constants: &[THREE_SLOTS],
        from: "thread == 0u && group < params.groups", to: "thread == 0u", found_by: Layer::Values,
    },
    Fault {
        what: "another launch's places", kernel: "square_sums", constants: &[],
        from: "square_sums[params.before + group]", to: "square_sums[group]", found_by: Layer::Values,
    },
    Fault {
        what: "a tree that stops early", kernel: "verdict", constants: &[],
        from: "reach > 0u", to: "reach > 1u", found_by: Layer::Values,
    },
    Fault {
        what: "the last sum twice", kernel: "verdict", constants: &[],
        from: "value, index < params.count)", to: "value, index <= params.count)", found_by: Layer::Values,
    },
    Fault {
        what: "a memory rewritten while it is read", kernel: "verdict", constants: &[],
        from: "storageBarrier(); // all", to: "// all", found_by: Layer::Race,
    },
    Fault {
        what: "a window read before it is whole", kernel: "verdict", constants: &[],
        from: "before it is rewritten\n    workgroupBarrier();", to: "before it is rewritten", found_by: Layer::Race,
    },
    Fault {
        what: "finite as arithmetic sees it", kernel: "verdict", constants: &[],
        from: "(bits & 0x7f800000u) != 0x7f800000u", to: "bitcast<f32>(bits) * 0.0 == 0.0", found_by: Layer::Values,
    },
    Fault {
        what: "a question that fast mathematics answers beforehand", kernel: "verdict", constants: &[],
        from: "is_finite(bitcast<u32>(sums[0]))", to: "is_finite(bitcast<u32>(norm))", found_by: Layer::Values,
    },
    Fault {
        what: "infinite alone is not finite", kernel: "verdict", constants: &[],
        from: "(bits & 0x7f800000u) != 0x7f800000u", to: "(bits & 0x7fffffffu) != 0x7f800000u", found_by: Layer::Values,
    },
    Fault {
        what: "a window that does not begin again", kernel: "verdict", constants: &[],
        from: "f32((next + 1u) % WINDOW)", to: "f32(next + 1u)", found_by: Layer::Values,
    },
    Fault {
        what: "a norm that is not in its own window", kernel: "verdict", constants: &[],
        from: "thread % WINDOW == next", to: "thread == next", found_by: Layer::Values,
    },
    Fault {
        what: "a window that is never full", kernel: "verdict", constants: &[],
        from: "select(0.0, 1.0, finite), f32(WINDOW)", to: "select(0.0, 1.0, finite), f32(WINDOW - 1u)", found_by: Layer::Values,
    },
    Fault {
        what: "a clip that enlarges", kernel: "verdict", constants: &[],
        from: "min(1.0, params.limit / (norm + 1e-6))", to: "params.limit / (norm + 1e-6)", found_by: Layer::Values,
    },
    Fault {
        what: "a loss scale that grows a step late", kernel: "verdict", constants: &[],
        from: "good >= GROWTH_INTERVAL", to: "good > GROWTH_INTERVAL", found_by: Layer::Values,
    },
    Fault {
        what: "a loss scale below the least", kernel: "verdict", constants: &[],
        from: "max(0.5 * scale, LEAST_SCALE)", to: "0.5 * scale", found_by: Layer::Values,
    },
    Fault {
        what: "another word of the clock for the rate", kernel: "verdict", constants: &[],
        from: "clock[RATE]", to: "clock[KEEP]", found_by: Layer::Values,
    },
    Fault {
        what: "another word of the clock for the decay", kernel: "verdict", constants: &[],
        from: "clock[KEEP]", to: "clock[RATE]", found_by: Layer::Values,
    },
    Fault {
        what: "a rate of no update", kernel: "verdict", constants: &[],
        from: "max(updates, 1.0)", to: "updates", found_by: Layer::Values,
    },
    Fault {
        what: "subnormal numbers flushed", kernel: "cast", constants: &[],
        from: "stored(x_0[i])", to: "stored(select(lanes(), x_0[i], abs(x_0[i]) > lanes(6.1e-5)))", found_by: Layer::Values,
    },
    Fault {
        what: "one lane more than there are", kernel: "cast", constants: &[],
        from: "i < end", to: "i <= end", found_by: Layer::Bounds,
    },
    Fault {
        what: "another tensor's copy", kernel: "cast", constants: &[THREE_SLOTS],
        from: "y_2[i] = stored(x_2[i])", to: "y_2[i] = stored(x_1[i] + x_2[i])", found_by: Layer::Values,
    },
    Fault {
        what: "the high half of a word where the row ends before it", kernel: "linear_coop", constants: &[OCTS, K_RAGGED],
        from: "first + 1u < vec4<u32>(count)", to: "first < vec4<u32>(count)", found_by: Layer::Values,
    },
    Fault {
        what: "one quad of a pack twice", kernel: "linear_coop", constants: &[OCTS],
        from: "select(pack.xy, pack.zw, i == 1u)", to: "select(pack.xy, pack.zw, i == 2u)", found_by: Layer::Values,
    },
    Fault {
        what: "packs counted as quads", kernel: "linear_coop", constants: &[OCTS],
        from: "const UNIT: u32 = PACK;", to: "const UNIT: u32 = 4u;", found_by: Layer::Bounds,
    },
    Fault {
        what: "the same tile again", kernel: "linear_coop", constants: &[BARE_OCTS, A_BY_M, EXACT],
        from: "        at_a[i] += step_a;\n", to: "", found_by: Layer::Values,
    },
    Fault {
        what: "rows staged where others were loaded", kernel: "linear_coop", constants: &[BARE_OCTS, A_BY_M, EXACT],
        from: "slot_a = row_in(thread, A_ROW_PACKS)", to: "slot_a = thread / A_ROW_PACKS", found_by: Layer::Values,
    },
    Fault {
        what: "a pack's second quad in the place of its first", kernel: "linear_coop", constants: &[OCTS],
        from: "store_a(slot + 4u / SLOT, ", to: "store_a(slot, ", found_by: Layer::Values,
    },
    Fault {
        what: "a pack behind the row's last", kernel: "linear_coop", constants: &[OCTS, K_RAGGED],
        from: "min(k, (params.k - 1u) / PACK * PACK)", to: "k", found_by: Layer::Bounds,
    },
    Fault {
        what: "a sum of weights in f16", kernel: "embedding_forward", constants: &[KEEPS, HALVES],
        from: "wte[token * params.lanes + lane] + wpe[row % params.time * params.lanes + lane]",
        to: "lanes(stored(wte[token * params.lanes + lane]) + stored(wpe[row % params.time * params.lanes + lane]))",
        found_by: Layer::Limits,
    },
    Fault {
        what: "a mean of what is stored", kernel: "layer_norm_forward", constants: &[LANES67, HALVES],
        from: "sum += total(values[i]);", to: "sum = f32(f16(sum + total(values[i])));", found_by: Layer::Values,
    },
    Fault {
        what: "a gradient before the target's logit is read", kernel: "cross_entropy", constants: &[GRADIENT],
        from: "storageBarrier(); // thread 0", to: "// thread 0", found_by: Layer::Race,
    },
    Fault {
        what: "a gradient of the padding", kernel: "cross_entropy", constants: &[GRADIENT],
        from: "gradient, columns < vec4<u32>(params.vocab)", to: "gradient, columns <= vec4<u32>(params.vocab)", found_by: Layer::Values,
    },
    Fault {
        what: "logits replaced while others read them", kernel: "cross_entropy", constants: &[GRADIENT],
        from: "        storageBarrier();\n        if (oct < octs)", to: "        if (oct < octs)", found_by: Layer::Race,
    },
    Fault {
        what: "a held gradient without its factor", kernel: "cross_entropy", constants: &[GRADIENT],
        from: "params.held * select", to: "select", found_by: Layer::Values,
    },
    Fault {
        what: "halves in another order", kernel: "cross_entropy", constants: &[GRADIENT],
        from: "pack2x16float(low.xy), pack2x16float(low.zw),", to: "pack2x16float(low.zw), pack2x16float(low.xy),", found_by: Layer::Values,
    },
    Fault {
        what: "the count for the weight", kernel: "cross_entropy", constants: &[GRADIENT, HALVES],
        from: "select(0.0, count[1], counts)", to: "select(0.0, count[0], counts)", found_by: Layer::Values,
    },
    Fault {
        what: "no target to divide by", kernel: "cross_entropy_count", constants: &[],
        from: "max(sums[0], 1u)", to: "sums[0]", found_by: Layer::Values,
    },
    Fault {
        what: "one micro-batch where there are more", kernel: "verdict", constants: &[],
        from: "verdict[0] = clip / divisor;", to: "verdict[0] = clip / scale;", found_by: Layer::Values,
    },
    Fault {
        what: "a loss scale where there is none", kernel: "cross_entropy_count", constants: &[],
        from: "if (params.is_scaled != 0u)", to: "if (params.rows != 0u)", found_by: Layer::Values,
    },
    Fault {
        what: "no barrier in a tree", kernel: "cross_entropy_mean", constants: &[],
        from: "        workgroupBarrier();\n", to: "", found_by: Layer::Race,
    },
];
