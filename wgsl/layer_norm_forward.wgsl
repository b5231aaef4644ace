// Layer norm, forward: y = (x - mean) * rstd * w + b, rstd = 1 / sqrt(variance + EPSILON), every row by itself.
//
// TEAM threads hold one row in registers, so x is read once and the variance is the mean of (x - mean)^2, not the
// difference of two large numbers. Prepend lanes4.wgsl or lanes1.wgsl: WIDTH columns are a lane.
//
// Header: elem, out_elem, WIDTH, LANES (C / WIDTH), TEAM (32 .. THREADS), THREADS, BIAS, EPSILON.
// Workgroup: THREADS threads, THREADS / TEAM rows. Grid: ceil(rows / (THREADS / TEAM)), folded into (x, y).
// Workgroup memory: (THREADS + 8 * THREADS / TEAM) * 4 bytes (1280 at most).
//
// Bindings: 0 x (rows, C) elem; 1 w (C) f32; 2 b (C) f32, or w again without BIAS; 3 y (rows, C) out_elem, written;
// 4 mean (rows) f32, written; 5 rstd (rows) f32, written; 6 params.

struct Params {
    rows: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<stored>;
@group(0) @binding(1) var<storage, read_write> w: array<lanes>;
@group(0) @binding(2) var<storage, read_write> b: array<lanes>;
@group(0) @binding(3) var<storage, read_write> y: array<made>;
@group(0) @binding(4) var<storage, read_write> means: array<f32>;
@group(0) @binding(5) var<storage, read_write> rstds: array<f32>;
@group(0) @binding(6) var<uniform> params: Params;

const TEAMS: u32 = THREADS / TEAM;
const OWN: u32 = (LANES + TEAM - 1u) / TEAM; // lanes of a row that a thread holds
const SUMS: u32 = 8u;                        // partial sums of a team

var<workgroup> partial: array<f32, THREADS>;
var<workgroup> sums: array<f32, TEAMS * SUMS>;

// The sum of `value` over the thread's team. Call it in uniform control flow. Two barriers are enough for calls in a row:
// the first keeps `sums` until all have read it, the second keeps `partial`.
fn team_sum(value: f32, thread: u32) -> f32 {
    let team = thread / TEAM;
    let member = thread % TEAM;
    partial[thread] = value;
    workgroupBarrier();
    if (member < SUMS) {
        var sum = 0.0;
        for (var i = member; i < TEAM; i += SUMS) {
            sum += partial[team * TEAM + i];
        }
        sums[team * SUMS + member] = sum;
    }
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < SUMS; i++) {
        sum += sums[team * SUMS + i];
    }
    return sum;
}

fn is_inside(lane: u32) -> bool {
    return LANES % TEAM == 0u || lane < LANES;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = (workgroup.y * grid.x + workgroup.x) * TEAMS + thread / TEAM;
    let member = thread % TEAM;
    let first = min(row, params.rows - 1u) * LANES; // a team without a row reads the last one and stores nothing
    let columns = f32(LANES * WIDTH);

    var values: array<lanes, OWN>;
    var sum = 0.0;
    for (var i = 0u; i < OWN; i++) {
        let lane = member + i * TEAM;
        if (is_inside(lane)) {
            values[i] = lanes(x[first + lane]);
            sum += total(values[i]);
        }
    }
    let mean = team_sum(sum, thread) / columns;
    var squares = 0.0;
    for (var i = 0u; i < OWN; i++) {
        if (is_inside(member + i * TEAM)) {
            let centred = values[i] - lanes(mean);
            squares += total(centred * centred);
        }
    }
    let rstd = 1.0 / sqrt(team_sum(squares, thread) / columns + EPSILON);

    if (row >= params.rows) {
        return;
    }
    for (var i = 0u; i < OWN; i++) {
        let lane = member + i * TEAM;
        if (is_inside(lane)) {
            var value = (values[i] - lanes(mean)) * rstd * w[lane];
            if (BIAS) {
                value += b[lane];
            }
            y[first + lane] = made(value);
        }
    }
    if (member == 0u) {
        means[row] = mean;
        rstds[row] = rstd;
    }
}
