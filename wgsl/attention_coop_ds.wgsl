// What attention_coop_dkv.wgsl keeps for attention_coop_dq_of_ds.wgsl: dS', written as attention_coop_kept.wgsl, which is prepended, says.

// Matrix i of score_gradients, whose first key and query these are.
fn keep_score_gradients(i: u32, first_key: u32, first_query: u32) {
    if (first_key / EDGE < kept_row_tiles() && first_query / EDGE < kept_row_tiles()) {
        let at = kept_at(launch_head, first_key / EDGE, first_query / EDGE);
        let edge = EDGE;
        coopStoreT(score_gradients[i], &kept[at], edge);
    }
}
