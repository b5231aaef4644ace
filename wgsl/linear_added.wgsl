// The epilogue of a linear_* kernel: out = out + sum + bias, four neighbouring columns of one row at a time.
// Here extra_elem is out_elem. Prepend linear_params, linear_quads or linear_singles, linear_bias or linear_no_bias.

// What a quad of out holds; zeros outside of it.
fn fetch_extra(row: u32, col: u32) -> vec4<extra_elem> {
    var value = vec4<extra_elem>();
    if (!RAGGED || (row < params.m && col < params.n)) {
        value = load_out(row * params.out_stride + col, min(4u, params.n - col));
    }
    return value;
}

fn finish(row: u32, col: u32, split: u32, sum: vec4<f32>, other: vec4<extra_elem>) {
    if (RAGGED && (row >= params.m || col >= params.n)) {
        return;
    }
    let value = vec4<f32>(other) + (sum * params.out_scale + bias_at(col));
    store_out(row * params.out_stride + col, min(4u, params.n - col), value);
}
