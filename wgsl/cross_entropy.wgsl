// Losses of some rows of logits, and the logits' gradient in their place. One workgroup handles one row.
//
//     loss = log(sum(exp(logits))) - logits[target]          0 where the target is ignored
//     dlogits = (softmax(logits) - onehot(target)) / count   0 there, and in the row's padding
//
// Header: GRADIENT (bool): whether the logits are replaced.
// Workgroup: 256. Grid: rows workgroups, folded into (x, y) when over 65535.
// Bindings: 0 logits (rows, stride); 1 targets (all rows) i32, -1 is ignored; 2 losses (all rows) f32, written;
// 3 count (1) f32, of all rows; 4 params.

struct Params {
    rows: u32,
    vocab: u32,
    stride: u32,    // elements from row to row of the logits, at least vocab
    first_row: u32, // of the logits, among all rows
}

const THREADS: u32 = 256u;

@group(0) @binding(0) var<storage, read_write> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> targets: array<i32>;
@group(0) @binding(2) var<storage, read_write> losses: array<f32>;
@group(0) @binding(3) var<storage, read_write> count: array<f32>;
@group(0) @binding(4) var<uniform> params: Params;

var<workgroup> shared_maximum: array<f32, THREADS>;
var<workgroup> shared_sum: array<f32, THREADS>;

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
    let base = row * params.stride;

    // Each thread's maximum, and its sum relative to that, in one pass.
    var maximum = -1e30; // finite: fast math may assume that no infinity exists
    var sum = 0.0;
    for (var column = thread; column < params.vocab; column += THREADS) {
        let logit = logits[base + column];
        let larger = max(maximum, logit);
        sum = sum * exp(maximum - larger) + exp(logit - larger);
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

    let target_index = targets[params.first_row + row];
    let counts = target_index >= 0;
    if (thread == 0u) {
        var loss = 0.0;
        if (counts) {
            loss = row_maximum + log(row_sum) - logits[base + u32(target_index)];
        }
        losses[params.first_row + row] = loss;
    }
    if (GRADIENT) {
        storageBarrier(); // thread 0 has read the target's logit before anyone replaces it
        let weight = select(0.0, 1.0 / count[0], counts);
        for (var column = thread; column < params.stride; column += THREADS) {
            var gradient = 0.0;
            if (column < params.vocab) {
                gradient = weight * exp(logits[base + column] - row_maximum) / row_sum;
                if (i32(column) == target_index) {
                    gradient -= weight;
                }
            }
            logits[base + column] = gradient;
        }
    }
}
