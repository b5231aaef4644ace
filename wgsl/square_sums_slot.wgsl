// One gradient of square_sums.wgsl: g (count lanes) f32.

@group(0) @binding(SLOT_0) var<storage, read_write> g_0: array<lanes>;

fn visit_0(start: u32, end: u32) {
    for (var first = start; first < end; first += IN_FLIGHT * THREADS) {
        for (var j = 0u; j < IN_FLIGHT; j++) {
            let i = first + j * THREADS;
            let value = g_0[min(i, end - 1u)]; // no branch, so the loads overlap
            sum += select(0.0, total(value * value), i < end);
        }
    }
}
