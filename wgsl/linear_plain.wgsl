// The epilogue of a linear_* kernel: out = sum + bias, four neighbouring columns of one row at a time.
// Prepend linear_params, linear_quads or linear_singles, linear_bias or linear_no_bias.

fn fetch_extra(row: u32, col: u32) -> vec4<extra_elem> {
    return vec4<extra_elem>();
}

fn finish(row: u32, col: u32, split: u32, sum: vec4<f32>, other: vec4<extra_elem>) {
    if (RAGGED && (row >= params.m || col >= params.n)) {
        return;
    }
    let index = (split * params.m + row) * params.out_stride + col;
    store_out(index, min(4u, params.n - col), unscaled(sum) + bias_at(col));
}
