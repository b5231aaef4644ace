// AdamW (decoupled decay, PyTorch's order of operations) on one parameter, in place, one lane a thread:
//     g = g * factor, m = beta1 * m + (1 - beta1) * g, v = beta2 * v + (1 - beta2) * g^2
//     p = keep * p - rate * m / (sqrt(v) * root_factor + epsilon)
// or nothing at all, where the verdict on the step is so. Prepend lanes4.wgsl or lanes1.wgsl.
//
// Header: elem (f32), WIDTH.
// Workgroup: 256 threads. Grid: ceil(count / 256), folded into (x, y).
//
// Bindings: 0 p, 1 g, 2 m, 3 v (count * WIDTH) f32, p, m and v rewritten; 4 verdict (4) f32, from verdict.wgsl; 5 params.

struct Params {
    count: u32, // lanes
    beta1: f32,
    rest1: f32, // 1 - beta1
    beta2: f32,
    rest2: f32, // 1 - beta2
    keep: f32,  // 1 - lr * decay
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read_write> p: array<lanes>;
@group(0) @binding(1) var<storage, read_write> g: array<lanes>;
@group(0) @binding(2) var<storage, read_write> m: array<lanes>;
@group(0) @binding(3) var<storage, read_write> v: array<lanes>;
@group(0) @binding(4) var<storage, read_write> verdict: array<f32>;
@group(0) @binding(5) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let index = id.y * grid.x * 256u + id.x;
    if (index >= params.count || verdict[1] == 0.0) {
        return;
    }
    let slope = g[index] * verdict[0];
    let first = m[index] * params.beta1 + slope * params.rest1;
    let second = v[index] * params.beta2 + slope * slope * params.rest2;
    m[index] = first;
    v[index] = second;
    let denominator = sqrt(second) * verdict[3] + lanes(params.epsilon);
    p[index] = p[index] * params.keep - first / denominator * verdict[2];
}
