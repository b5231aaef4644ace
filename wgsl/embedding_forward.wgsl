// Embedding, forward: x[b, t] = dropout(wte[token[b, t]] + wpe[t]). A thread makes one lane of one row.
//
// The dropout mask is dropout.wgsl's: counter (column / 4, row, step, site), key (seed_lo, seed_hi). A token that is no row
// of wte reads the last one: the kernel never leaves its buffers. Prepend philox.wgsl and lanes4.wgsl or lanes1.wgsl.
//
// Header: elem, WIDTH, DROPOUT.
// Workgroup: 256 threads. Grid: ceil(rows * lanes / 256), folded into (x, y).
//
// Bindings: 0 tokens (B, T) i32 in 0..vocab; 1 wte (vocab, C) f32; 2 wpe (>= T, C) f32; 3 x (B, T, C) elem, written;
// 4 clock (4) u32; 5 params.

struct Params {
    rows: u32,  // B * T
    lanes: u32, // C / WIDTH
    time: u32,  // T
    vocab: u32,
    seed_lo: u32,
    seed_hi: u32,
    step: u32, // of the masks, counted from the clock
    site: u32,
    drop_threshold: u32,
    keep_scale: f32,
}

@group(0) @binding(0) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(1) var<storage, read_write> wte: array<lanes>;
@group(0) @binding(2) var<storage, read_write> wpe: array<lanes>;
@group(0) @binding(3) var<storage, read_write> x: array<stored>;
@group(0) @binding(4) var<storage, read_write> clock: array<u32>;
@group(0) @binding(5) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let index = id.y * grid.x * 256u + id.x;
    if (index >= params.rows * params.lanes) {
        return;
    }
    let row = index / params.lanes;
    let lane = index % params.lanes;
    let token = min(tokens[row], params.vocab - 1u);
    var value = wte[token * params.lanes + lane] + wpe[row % params.time * params.lanes + lane];
    if (DROPOUT) {
        let column = lane * WIDTH;
        let block = philox4x32(
            vec4<u32>(column / 4u, row, params.step + clock[0], params.site),
            vec2<u32>(params.seed_lo, params.seed_hi),
        );
        let kept = own_words(block, column) >= lane_words(params.drop_threshold);
        value = select(lanes(), value * params.keep_scale, kept);
    }
    x[index] = stored(value);
}
