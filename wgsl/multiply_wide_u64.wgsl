// a * b in 64 bits, (low word, high word), where shaders have 64-bit integers: one instruction of most GPUs.
fn multiply_wide(a: u32, b: u32) -> vec2<u32> {
    let product = u64(a) * u64(b);
    return vec2<u32>(u32(product), u32(product >> 32u));
}
