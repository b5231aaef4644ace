// y = x * mask * factor, where mask is 0 or keep_scale, or 1 without DROPOUT. One invocation handles one lane of one row. Four neighbouring columns share a
// Philox block: counter (column / 4, row, step, site), key (seed_lo, seed_hi). Prepend philox.wgsl and lanes4.wgsl or
// lanes1.wgsl.
//
// Header: elem, out_elem, WIDTH, DROPOUT (bool).
// Workgroup: 256. Grid: ceil(rows * lanes / 256) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 x (rows, lanes * WIDTH) elem; 1 y (rows, lanes * WIDTH) out_elem, written; 2 clock (4) u32; 3 params.

struct Params {
    rows: u32,
    lanes: u32, // of a row
    seed_lo: u32,
    seed_hi: u32,
    step: u32, // of the masks, counted from the clock
    site: u32,
    drop_threshold: u32,
    keep_scale: f32,
    factor: f32, // a power of two, so that it rounds nothing
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<stored>;
@group(0) @binding(1) var<storage, read_write> y: array<made>;
@group(0) @binding(2) var<storage, read_write> clock: array<u32>;
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let index = id.y * grid.x * 256u + id.x;
    if (index >= params.rows * params.lanes) {
        return;
    }
    var value = lanes(x[index]);
    if (DROPOUT) {
        let column = index % params.lanes * WIDTH;
        let block = philox4x32(
            vec4<u32>(column / 4u, index / params.lanes, params.step + clock[0], params.site),
            vec2<u32>(params.seed_lo, params.seed_hi),
        );
        let kept = own_words(block, column) >= lane_words(params.drop_threshold);
        value = select(lanes(), value * params.keep_scale, kept);
    }
    y[index] = made(value * params.factor);
}
