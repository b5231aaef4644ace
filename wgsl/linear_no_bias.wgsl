// A linear_* kernel without a bias; linear_bias.wgsl is the other case.

fn bias_at(col: u32) -> vec4<f32> {
    return vec4<f32>();
}
