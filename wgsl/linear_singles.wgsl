// How the linear_* kernels reach storage: one element at a time, for rows of any length.
// linear_quads.wgsl is the faster form of this. Loads and stores count elements (a UNIT is one). Prepend
// linear_pack4.wgsl.
//
// Expects from the header: a_elem, b_elem, out_elem (f32 or f16).
// Bindings: 0 a, 1 b, 2 out.

const UNIT: u32 = 1u;

@group(0) @binding(0) var<storage, read_write> a: array<a_elem>;
@group(0) @binding(1) var<storage, read_write> b: array<b_elem>;
@group(0) @binding(2) var<storage, read_write> out: array<out_elem>;

// Four neighbours; beyond the matrix's end its last element stands in. What reaches over a row's end is masked later.
fn load_a(index: u32) -> a_pack {
    let last = params.a_last;
    return a_pack(
        a[min(index, last)], a[min(index + 1u, last)], a[min(index + 2u, last)], a[min(index + 3u, last)]);
}

fn load_b(index: u32) -> b_pack {
    let last = params.b_last;
    return b_pack(
        b[min(index, last)], b[min(index + 1u, last)], b[min(index + 2u, last)], b[min(index + 3u, last)]);
}

// The `count` elements of the quad that belong to the row.
fn store_out(index: u32, count: u32, value: vec4<f32>) {
    for (var i = 0u; i < count; i++) {
        out[index + i] = out_elem(value[i]);
    }
}

// The `count` elements of the quad that belong to the row; zeros behind them.
fn load_out(index: u32, count: u32) -> vec4<out_elem> {
    var value = vec4<out_elem>();
    for (var i = 0u; i < count; i++) {
        value[i] = out[index + i];
    }
    return value;
}
