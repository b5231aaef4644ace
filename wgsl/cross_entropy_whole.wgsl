// Logits and their gradient in one type, for cross_entropy.wgsl. Header: elem, f32 or f16.

@group(0) @binding(0) var<storage, read_write> logits: array<vec4<elem>>;

fn logits_at(quad: u32) -> vec4<f32> {
    return vec4<f32>(logits[quad]);
}

fn replace_row(thread: u32, base: u32, row: Row) {
    for (var quad = thread; quad < params.stride / 4u; quad += THREADS) {
        logits[base + quad] = vec4<elem>(gradients_of(quad, logits_at(base + quad), row));
    }
}
