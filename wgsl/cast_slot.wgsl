// One tensor of cast.wgsl: x (count lanes) f32; y (count lanes) elem, written.

@group(0) @binding(2u * SLOT_0) var<storage, read_write> x_0: array<lanes>;
@group(0) @binding(2u * SLOT_0 + 1u) var<storage, read_write> y_0: array<stored>;

fn visit_0(start: u32, end: u32) {
    for (var i = start; i < end; i += THREADS) {
        y_0[i] = stored(x_0[i]);
    }
}
