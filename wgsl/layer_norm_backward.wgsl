// Layer norm, backward: dx, and of dw and db one partial sum a workgroup, which column_sums.wgsl adds up. With
// normed = (x - mean) * rstd and dnormed = dy * w:
//     dx = rstd * (dnormed - mean(dnormed) - normed * mean(dnormed * normed))
//     dw = sum over rows of dy * normed, db = sum over rows of dy
//
// TEAM threads hold one row at a time and the workgroup's teams walk over the rows in steps of the whole grid, each thread
// adding up dw and db of its columns in registers: x and dy are read once for all three results. Which rows a team gets
// depends on the grid alone, so equal grids give equal bits. Prepend lanes4.wgsl or lanes1.wgsl.
//
// Header: elem, WIDTH, LANES (C / WIDTH), TEAM (32 .. THREADS), THREADS; PAST (bool): whether something is added to dx.
// Workgroup: THREADS threads. Grid: any number of workgroups up to 65535, x only.
// Workgroup memory: (2 * THREADS + 16 * THREADS / TEAM) * 4 + 2 * THREADS * 4 * WIDTH bytes (10496 at most).
//
// Bindings: 0 dy (rows, C) elem; 1 x (rows, C) elem; 2 w (C) f32; 3 mean (rows) f32; 4 rstd (rows) f32; 5 past (rows, C) elem:
// the gradient that comes to x past the norm, or dy again; 6 dx (rows, C) elem, written; 7 partial sums (workgroups, 2, C) f32,
// written: dw, then db; 8 params.

struct Params {
    rows: u32,
}

@group(0) @binding(0) var<storage, read_write> dy: array<stored>;
@group(0) @binding(1) var<storage, read_write> x: array<stored>;
@group(0) @binding(2) var<storage, read_write> w: array<lanes>;
@group(0) @binding(3) var<storage, read_write> means: array<f32>;
@group(0) @binding(4) var<storage, read_write> rstds: array<f32>;
@group(0) @binding(5) var<storage, read_write> past: array<stored>;
@group(0) @binding(6) var<storage, read_write> dx: array<stored>;
@group(0) @binding(7) var<storage, read_write> column_partials: array<lanes>;
@group(0) @binding(8) var<uniform> params: Params;

const TEAMS: u32 = THREADS / TEAM;
const OWN: u32 = (LANES + TEAM - 1u) / TEAM; // lanes of a row that a thread holds
const SUMS: u32 = 8u;                        // partial sums of a team

var<workgroup> partial: array<vec2<f32>, THREADS>;
var<workgroup> sums: array<vec2<f32>, TEAMS * SUMS>;
var<workgroup> team_dw: array<lanes, THREADS>;
var<workgroup> team_db: array<lanes, THREADS>;

// The sum of `value` over the thread's team, as in layer_norm_forward.wgsl, for two numbers at once.
fn team_sum(value: vec2<f32>, thread: u32) -> vec2<f32> {
    let team = thread / TEAM;
    let member = thread % TEAM;
    partial[thread] = value;
    workgroupBarrier();
    if (member < SUMS) {
        var sum = vec2<f32>();
        for (var i = member; i < TEAM; i += SUMS) {
            sum += partial[team * TEAM + i];
        }
        sums[team * SUMS + member] = sum;
    }
    workgroupBarrier();
    var sum = vec2<f32>();
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
    let member = thread % TEAM;
    let step = grid.x * TEAMS;
    var dw: array<lanes, OWN>;
    var db: array<lanes, OWN>;
    // Every team makes every step, since they meet at barriers; one without a row reads the last and stores nothing.
    for (var start = 0u; start < params.rows; start += step) {
        let row = start + workgroup.x * TEAMS + thread / TEAM;
        let has_row = row < params.rows;
        let source = min(row, params.rows - 1u);
        let first = source * LANES;
        let mean = means[source];
        let rstd = rstds[source];

        var dnormed: array<lanes, OWN>;
        var normed: array<lanes, OWN>;
        var added: array<stored, OWN>; // asked for together with the rest, not when the row's sums are known
        var row_sums = vec2<f32>();
        for (var i = 0u; i < OWN; i++) {
            let lane = member + i * TEAM;
            if (is_inside(lane)) {
                let slope = lanes(dy[first + lane]);
                normed[i] = (lanes(x[first + lane]) - lanes(mean)) * rstd;
                if (PAST) {
                    added[i] = past[first + lane];
                }
                dnormed[i] = slope * w[lane];
                row_sums += vec2<f32>(total(dnormed[i]), total(dnormed[i] * normed[i]));
                if (has_row) {
                    dw[i] += slope * normed[i];
                    db[i] += slope;
                }
            }
        }
        let means_of_row = team_sum(row_sums, thread) / f32(LANES * WIDTH);
        for (var i = 0u; i < OWN; i++) {
            let lane = member + i * TEAM;
            if (has_row && is_inside(lane)) {
                var value = (dnormed[i] - lanes(means_of_row.x) - normed[i] * means_of_row.y) * rstd;
                if (PAST) {
                    value += lanes(added[i]);
                }
                dx[first + lane] = stored(value);
            }
        }
    }

    let partials_start = workgroup.x * 2u * LANES;
    for (var i = 0u; i < OWN; i++) {
        team_dw[thread] = dw[i];
        team_db[thread] = db[i];
        workgroupBarrier();
        let lane = member + i * TEAM;
        if (thread < TEAM && is_inside(lane)) {
            var dw_sum = lanes();
            var db_sum = lanes();
            for (var team = 0u; team < TEAMS; team++) {
                dw_sum += team_dw[team * TEAM + member];
                db_sum += team_db[team * TEAM + member];
            }
            column_partials[partials_start + lane] = dw_sum;
            column_partials[partials_start + LANES + lane] = db_sum;
        }
        workgroupBarrier();
    }
}
