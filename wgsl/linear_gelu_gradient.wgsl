// The epilogue of a linear_* kernel: out = sum * gelu'(extra), four neighbouring columns of one row at a time: the gradient of
// what GELU was made from. Prepend gelu, linear_params, linear_quads, _octs or _singles, linear_extra_quads or _singles.

fn finish(row: u32, col: u32, split: u32, sum: vec4<f32>) {
    if (row >= params.m || col >= params.n) {
        return;
    }
    let count = min(4u, params.n - col);
    let index = row * params.out_stride + col;
    store_out(index, count, sum * params.out_scale * gelu_derivative(load_extra(index, count)));
}
