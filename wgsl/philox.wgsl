// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): a counter and a key give four random
// words, and nothing is stored. The CPU twin gives the same bits. Vectors (Random123, counter; key -> words):
//   00000000 x4; 00000000 x2                                            -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
//   ffffffff x4; ffffffff x2                                            -> 408f276d 41c83b0e a20bc7c6 6d5451fd
//   243f6a88 85a308d3 13198a2e 03707344; a4093822 299f31d0              -> d16cfe09 94fdcceb 5001e420 24126ea1
// Prepend multiply_high_u64.wgsl, or multiply_high_u32.wgsl where shaders have no 64-bit integers. It expects no constants and
// binds nothing.

const PHILOX_MULTIPLIER_0: u32 = 0xd2511f53u;
const PHILOX_MULTIPLIER_1: u32 = 0xcd9e8d57u;
const PHILOX_WEYL: vec2<u32> = vec2<u32>(0x9e3779b9u, 0xbb67ae85u);

fn philox4x32(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
    var state = counter;
    var round_key = key;
    for (var round = 0u; round < 10u; round++) {
        let high_0 = multiply_high(PHILOX_MULTIPLIER_0, state.x);
        let high_1 = multiply_high(PHILOX_MULTIPLIER_1, state.z);
        state = vec4<u32>(
            high_1 ^ state.y ^ round_key.x,
            PHILOX_MULTIPLIER_1 * state.z,
            high_0 ^ state.w ^ round_key.y,
            PHILOX_MULTIPLIER_0 * state.x,
        );
        round_key += PHILOX_WEYL;
    }
    return state;
}
