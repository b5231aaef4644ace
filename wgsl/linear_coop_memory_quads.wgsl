// The workgroup memory of linear_coop.wgsl in quads: 13 % faster than single elements on an H200, and not for Metal.
//
// A place in a tile and its pitch count SLOT elements. Rows are padded by 8 elements against bank conflicts.

const SLOT: u32 = 4u;
const A_PITCH: u32 = (select(BLOCK_K, BLOCK_M, A_BY_K) + 8u) / 4u;
const B_PITCH: u32 = (select(BLOCK_N, BLOCK_K, B_BY_N) + 8u) / 4u;

var<workgroup> tile_a: array<vec4<mat_elem>, select(BLOCK_M, BLOCK_K, A_BY_K) * A_PITCH>;
var<workgroup> tile_b: array<vec4<mat_elem>, select(BLOCK_K, BLOCK_N, B_BY_N) * B_PITCH>;

fn store_a(index: u32, value: vec4<mat_elem>) {
    tile_a[index] = value;
}

fn store_b(index: u32, value: vec4<mat_elem>) {
    tile_b[index] = value;
}
