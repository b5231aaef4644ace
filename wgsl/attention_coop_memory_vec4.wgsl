// The workgroup memory of the attention_coop_* kernels, kept in vectors of four: on an H200 up to 2 % faster than
// single elements. Metal cannot load a matrix from an array of vectors: see attention_coop_memory_scalar.wgsl.
//
// Expects from the header: mat_elem. Expects from the kernel: TILE_SIZE, SCRATCH_SIZE (elements, multiples of 4).
// A matrix's place in an array is its element index / PACK, and its stride in elements / PACK.

const PACK: u32 = 4u;

var<workgroup> stream_a: array<vec4<mat_elem>, TILE_SIZE / PACK>;   // the streamed tile: K, or Q
var<workgroup> stream_b: array<vec4<mat_elem>, TILE_SIZE / PACK>;   // the streamed tile: V, or dOut
var<workgroup> scratch: array<vec4<f32>, SCRATCH_SIZE / PACK>;      // accumulators on their way to the lanes
var<workgroup> operand: array<vec4<mat_elem>, SCRATCH_SIZE / PACK>; // what the lanes made, on its way to a matrix

fn store_stream_a(index: u32, value: vec4<f32>) {
    stream_a[index / PACK] = vec4<mat_elem>(value);
}

fn store_stream_b(index: u32, value: vec4<f32>) {
    stream_b[index / PACK] = vec4<mat_elem>(value);
}

fn store_operand(index: u32, value: vec4<f32>) {
    operand[index / PACK] = vec4<mat_elem>(value);
}

fn store_scratch(index: u32, value: vec4<f32>) {
    scratch[index / PACK] = value;
}

fn load_scratch(index: u32) -> vec4<f32> {
    return scratch[index / PACK];
}
