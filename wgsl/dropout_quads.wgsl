// y = x * mask as in dropout.wgsl, for columns that are a multiple of four: one invocation moves one quad. Prepend philox.wgsl.
//
// Constants from the header: none.
// Workgroup: 256. Grid: ceil(rows * columns / 1024) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 x (rows, columns); 1 y (rows, columns), written; 2 params.

struct Params {
    rows: u32,
    columns: u32,
    seed_lo: u32,
    seed_hi: u32,
    step: u32,
    site: u32,
    drop_threshold: u32,
    keep_scale: f32,
}

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let quads_per_row = params.columns / 4u;
    let quad = id.y * grid.x * 256u + id.x;
    if (quad >= params.rows * quads_per_row) {
        return;
    }
    let words = philox4x32(
        vec4<u32>(quad % quads_per_row, quad / quads_per_row, params.step, params.site),
        vec2<u32>(params.seed_lo, params.seed_hi),
    );
    y[quad] = select(vec4<f32>(), x[quad] * params.keep_scale, words >= vec4<u32>(params.drop_threshold));
}
