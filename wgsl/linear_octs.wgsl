// How the cooperative linear_* kernels reach f16 storage: eight neighbours at a time, where every row begins at a multiple of
// eight. As bits, since 16 bytes of f16 are no type of WGSL's and two loads of eight bytes cost a fifth of the speed on an H200
// (218 and 251 TFLOP/s). linear_quads.wgsl and linear_pack4.wgsl are the other form. Loads
// count UNITs, stores elements.
//
// Expects from the header: out_elem (f32 or f16).
// Bindings: 0 a, 1 b, 2 out.

const PACK: u32 = 8u;
const UNIT: u32 = PACK;
alias a_pack = vec4<u32>;
alias b_pack = vec4<u32>;

@group(0) @binding(0) var<storage, read_write> a: array<a_pack>;
@group(0) @binding(1) var<storage, read_write> b: array<b_pack>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<out_elem>>;

fn load_a(index: u32) -> a_pack {
    return a[index];
}

fn load_b(index: u32) -> b_pack {
    return b[index];
}

// The pack with zeros behind its first `count` elements: a word holds two, the first in its low half.
fn first_of_a(pack: a_pack, count: u32) -> a_pack {
    let first = vec4<u32>(0u, 2u, 4u, 6u);
    let low = select(vec4<u32>(), vec4<u32>(0xffffu), first < vec4<u32>(count));
    let high = select(vec4<u32>(), vec4<u32>(0xffff0000u), first + 1u < vec4<u32>(count));
    return pack & (low | high);
}

fn first_of_b(pack: b_pack, count: u32) -> b_pack {
    return first_of_a(pack, count);
}

// Quad i of the pack.
fn quad_of_a(pack: a_pack, i: u32) -> vec4<f32> {
    let words = select(pack.xy, pack.zw, i == 1u);
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}

fn quad_of_b(pack: b_pack, i: u32) -> vec4<f32> {
    return quad_of_a(pack, i);
}

// `count` elements of the quad belong to the row; the others are its padding, and may be written.
fn store_out(index: u32, count: u32, value: vec4<f32>) {
    out[index / 4u] = vec4<out_elem>(value);
}

fn load_out(index: u32, count: u32) -> vec4<out_elem> {
    return out[index / 4u];
}
