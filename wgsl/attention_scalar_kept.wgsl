// How dS' (keys, queries) of every head of the launch lies between dK/dV and dQ: a row for each key, so that four queries of one key lie
// together, as attention_scalar_ds.wgsl has them once it turns its blocks of 4 x 4, and as the left tile of attention_scalar_dq_of_ds.wgsl wants
// them. A head has seq_len rows of ceil(seq_len / 4) quads; queries beyond the end are zeros. Tiles above the diagonal are not written.
//
// Header: KEPT, its binding.
// Bindings: KEPT kept (head_count, T, ceil(T / 4)) vec4<f32>.

@group(0) @binding(KEPT) var<storage, read_write> kept: array<vec4<f32>>;

fn kept_row_quads() -> u32 {
    return (params.seq_len + 3u) / 4u;
}

// Where a quad of queries at one key of a head, counted from the launch's first, lies
fn kept_at(launch_head: u32, key: u32, quad: u32) -> u32 {
    return (launch_head * params.seq_len + key) * kept_row_quads() + quad;
}
