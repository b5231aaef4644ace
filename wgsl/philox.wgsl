// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): a counter and a key give four random
// words, and nothing is stored. Seven rounds are the fewest that pass BigCrush there, and masks need no more. The CPU twin gives the same bits. Vectors (Random123, counter; key -> words):
//   00000000 x4; 00000000 x2                                            -> 5f6fb709 0d893f64 4f121f81 4f730a48
//   ffffffff x4; ffffffff x2                                            -> 5207ddc2 45165e59 4d8ee751 8c52f662
//   243f6a88 85a308d3 13198a2e 03707344; a4093822 299f31d0              -> 4dfccaba 190a87f0 c47362ba b6b5242a
// Prepend multiply_wide_u64.wgsl, or multiply_wide_u32.wgsl where shaders have no 64-bit integers. It expects no constants and
// binds nothing.

const PHILOX_MULTIPLIER_0: u32 = 0xd2511f53u;
const PHILOX_MULTIPLIER_1: u32 = 0xcd9e8d57u;
const PHILOX_WEYL: vec2<u32> = vec2<u32>(0x9e3779b9u, 0xbb67ae85u);

fn philox4x32(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
    var state = counter;
    var round_key = key;
    for (var round = 0u; round < 7u; round++) {
        let product_0 = multiply_wide(PHILOX_MULTIPLIER_0, state.x);
        let product_1 = multiply_wide(PHILOX_MULTIPLIER_1, state.z);
        state = vec4<u32>(
            product_1.y ^ state.y ^ round_key.x, product_1.x, product_0.y ^ state.w ^ round_key.y, product_0.x);
        round_key += PHILOX_WEYL;
    }
    return state;
}
