// The last step of two sums over rows: first[c] = sum over r of partials[r][0][c], second[c] = sum of partials[r][1][c].
//
// 32 threads share a lane of columns, each adding every 32nd row, and a tree adds them: the order depends on the number of
// rows alone. Prepend lanes4.wgsl or lanes1.wgsl.
//
// Header: elem (of no effect here), WIDTH.
// Workgroup: 256 threads, 8 lanes of the 2 * C / WIDTH. Grid: ceil(2 * C / WIDTH / 8), folded into (x, y).
// Workgroup memory: 256 * 4 * WIDTH bytes (4096 at most).
//
// Bindings: 0 partials (rows, 2, C) f32; 1 first (C) f32, written; 2 second (C) f32, written; 3 params.

struct Params {
    rows: u32,
    lanes: u32, // C / WIDTH
}

@group(0) @binding(0) var<storage, read_write> partials: array<lanes>;
@group(0) @binding(1) var<storage, read_write> first: array<lanes>;
@group(0) @binding(2) var<storage, read_write> second: array<lanes>;
@group(0) @binding(3) var<uniform> params: Params;

const TILE: u32 = 8u;
const PARTS: u32 = 32u;
const THREADS: u32 = TILE * PARTS;

var<workgroup> sums: array<lanes, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let lane = (workgroup.y * grid.x + workgroup.x) * TILE + thread % TILE;
    let part = thread / TILE;
    var sum = lanes();
    if (lane < 2u * params.lanes) {
        for (var row = part; row < params.rows; row += PARTS) {
            sum += partials[row * 2u * params.lanes + lane];
        }
    }
    sums[thread] = sum;
    for (var reach = PARTS / 2u; reach > 0u; reach /= 2u) {
        workgroupBarrier();
        if (part < reach) {
            sums[thread] += sums[thread + reach * TILE];
        }
    }
    if (part == 0u) {
        if (lane < params.lanes) {
            first[lane] = sums[thread];
        } else if (lane < 2u * params.lanes) {
            second[lane - params.lanes] = sums[thread];
        }
    }
}
