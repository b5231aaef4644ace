// attention_coop_dkv.wgsl without dS for another kernel; attention_coop_ds.wgsl is the other case.

fn keep_score_gradients(i: u32, first_key: u32, first_query: u32) {
}
