// What of A and B moves at once in the linear_* kernels: four neighbours of any type. linear_octs.wgsl has the same names for
// eight in f16.
//
// Expects from the header: a_elem, b_elem (f32 or f16).

const PACK: u32 = 4u;
alias a_pack = vec4<a_elem>;
alias b_pack = vec4<b_elem>;

// The pack with zeros behind its first `count` elements.
fn first_of_a(pack: a_pack, count: u32) -> a_pack {
    return select(a_pack(), pack, vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(count));
}

fn first_of_b(pack: b_pack, count: u32) -> b_pack {
    return select(b_pack(), pack, vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(count));
}

// Quad i of the pack.
fn quad_of_a(pack: a_pack, i: u32) -> vec4<f32> {
    return vec4<f32>(pack);
}

fn quad_of_b(pack: b_pack, i: u32) -> vec4<f32> {
    return vec4<f32>(pack);
}
