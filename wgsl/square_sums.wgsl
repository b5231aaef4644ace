// Partial sums of g^2, one a workgroup, into this tensor's places of a buffer that all gradients share; verdict.wgsl
// adds them up. A thread walks over the elements in steps of the grid: equal grids give equal bits. Prepend lanes4.wgsl or
// lanes1.wgsl.
//
// Header: elem (f32), WIDTH.
// Workgroup: 256 threads. Grid: any number of workgroups up to 65535, x only.
// Workgroup memory: 1024 bytes.
//
// Bindings: 0 g (count * WIDTH) f32; 1 sums f32, written from `first` on, one a workgroup; 2 params.

struct Params {
    count: u32, // lanes
    first: u32,
}

@group(0) @binding(0) var<storage, read_write> g: array<lanes>;
@group(0) @binding(1) var<storage, read_write> square_sums: array<f32>;
@group(0) @binding(2) var<uniform> params: Params;

const THREADS: u32 = 256u;
const IN_FLIGHT: u32 = 4u;

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let step = grid.x * THREADS;
    var sum = 0.0;
    for (var start = workgroup.x * THREADS + thread; start < params.count; start += step * IN_FLIGHT) {
        for (var j = 0u; j < IN_FLIGHT; j++) {
            let index = start + j * step;
            let value = g[min(index, params.count - 1u)]; // no branch, so the loads overlap
            sum += select(0.0, total(value * value), index < params.count);
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
        square_sums[params.first + workgroup.x] = sums[0];
    }
}
