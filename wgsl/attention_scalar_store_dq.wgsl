// sums * scale -> dQ, for attention_scalar_dq.wgsl and attention_scalar_dq_of_ds.wgsl: each declares `sums` and binds dqkv.

fn store_row(i: u32, query: u32, query_base: u32, qkv_stride: u32, scale: f32) {
    if (query < params.seq_len) {
        for (var c = 0u; c < OUT_QUADS; c++) {
            let at = query_base + query * qkv_stride + thread_col + c * COL_THREADS;
            dqkv[at] = vec4<elem>(sums[OUT_QUADS * i + c] * scale);
        }
    }
}

fn store_quad(h: u32, query: u32, query_base: u32, qkv_stride: u32, scale: f32) {
    store_row(4u * h, query, query_base, qkv_stride, scale);
    store_row(4u * h + 1u, query + 1u, query_base, qkv_stride, scale);
    store_row(4u * h + 2u, query + 2u, query_base, qkv_stride, scale);
    store_row(4u * h + 3u, query + 3u, query_base, qkv_stride, scale);
}
