// Several tensors in one launch, one a slot. Workgroups are numbered through all slots; each has CHUNK neighbouring lanes of one
// tensor, or what is left of it. src/kernel/slots.rs writes what stands in front: for each slot its buffers and visit_0, visit_1,
// ..., which do the kernel's work on the lanes start, start + THREADS, ... below end; and visit, which calls one of them.
//
// Header: SLOTS, CHUNK.

struct Slot {
    first: u32,  // its first workgroup
    count: u32,  // lanes
    factor: f32, // of the kernel's own
    pad: u32,
}

const THREADS: u32 = 256u;

// A thread's part of a workgroup's share. Workgroups behind the last have none.
fn visit_share(group: u32, thread: u32) {
    var slot = 0u;
    for (var i = 1u; i < SLOTS; i++) {
        slot = select(slot, i, params.slots[i].first <= group);
    }
    let start = (group - params.slots[slot].first) * CHUNK;
    visit(slot, start + thread, min(start + CHUNK, params.slots[slot].count));
}
