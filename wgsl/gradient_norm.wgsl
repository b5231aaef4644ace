// The global norm, and what it makes of the gradients: norm = sqrt(sum of all partial sums), scale = min(1, limit / (norm +
// 1e-6)), PyTorch's clip, or 1 where there is no limit.
//
// Header: none.
// Workgroup: 256 threads. Grid: one workgroup.
// Workgroup memory: 1024 bytes.
//
// Bindings: 0 sums (count) f32; 1 norm (1) f32, written; 2 scale (1) f32, written; 3 params.

struct Params {
    count: u32,
    limit: f32, // 0: none
}

@group(0) @binding(0) var<storage, read_write> square_sums: array<f32>;
@group(0) @binding(1) var<storage, read_write> norm: array<f32>;
@group(0) @binding(2) var<storage, read_write> scale: array<f32>;
@group(0) @binding(3) var<uniform> params: Params;

const THREADS: u32 = 256u;
const IN_FLIGHT: u32 = 8u;

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var start = thread; start < params.count; start += THREADS * IN_FLIGHT) {
        for (var j = 0u; j < IN_FLIGHT; j++) {
            let index = start + j * THREADS;
            let value = square_sums[min(index, params.count - 1u)]; // no branch, so the loads overlap
            sum += select(0.0, value, index < params.count);
        }
    }
    sums[thread] = sum;
    for (var reach = THREADS / 2u; reach > 0u; reach /= 2u) {
        workgroupBarrier();
        if (thread < reach) {
            sums[thread] += sums[thread + reach];
        }
    }
    if (thread == 0u) {
        let length = sqrt(sums[0]);
        norm[0] = length;
        scale[0] = select(1.0, min(1.0, params.limit / (length + 1e-6)), params.limit > 0.0);
    }
}
