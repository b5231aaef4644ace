// count: how many targets are not ignored, at least 1, and what each of them weighs in the gradients, scale / count.
// One workgroup in all: a fixed order of sums.
//
// Workgroup: 256. Grid: 1.
// Bindings: 0 targets (rows) i32; 1 scale (at least 1) f32, of which the first counts; 2 count (2) f32, written; 3 params.

struct Params {
    rows: u32,
    is_scaled: u32, // 0: scale is not read, and counts 1
    pad_0: u32,
    pad_1: u32,
}

const THREADS: u32 = 256u;

@group(0) @binding(0) var<storage, read_write> targets: array<i32>;
@group(0) @binding(1) var<storage, read_write> scale: array<f32>;
@group(0) @binding(2) var<storage, read_write> count: array<f32>;
@group(0) @binding(3) var<uniform> params: Params;

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
        let counted = f32(max(sums[0], 1u));
        count[0] = counted;
        var factor = 1.0;
        if (params.is_scaled != 0u) {
            factor = scale[0];
        }
        count[1] = factor / counted;
    }
}
