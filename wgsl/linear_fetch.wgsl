// What the epilogues of the linear_* kernels read of a second matrix. Prepend linear_params, linear_extra_quads or _singles.

// What of extra belongs to a quad of out; zeros outside of it. Fetched ahead, since nothing else hides the time it takes.
fn fetch_extra(row: u32, col: u32) -> vec4<extra_elem> {
    var value = vec4<extra_elem>();
    if (!RAGGED || (row < params.m && col < params.n)) {
        value = load_extra(row * params.out_stride + col, min(4u, params.n - col));
    }
    return value;
}
