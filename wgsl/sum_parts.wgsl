// out = the sum of `parts` arrays of `count` elements that lie one behind the other, in their order.
//
// One invocation sums one element of the header's type: a quad, or a single where the count is no multiple of four.
// Header: element, vec4<f32> or f32; ACCUMULATE (bool): whether out's old content counts too.
// Workgroup: 256. Grid: ceil(count / 256) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 parts (parts, count); 1 out (count); 2 params. Counts are in elements of the header's type.

struct Params {
    count: u32,
    parts: u32,
    pad_0: u32,
    pad_1: u32,
}

@group(0) @binding(0) var<storage, read_write> parts: array<element>;
@group(0) @binding(1) var<storage, read_write> out: array<element>;
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let index = id.y * grid.x * 256u + id.x;
    if (index >= params.count) {
        return;
    }
    var sum = element();
    if (ACCUMULATE) {
        sum = out[index];
    }
    for (var part = 0u; part < params.parts; part++) {
        sum += parts[part * params.count + index];
    }
    out[index] = sum;
}
