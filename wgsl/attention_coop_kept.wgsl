// How dS' (keys, queries) of every head of the launch lies between dK/dV and dQ: rounded as it is multiplied, in matrices of EDGE x EDGE one
// behind another, so that a subgroup writes and reads 512 bytes at once, where rows of T queries would give it 32 (dK/dV 215 us without, 240
// so, 265 by rows; 8 sequences of 1024 tokens, 12 heads of 64, an H200). Keys and queries up to the next multiple of 16 are there and zeros.
// Matrices above the diagonal are not all written.
//
// Header: KEPT, its binding.
// Bindings: KEPT kept (head_count, T / EDGE keys, T / EDGE queries, EDGE, EDGE) mat_elem, T rounded up.

@group(0) @binding(KEPT) var<storage, read_write> kept: array<mat_elem>;

// Matrices of a row, and rows of a head
fn kept_row_tiles() -> u32 {
    return (params.seq_len + 15u) / 16u * 16u / EDGE;
}

// Where the matrix of these keys and queries of a head, counted from the launch's first, begins
fn kept_at(launch_head: u32, key_tile: u32, query_tile: u32) -> u32 {
    return ((launch_head * kept_row_tiles() + key_tile) * kept_row_tiles() + query_tile) * (EDGE * EDGE);
}
