// parts (blocks, columns): the sums of the columns of x (rows, columns) over blocks of BLOCK_ROWS rows, times factor.
//
// One invocation sums one column of one block; sum_parts.wgsl adds the blocks.
// Header: elem, f32 or f16; BLOCK_ROWS.
// Workgroup: 64. Grid: blocks * ceil(columns / 64) workgroups, folded into (x, y) when over 65535.
// Bindings: 0 x (rows, columns) elem; 1 parts (blocks, columns) f32, written; 2 params.

struct Params {
    rows: u32,
    columns: u32,
    factor: f32,
    pad_1: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<elem>;
@group(0) @binding(1) var<storage, read_write> parts: array<f32>;
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = group.y * grid.x + group.x;
    let column_groups = (params.columns + 63u) / 64u;
    let block = index / column_groups;
    let column = index % column_groups * 64u + thread;
    let first = block * BLOCK_ROWS;
    if (first >= params.rows || column >= params.columns) {
        return;
    }
    var sum = 0.0;
    for (var row = first; row < min(first + BLOCK_ROWS, params.rows); row++) {
        sum += f32(x[row * params.columns + column]);
    }
    parts[block * params.columns + column] = sum * params.factor;
}
