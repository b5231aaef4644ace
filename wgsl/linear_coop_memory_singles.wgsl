// The workgroup memory of linear_coop.wgsl in single elements: Metal's simdgroup_load wants a pointer to the matrix's
// element type. linear_coop_memory_quads.wgsl is the other form.
//
// A place in a tile and its pitch count SLOT elements. Rows are padded by 8 elements against bank conflicts.

const SLOT: u32 = 1u;
const A_PITCH: u32 = select(BLOCK_K, BLOCK_M, A_BY_K) + 8u;
const B_PITCH: u32 = select(BLOCK_N, BLOCK_K, B_BY_N) + 8u;

var<workgroup> tile_a: array<mat_elem, select(BLOCK_M, BLOCK_K, A_BY_K) * A_PITCH>;
var<workgroup> tile_b: array<mat_elem, select(BLOCK_K, BLOCK_N, B_BY_N) * B_PITCH>;

fn store_a(index: u32, value: vec4<mat_elem>) {
    tile_a[index] = value.x;
    tile_a[index + 1u] = value.y;
    tile_a[index + 2u] = value.z;
    tile_a[index + 3u] = value.w;
}

fn store_b(index: u32, value: vec4<mat_elem>) {
    tile_b[index] = value.x;
    tile_b[index + 1u] = value.y;
    tile_b[index + 2u] = value.z;
    tile_b[index + 3u] = value.w;
}
