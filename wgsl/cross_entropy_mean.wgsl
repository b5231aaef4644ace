// loss = the sum of losses (rows) / count. One workgroup in all: a fixed order of sums.
//
// Workgroup: 256. Grid: 1.
// Bindings: 0 losses (rows) f32; 1 count (2) f32, of which the first counts; 2 loss (1) f32, written; 3 params.

struct Params {
    rows: u32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

const THREADS: u32 = 256u;

@group(0) @binding(0) var<storage, read_write> losses: array<f32>;
@group(0) @binding(1) var<storage, read_write> count: array<f32>;
@group(0) @binding(2) var<storage, read_write> loss: array<f32>;
@group(0) @binding(3) var<uniform> params: Params;

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var row = thread; row < params.rows; row += THREADS) {
        sum += losses[row];
    }
    sums[thread] = sum;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            sums[thread] += sums[thread + half];
        }
    }
    if (thread == 0u) {
        loss[0] = sums[0] / count[0];
    }
}
