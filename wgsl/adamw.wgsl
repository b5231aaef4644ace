// AdamW (decoupled decay, PyTorch's order of operations) on several parameters, in place:
//     g = g * factor, m = beta1 * m + (1 - beta1) * g, v = beta2 * v + (1 - beta2) * g^2
//     p = keep * p - rate * m / (sqrt(v) * root_factor + epsilon)
// or nothing at all, where the verdict on the step is so. keep is the verdict's, 1 - lr * decay, where a slot's factor is 1, else 1.
// Prepend lanes4.wgsl or lanes1.wgsl, adamw_slot.wgsl for each slot, and slots.wgsl.
//
// Header: elem (f32), WIDTH, SLOTS, CHUNK.
// Workgroup: 256 threads. Grid: the workgroups of all slots, folded into (x, y).
//
// Bindings: p, g, m, v of each slot; then verdict (5) f32, from verdict.wgsl; then params.

struct Params {
    groups: u32,
    before: u32,
    pad_0: u32,
    pad_1: u32,
    slots: array<Slot, SLOTS>,
    beta1: f32,
    rest1: f32, // 1 - beta1
    beta2: f32,
    rest2: f32, // 1 - beta2
    epsilon: f32,
}

@group(0) @binding(4u * SLOTS) var<storage, read_write> verdict: array<f32>;
@group(0) @binding(4u * SLOTS + 1u) var<uniform> params: Params;

struct State {
    p: lanes,
    m: lanes,
    v: lanes,
}

fn updated(state: State, g: lanes, decays: f32) -> State {
    let keep = select(1.0, verdict[4], decays != 0.0);
    let slope = g * verdict[0];
    let first = state.m * params.beta1 + slope * params.rest1;
    let second = state.v * params.beta2 + slope * slope * params.rest2;
    let denominator = sqrt(second) * verdict[3] + lanes(params.epsilon);
    return State(state.p * keep - first / denominator * verdict[2], first, second);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    if (verdict[1] != 0.0) {
        visit_share(workgroup.y * grid.x + workgroup.x, thread);
    }
}
