// The epilogue of a linear_* kernel: extra = sum + bias, out = gelu(extra), four neighbouring columns of one row at a time.
// Prepend gelu, linear_params, linear_quads or linear_singles, linear_extra_quads or _singles, linear_bias or linear_no_bias.

fn fetch_extra(row: u32, col: u32) -> vec4<extra_elem> {
    return vec4<extra_elem>();
}

fn finish(row: u32, col: u32, split: u32, sum: vec4<f32>, other: vec4<extra_elem>) {
    if (RAGGED && (row >= params.m || col >= params.n)) {
        return;
    }
    let count = min(4u, params.n - col);
    let index = row * params.out_stride + col;
    let hidden = unscaled(sum) + bias_at(col);
    store_extra(index, count, hidden);
    store_out(index, count, gelu(hidden));
}
