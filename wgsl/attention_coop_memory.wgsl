// The workgroup memory of the attention_coop_* kernels, kept in single elements: Metal's simdgroup_load wants a pointer
// to the matrix's element type. Keeping it in vec4 instead gained at most 2 % on an H200.
//
// Expects from the header: mat_elem. Expects from the kernel: TILE_SIZE, SCRATCH_SIZE (elements, multiples of 4).
// A matrix's place in an array is its element index / PACK, and its stride in elements / PACK.

const PACK: u32 = 1u;

var<workgroup> stream_a: array<mat_elem, TILE_SIZE>;   // the streamed tile: K, or Q
var<workgroup> stream_b: array<mat_elem, TILE_SIZE>;   // the streamed tile: V, or dOut
var<workgroup> scratch: array<f32, SCRATCH_SIZE>;      // accumulators on their way to the lanes
var<workgroup> operand: array<mat_elem, SCRATCH_SIZE>; // what the lanes made, on its way to a matrix

fn store_stream_a(index: u32, value: vec4<f32>) {
    stream_a[index] = mat_elem(value.x);
    stream_a[index + 1u] = mat_elem(value.y);
    stream_a[index + 2u] = mat_elem(value.z);
    stream_a[index + 3u] = mat_elem(value.w);
}

fn store_stream_b(index: u32, value: vec4<f32>) {
    stream_b[index] = mat_elem(value.x);
    stream_b[index + 1u] = mat_elem(value.y);
    stream_b[index + 2u] = mat_elem(value.z);
    stream_b[index + 3u] = mat_elem(value.w);
}

fn store_operand(index: u32, value: vec4<f32>) {
    operand[index] = mat_elem(value.x);
    operand[index + 1u] = mat_elem(value.y);
    operand[index + 2u] = mat_elem(value.z);
    operand[index + 3u] = mat_elem(value.w);
}

fn store_scratch(index: u32, value: vec4<f32>) {
    scratch[index] = value.x;
    scratch[index + 1u] = value.y;
    scratch[index + 2u] = value.z;
    scratch[index + 3u] = value.w;
}

fn load_scratch(index: u32) -> vec4<f32> {
    return vec4<f32>(scratch[index], scratch[index + 1u], scratch[index + 2u], scratch[index + 3u]);
}
