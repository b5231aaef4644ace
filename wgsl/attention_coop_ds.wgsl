// What attention_coop_dkv.wgsl keeps for attention_coop_dq_of_ds.wgsl: dS' (keys, queries) of every head of the launch, rounded as it is
// multiplied, in matrices of EDGE x EDGE that lie one behind another: a subgroup writes and reads 512 bytes at once, where rows of T queries
// would give it 32 (dK/dV 215 us without, 240 so, 265 by rows; 8 sequences of 1024 tokens, 12 heads of 64, an H200). Keys and queries up to
// the next multiple of 16 are there and zeros. Matrices above the diagonal are not all written.
//
// Bindings: 5 kept (head_count, T / EDGE keys, T / EDGE queries, EDGE, EDGE) mat_elem, T rounded up, written.

@group(0) @binding(5) var<storage, read_write> kept: array<mat_elem>;

// Matrix i of score_gradients, whose first key and query these are.
fn keep_score_gradients(i: u32, first_key: u32, first_query: u32) {
    let row = (params.seq_len + 15u) / 16u * 16u / EDGE; // matrices of a row
    if (first_key / EDGE < row && first_query / EDGE < row) {
        let at = ((launch_head * row + first_key / EDGE) * row + first_query / EDGE) * (EDGE * EDGE);
        let edge = EDGE;
        coopStoreT(score_gradients[i], &kept[at], edge);
    }
}
