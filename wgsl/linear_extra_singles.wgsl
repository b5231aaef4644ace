// The second matrix of a linear_* kernel's epilogue, one element at a time, for rows of any length;
// linear_extra_quads.wgsl is the faster form of this. Its rows are as long as out's.
//
// Expects from the header: extra_elem; EXTRA, the binding. Binds extra.

@group(0) @binding(EXTRA) var<storage, read_write> extra: array<extra_elem>;

// The `count` elements of the quad that belong to the row; zeros behind them.
fn load_extra(index: u32, count: u32) -> vec4<extra_elem> {
    var value = vec4<extra_elem>();
    for (var i = 0u; i < count; i++) {
        value[i] = extra[index + i];
    }
    return value;
}

fn store_extra(index: u32, count: u32, value: vec4<f32>) {
    for (var i = 0u; i < count; i++) {
        extra[index + i] = extra_elem(value[i]);
    }
}
