// count: how many targets are not ignored, at least 1. One workgroup in all: a fixed order of sums.
//
// Workgroup: 256. Grid: 1.
// Bindings: 0 targets (rows) i32; 1 count (1) f32, written; 2 params.

struct Params {
    rows: u32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

const THREADS: u32 = 256u;

@group(0) @binding(0) var<storage, read_write> targets: array<i32>;
@group(0) @binding(1) var<storage, read_write> count: array<f32>;
@group(0) @binding(2) var<uniform> params: Params;

var<workgroup> sums: array<u32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) thread: u32) {
    var sum = 0u;
    for (var row = thread; row < params.rows; row += THREADS) {
        sum += select(0u, 1u, targets[row] >= 0);
    }
    sums[thread] = sum;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            sums[thread] += sums[thread + half];
        }
    }
    if (thread == 0u) {
        count[0] = f32(max(sums[0], 1u));
    }
}
