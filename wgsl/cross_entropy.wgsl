// Losses of some rows of logits, and the logits' gradient in their place. One workgroup handles one row.
//
//     loss = log(sum(exp(logits))) - logits[target]          0 where the target is ignored
//     dlogits = (softmax(logits) - onehot(target)) * weight  0 there, and in the row's padding
//
// Header: elem, f32 or f16: the logits and their gradient; GRADIENT (bool): whether the logits are replaced.
// Workgroup: 256. Grid: rows workgroups, folded into (x, y) when over 65535.
// Bindings: 0 logits (rows, stride) elem; 1 targets (all rows) i32, -1 is ignored; 2 losses (all rows) f32, written;
// 3 count (2) f32: of all rows, and the weight of each; 4 params.

struct Params {
    rows: u32,
    vocab: u32,
    stride: u32,    // elements from row to row of the logits, a multiple of four, at least vocab
    first_row: u32, // of the logits, among all rows
}

const THREADS: u32 = 256u;

@group(0) @binding(0) var<storage, read_write> logits: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> targets: array<i32>;
@group(0) @binding(2) var<storage, read_write> losses: array<f32>;
@group(0) @binding(3) var<storage, read_write> count: array<f32>;
@group(0) @binding(4) var<uniform> params: Params;

const MASKED: f32 = -1e30; // finite: fast math may assume that no infinity exists

var<workgroup> shared_maximum: array<f32, THREADS>;
var<workgroup> shared_sum: array<f32, THREADS>;

fn columns_of(quad: u32) -> vec4<u32> {
    return 4u * quad + vec4<u32>(0u, 1u, 2u, 3u);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * grid.x + group.x;
    if (row >= params.rows) {
        return; // the whole workgroup: the grid was folded
    }
    let quads = params.stride / 4u;
    let base = row * quads;

    // Each thread's maximum, and its sum relative to that, in one pass.
    var maximum = MASKED;
    var sum = 0.0;
    for (var quad = thread; quad < quads; quad += THREADS) {
        let values = select(vec4<f32>(MASKED), vec4<f32>(logits[base + quad]), columns_of(quad) < vec4<u32>(params.vocab));
        let larger = max(maximum, max(max(values.x, values.y), max(values.z, values.w)));
        sum = sum * exp(maximum - larger) + dot(exp(values - larger), vec4<f32>(1.0));
        maximum = larger;
    }
    shared_maximum[thread] = maximum;
    shared_sum[thread] = sum;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            let other = shared_maximum[thread + half];
            let larger = max(maximum, other);
            sum = sum * exp(maximum - larger) + shared_sum[thread + half] * exp(other - larger);
            maximum = larger;
            shared_maximum[thread] = maximum;
            shared_sum[thread] = sum;
        }
    }
    workgroupBarrier();
    let row_maximum = shared_maximum[0];
    let row_sum = shared_sum[0];

    let target_column = targets[params.first_row + row];
    let counts = target_column >= 0;
    if (thread == 0u) {
        var loss = 0.0;
        if (counts) {
            loss = row_maximum + log(row_sum) - f32(logits[base + u32(target_column) / 4u][u32(target_column) % 4u]);
        }
        losses[params.first_row + row] = loss;
    }
    if (GRADIENT) {
        storageBarrier(); // thread 0 has read the target's logit before anyone replaces it
        let weight = select(0.0, count[1], counts);
        for (var quad = thread; quad < quads; quad += THREADS) {
            let columns = columns_of(quad);
            let softmax = exp(vec4<f32>(logits[base + quad]) - row_maximum) / row_sum;
            let gradient = softmax - select(vec4<f32>(), vec4<f32>(1.0), columns == vec4<u32>(u32(target_column)));
            let inside = columns < vec4<u32>(params.vocab);
            logits[base + quad] = vec4<elem>(select(vec4<f32>(), weight * gradient, inside));
        }
    }
}
