// dh = dy * gelu'(h) * factor; one invocation handles one quad of elements. Prepend gelu.wgsl.
//
// Header: elem and out_elem, f32 or f16; GELU_TANH (bool).
// Workgroup: 256. Grid: ceil(quads / 256) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 dy elem; 1 h elem; 2 dh out_elem, written; 3 params.

struct Params {
    quads: u32,
    factor: f32, // a power of two, so that it rounds nothing
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<storage, read_write> dy: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> h: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> dh: array<vec4<out_elem>>;
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let quad = id.y * grid.x * 256u + id.x;
    if (quad >= params.quads) {
        return;
    }
    dh[quad] = vec4<out_elem>(vec4<f32>(dy[quad]) * gelu_derivative(vec4<f32>(h[quad])) * params.factor);
}
