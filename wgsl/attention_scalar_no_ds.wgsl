// attention_scalar_dkv.wgsl without dS for another kernel; attention_scalar_ds.wgsl is the other case.

fn keep_score_gradients(query_start: u32, key_start: u32, launch_head: u32) {
}
