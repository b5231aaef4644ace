// The epilogue of linear_scalar.wgsl: out = sum * gelu'(extra), four neighbouring columns of one row at a time: the gradient of what went
// into GELU, from the product that makes the gradient of what came out. There is no bias, and the sums have no factor to take out.
// Prepend gelu, linear_params, linear_quads or linear_singles, linear_extra_quads or _singles, linear_fetch.

fn finish(row: u32, col: u32, split: u32, sum: vec4<f32>, other: vec4<extra_elem>) {
    if (RAGGED && (row >= params.m || col >= params.n)) {
        return;
    }
    let value = sum * gelu_derivative(vec4<f32>(other));
    store_out(row * params.out_stride + col, min(4u, params.n - col), value);
}
