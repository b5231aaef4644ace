// Partial sums of g^2 of several gradients, one a workgroup, each in its place of a buffer that all launches share;
// verdict.wgsl adds them up. What a workgroup adds, and in what order, depends on the sizes alone: equal sizes give equal bits.
// Prepend lanes4.wgsl or lanes1.wgsl, square_sums_slot.wgsl for each slot, and slots.wgsl.
//
// Header: elem (f32), WIDTH, SLOTS, CHUNK.
// Workgroup: 256 threads. Grid: the workgroups of all slots, folded into (x, y).
// Workgroup memory: 1024 bytes.
//
// Bindings: g of each slot; then sums f32, written from `before` on, one a workgroup; then params.

struct Params {
    groups: u32, // that have a place
    before: u32, // places of the launches before this one
    pad_0: u32,
    pad_1: u32,
    slots: array<Slot, SLOTS>,
}

@group(0) @binding(SLOTS) var<storage, read_write> square_sums: array<f32>;
@group(0) @binding(SLOTS + 1u) var<uniform> params: Params;

const IN_FLIGHT: u32 = 4u;

var<private> sum: f32; // a thread's
var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = workgroup.y * grid.x + workgroup.x;
    sum = 0.0;
    visit_share(group, thread);
    sums[thread] = sum;
    for (var reach = THREADS / 2u; reach > 0u; reach /= 2u) {
        workgroupBarrier();
        if (thread < reach) {
            sums[thread] += sums[thread + reach];
        }
    }
    if (thread == 0u && group < params.groups) {
        square_sums[params.before + group] = sums[0];
    }
}
