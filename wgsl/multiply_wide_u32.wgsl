// a * b in 64 bits, (low word, high word), put together from products of 16-bit halves: for shaders without 64-bit integers.
fn multiply_wide(a: u32, b: u32) -> vec2<u32> {
    let a_low = a & 0xffffu;
    let a_high = a >> 16u;
    let b_low = b & 0xffffu;
    let b_high = b >> 16u;
    let low_high = a_low * b_high + ((a_low * b_low) >> 16u);
    let high_low = a_high * b_low + (low_high & 0xffffu);
    return vec2<u32>(a * b, a_high * b_high + (low_high >> 16u) + (high_low >> 16u));
}
