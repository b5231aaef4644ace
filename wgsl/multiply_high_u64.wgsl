// The upper 32 bits of a * b where shaders have 64-bit integers: one instruction of most GPUs.
fn multiply_high(a: u32, b: u32) -> u32 {
    return u32((u64(a) * u64(b)) >> 32u);
}
