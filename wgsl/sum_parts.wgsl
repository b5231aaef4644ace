// out = the sum of `parts` arrays of `count` lanes that lie one behind the other, in their order. One invocation sums one lane.
// Prepend lanes4.wgsl or lanes1.wgsl.
//
// Header: elem, WIDTH; ACCUMULATE (bool): whether out's old content counts too.
// Workgroup: 256. Grid: ceil(count / 256) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 parts (parts, count * WIDTH) f32; 1 out (count * WIDTH) elem, written; 2 params.

struct Params {
    count: u32, // lanes
    parts: u32,
    pad_0: u32,
    pad_1: u32,
}

@group(0) @binding(0) var<storage, read_write> parts: array<lanes>;
@group(0) @binding(1) var<storage, read_write> out: array<stored>;
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let index = id.y * grid.x * 256u + id.x;
    if (index >= params.count) {
        return;
    }
    var sum = lanes();
    if (ACCUMULATE) {
        sum = lanes(out[index]);
    }
    for (var part = 0u; part < params.parts; part++) {
        sum += parts[part * params.count + index];
    }
    out[index] = stored(sum);
}
