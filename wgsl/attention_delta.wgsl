// Causal attention, before the backward: delta = rowsum(dout * out), one number a query and head.
//
// One workgroup computes 64 rows. In memory a row is one head of one token: (batch, token, head) with D contiguous
// elements, so the workgroup reads one contiguous piece of both tensors, whatever the shape.
//     partial[row][quad] = dot(dout[row][4 quad ..], out[row][4 quad ..])      every thread, coalesced
//     delta[row]         = sum over quad of partial[row][quad]                 one thread a row, in a fixed order
//
// Header: elem (f32 or f16, the storage type), HEAD_DIM (a multiple of 16, <= 128).
// Workgroup: 256 threads. Grid: ceil(batch * seq_len * heads / 64) workgroups, folded into (x, y) when over 65535.
// Workgroup memory: 64 * (HEAD_DIM / 4 + 1) * 4 bytes (8448 for 128).
//
// Bindings: 0 dout (B, T, C) elem; 1 out (B, T, C) elem; 2 delta (B, H, T) f32, written; 3 params.

struct Params {
    head_count: u32, // batch * heads
    heads: u32,
    seq_len: u32,
    first_head: u32,     // unused
    seed_lo: u32,
    seed_hi: u32,
    step: u32,
    site: u32,
    drop_threshold: u32,
    keep_scale: f32,
    gradient_scale: f32, // unused
    result_scale: f32,   // unused
}

@group(0) @binding(0) var<storage, read_write> dout: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read_write> delta: array<f32>;
@group(0) @binding(3) var<uniform> params: Params;

const ROWS: u32 = 64u;
const THREADS: u32 = 256u;
const DIM_QUADS: u32 = HEAD_DIM / 4u;
const PARTIAL_STRIDE: u32 = DIM_QUADS + 1u; // odd: a thread a row reads without bank conflicts

var<workgroup> partial: array<f32, ROWS * PARTIAL_STRIDE>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let rows = params.head_count * params.seq_len;
    let first_row = (workgroup.y * grid.x + workgroup.x) * ROWS;
    for (var index = thread; index < ROWS * DIM_QUADS; index += THREADS) {
        let row = index / DIM_QUADS;
        if (first_row + row < rows) {
            let quad = first_row * DIM_QUADS + index;
            partial[row * PARTIAL_STRIDE + index % DIM_QUADS] = dot(vec4<f32>(dout[quad]), vec4<f32>(out[quad]));
        }
    }
    workgroupBarrier();
    let row = first_row + thread;
    if (thread < ROWS && row < rows) {
        var sum = 0.0;
        for (var quad = 0u; quad < DIM_QUADS; quad++) {
            sum += partial[thread * PARTIAL_STRIDE + quad];
        }
        let head = row % params.heads;
        let token = row / params.heads % params.seq_len;
        let batch = row / params.heads / params.seq_len;
        delta[(batch * params.heads + head) * params.seq_len + token] = sum;
    }
}
