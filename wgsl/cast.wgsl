// y = x of several tensors, rounded to the header's type. Prepend lanes4.wgsl or lanes1.wgsl, cast_slot.wgsl for each slot, and
// slots.wgsl.
//
// Header: elem (f16), WIDTH, SLOTS, CHUNK.
// Workgroup: 256 threads. Grid: the workgroups of all slots, folded into (x, y).
//
// Bindings: x, y of each slot; then params.

struct Params {
    groups: u32,
    before: u32,
    pad_0: u32,
    pad_1: u32,
    slots: array<Slot, SLOTS>,
}

@group(0) @binding(2u * SLOTS) var<uniform> params: Params;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    visit_share(workgroup.y * grid.x + workgroup.x, thread);
}
