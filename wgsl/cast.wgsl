// y = x, rounded to the header's type. One invocation handles one lane. Prepend lanes4.wgsl or lanes1.wgsl.
//
// Header: elem (f16), WIDTH.
// Workgroup: 256. Grid: ceil(count / 256) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 x (count * WIDTH) f32; 1 y (count * WIDTH) elem, written; 2 params.

struct Params {
    count: u32, // lanes
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<lanes>;
@group(0) @binding(1) var<storage, read_write> y: array<stored>;
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let index = id.y * grid.x * 256u + id.x;
    if (index < params.count) {
        y[index] = stored(x[index]);
    }
}
