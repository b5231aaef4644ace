// Logits in f32 and their gradient in f16, as products round it, for cross_entropy.wgsl. The gradient takes the first half of the row that its
// logits leave: in f16 a row of 2 * stride elements.

@group(0) @binding(0) var<storage, read_write> logits: array<vec4<u32>>; // of f32, or eight f16

fn logits_at(quad: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(logits[quad]);
}

// Eight columns a thread and round. They go where four columns were that somebody reads in the same round or has read in an earlier one.
fn replace_row(thread: u32, base: u32, row: Row) {
    let octs = params.stride / 8u;
    for (var first = 0u; first < octs; first += THREADS) {
        let oct = first + thread;
        let quad = 2u * min(oct, octs - 1u);
        let low = gradients_of(quad, logits_at(base + quad), row);
        let high = gradients_of(quad + 1u, logits_at(base + quad + 1u), row);
        storageBarrier();
        if (oct < octs) {
            logits[base + oct] = vec4<u32>(
                pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
        }
    }
}
