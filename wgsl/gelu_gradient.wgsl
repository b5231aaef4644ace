// dh = dy * gelu'(h); one invocation handles one quad of elements. Prepend gelu.wgsl.
//
// Header: elem, f32 or f16; GELU_TANH (bool).
// Workgroup: 256. Grid: ceil(quads / 256) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 dy; 1 h; 2 dh, written; 3 params.

struct Params {
    quads: u32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<storage, read_write> dy: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> h: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> dh: array<vec4<elem>>;
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let quad = id.y * grid.x * 256u + id.x;
    if (quad >= params.quads) {
        return;
    }
    dh[quad] = vec4<elem>(vec4<f32>(dy[quad]) * gelu_derivative(vec4<f32>(h[quad])));
}
