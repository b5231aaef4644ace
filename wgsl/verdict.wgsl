// The verdict on a step, and what is remembered from step to step: src/ops/verdict.rs defines both, word by word. One workgroup
// in all: it adds up the gradient's squares and fetches the window; its first thread judges.
//
// Header: WINDOW (128), GROWTH_INTERVAL, LEAST_SCALE, MOST_SCALE.
// Workgroup: 256 threads. Grid: 1.
// Workgroup memory: 3072 bytes.
//
// Bindings: 0 sums (count) f32; 1 loss (1) f32, a sum over micro-batches; 2 memory (16 + 2 * WINDOW) f32, rewritten; 3 verdict
// (5) f32, written; 4 clock (4) u32; 5 params.

struct Params {
    count: u32,
    limit: f32,        // of the norm; 0: none
    log_beta1: f32,
    log_beta2: f32,
    dynamic_scale: u32,
    sigma: f32,        // 0: no outlier
    parts: f32,        // micro-batches that loss and gradients are sums over
}

@group(0) @binding(0) var<storage, read_write> square_sums: array<f32>;
@group(0) @binding(1) var<storage, read_write> loss_sum: array<f32>;
@group(0) @binding(2) var<storage, read_write> memory: array<f32>;
@group(0) @binding(3) var<storage, read_write> verdict: array<f32>;
@group(0) @binding(4) var<storage, read_write> clock: array<u32>;
@group(0) @binding(5) var<uniform> params: Params;

const THREADS: u32 = 256u;
const IN_FLIGHT: u32 = 8u;

// Places of the clock, both f32
const RATE: u32 = 1u;
const KEEP: u32 = 2u;

// Places of the memory
const LOSS_SCALE: u32 = 0u;
const GOOD_STEPS: u32 = 1u;
const UPDATES: u32 = 2u;
const OVERFLOWS: u32 = 3u;
const SPIKES: u32 = 4u;
const REMEMBERED: u32 = 5u;
const NEXT: u32 = 6u;
const LOSS: u32 = 7u;
const NORM: u32 = 8u;
const APPLIED: u32 = 9u;
const LOSSES: u32 = 16u;
const NORMS: u32 = LOSSES + WINDOW;

var<workgroup> sums: array<f32, THREADS>;
var<workgroup> window: array<f32, 2u * WINDOW>; // losses, norms

// By the bits of a number as it was loaded: fast math may assume that no infinity and no NaN comes out of arithmetic or
// goes into a function, and drops the question where it can trace the bits back to either.
fn is_finite(bits: u32) -> bool {
    return (bits & 0x7f800000u) != 0x7f800000u;
}

// 1 - exp(x) for x <= 0: near 0 by its series, since 1 - exp(x) would lose its digits.
fn one_minus_exp(x: f32) -> f32 {
    let series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0)))));
    return select(1.0 - exp(x), -series, x > -0.25);
}

// How many standard deviations `newest` lies over the mean of the window that begins at `first`; 0 where all are the same.
fn deviations(newest: f32, first: u32) -> f32 {
    var mean = 0.0;
    for (var i = 0u; i < WINDOW; i++) {
        mean += window[first + i];
    }
    mean /= f32(WINDOW);
    var variance = 0.0;
    for (var i = 0u; i < WINDOW; i++) {
        let centred = window[first + i] - mean;
        variance += centred * centred;
    }
    variance /= f32(WINDOW);
    var result = 0.0;
    if (variance > 0.0) {
        result = (newest - mean) / sqrt(variance);
    }
    return result;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var start = thread; start < params.count; start += THREADS * IN_FLIGHT) {
        for (var j = 0u; j < IN_FLIGHT; j++) {
            let index = start + j * THREADS;
            let value = square_sums[min(index, params.count - 1u)]; // no branch, so the loads overlap
            sum += select(0.0, value, index < params.count);
        }
    }
    sums[thread] = sum;
    for (var reach = THREADS / 2u; reach > 0u; reach /= 2u) {
        workgroupBarrier();
        if (thread < reach) {
            sums[thread] += sums[thread + reach];
        }
    }
    workgroupBarrier();

    let scale = memory[LOSS_SCALE];
    let divisor = scale * params.parts; // of the mean over the micro-batches, as the loss
    let norm = sqrt(sums[0]) / divisor;
    let loss = loss_sum[0] / params.parts;
    let finite = is_finite(bitcast<u32>(sums[0])) && is_finite(bitcast<u32>(loss_sum[0]));
    let next = u32(memory[NEXT]);
    let remembered = min(memory[REMEMBERED] + select(0.0, 1.0, finite), f32(WINDOW));
    // The window with this step in it
    if (thread < 2u * WINDOW) {
        let newest = select(loss, norm, thread >= WINDOW);
        var value = memory[LOSSES + thread];
        if (finite && thread % WINDOW == next) {
            value = newest;
        }
        window[thread] = value;
    }
    storageBarrier(); // all have read the memory before it is rewritten
    workgroupBarrier();
    if (thread != 0u) {
        return;
    }
    var spike = false;
    if (finite && params.sigma > 0.0 && remembered == f32(WINDOW)) {
        spike = deviations(loss, 0u) > params.sigma || deviations(norm, WINDOW) > params.sigma;
    }
    let applied = finite && !spike;
    let updates = memory[UPDATES] + select(0.0, 1.0, applied);
    memory[LOSS] = loss;
    memory[NORM] = norm;
    memory[APPLIED] = select(0.0, 1.0, applied);
    memory[UPDATES] = updates;
    memory[OVERFLOWS] += select(1.0, 0.0, finite);
    memory[SPIKES] += select(0.0, 1.0, spike);
    if (finite) {
        memory[LOSSES + next] = loss;
        memory[NORMS + next] = norm;
        memory[NEXT] = f32((next + 1u) % WINDOW);
        memory[REMEMBERED] = remembered;
    }
    if (params.dynamic_scale != 0u) {
        var good = select(0.0, memory[GOOD_STEPS] + 1.0, finite);
        var changed = scale;
        if (!finite) {
            changed = max(0.5 * scale, LEAST_SCALE);
        } else if (good >= GROWTH_INTERVAL) {
            changed = min(2.0 * scale, MOST_SCALE);
            good = 0.0;
        }
        memory[GOOD_STEPS] = good;
        memory[LOSS_SCALE] = changed;
    }
    let t = max(updates, 1.0); // no update is made before the first: then t only has to give finite numbers
    let clip = select(1.0, min(1.0, params.limit / (norm + 1e-6)), params.limit > 0.0);
    verdict[0] = clip / divisor;
    verdict[1] = select(0.0, 1.0, applied);
    verdict[2] = bitcast<f32>(clock[RATE]) / one_minus_exp(t * params.log_beta1);
    verdict[3] = 1.0 / sqrt(one_minus_exp(t * params.log_beta2));
    verdict[4] = bitcast<f32>(clock[KEEP]);
}
