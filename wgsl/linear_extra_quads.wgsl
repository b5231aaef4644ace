// The second matrix of a linear_* kernel's epilogue, four neighbours at a time; linear_extra_singles.wgsl is the other form.
// Its rows are as long as out's.
//
// Expects from the header: extra_elem; EXTRA, the binding. Binds extra.

@group(0) @binding(EXTRA) var<storage, read_write> extra: array<vec4<extra_elem>>;

fn load_extra(index: u32, count: u32) -> vec4<extra_elem> {
    return extra[index / 4u];
}

fn store_extra(index: u32, count: u32, value: vec4<f32>) {
    extra[index / 4u] = vec4<extra_elem>(value);
}
