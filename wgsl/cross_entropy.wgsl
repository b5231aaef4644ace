// Losses of some rows of logits, and the logits' gradient in their place. One workgroup handles one row. Beside it
// cross_entropy_whole.wgsl or cross_entropy_held.wgsl, which know how logits and gradient are stored.
//
//     loss = log(sum(exp(logits))) - logits[target]          0 where the target is ignored
//     dlogits = (softmax(logits) - onehot(target)) * weight  0 there, and in the row's padding
//
// Header: GRADIENT (bool): whether the logits are replaced; what the file beside it wants.
// Workgroup: 256. Grid: rows workgroups, folded into (x, y) when over 65535.
// Bindings: 0 logits (rows, stride); 1 targets (all rows) i32, -1 is ignored; 2 losses (all rows) f32, written;
// 3 count (2) f32: of all rows, and the weight of each; 4 params.

struct Params {
    rows: u32,
    vocab: u32,
    stride: u32,    // elements from row to row of the logits, a multiple of eight, at least vocab
    first_row: u32, // of the logits, among all rows
    held: f32,      // what the gradient is multiplied by as it is stored
}

const THREADS: u32 = 256u;

@group(0) @binding(1) var<storage, read_write> targets: array<i32>;
@group(0) @binding(2) var<storage, read_write> losses: array<f32>;
@group(0) @binding(3) var<storage, read_write> count: array<f32>;
@group(0) @binding(4) var<uniform> params: Params;

const MASKED: f32 = -1e30; // finite: fast math may assume that no infinity exists

var<workgroup> shared_maximum: array<f32, THREADS>;
var<workgroup> shared_sum: array<f32, THREADS>;

// What a row's gradients are made of
struct Row {
    maximum: f32,
    sum: f32,
    target_column: u32, // beyond all where the target is ignored
    weight: f32,
}

// Of the logits of one quad of columns
fn gradients_of(quad: u32, logits_of_quad: vec4<f32>, row: Row) -> vec4<f32> {
    let columns = columns_of(quad);
    let softmax = exp(logits_of_quad - row.maximum) / row.sum;
    let gradient = softmax - select(vec4<f32>(), vec4<f32>(1.0), columns == vec4<u32>(row.target_column));
    return select(vec4<f32>(), row.weight * gradient, columns < vec4<u32>(params.vocab));
}

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
        let values = select(vec4<f32>(MASKED), logits_at(base + quad), columns_of(quad) < vec4<u32>(params.vocab));
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
            loss = row_maximum + log(row_sum) - logits_at(base + u32(target_column) / 4u)[u32(target_column) % 4u];
        }
        losses[params.first_row + row] = loss;
    }
    if (GRADIENT) {
        storageBarrier(); // thread 0 has read the target's logit before anyone replaces it
        let weight = params.held * select(0.0, count[1], counts);
        replace_row(thread, base, Row(row_maximum, row_sum, u32(target_column), weight));
    }
}
