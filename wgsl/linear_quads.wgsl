// How the linear_* kernels reach storage: four neighbours at a time, where every row begins at a multiple of four.
// linear_singles.wgsl is the same for rows of any length, linear_octs.wgsl faster for f16. Loads count UNITs, stores
// elements. Prepend linear_pack4.wgsl.
//
// Expects from the header: a_elem, b_elem, out_elem (f32 or f16).
// Bindings: 0 a, 1 b, 2 out.

const UNIT: u32 = PACK;

@group(0) @binding(0) var<storage, read_write> a: array<vec4<a_elem>>;
@group(0) @binding(1) var<storage, read_write> b: array<vec4<b_elem>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<out_elem>>;

fn load_a(index: u32) -> a_pack {
    return a[index];
}

fn load_b(index: u32) -> b_pack {
    return b[index];
}

// `count` elements of the quad belong to the row; the others are its padding, and may be written.
fn store_out(index: u32, count: u32, value: vec4<f32>) {
    out[index / 4u] = vec4<out_elem>(value);
}

fn load_out(index: u32, count: u32) -> vec4<out_elem> {
    return out[index / 4u];
}
