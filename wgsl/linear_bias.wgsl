// The bias of a linear_* kernel. Expects BIAS_BINDING from the header and linear_params.wgsl. Binds bias (N).

@group(0) @binding(BIAS_BINDING) var<storage, read_write> bias: array<f32>;

// Four neighbours; beyond the end the last one stands in.
fn bias_at(col: u32) -> vec4<f32> {
    let last = params.n - 1u;
    return vec4<f32>(
        bias[col], bias[min(col + 1u, last)], bias[min(col + 2u, last)], bias[min(col + 3u, last)]);
}
