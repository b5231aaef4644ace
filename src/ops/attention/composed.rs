//! [`AttentionOps`](super::AttentionOps) in Burn primitives: its definition, and what the other paths fall back on.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{Device, FloatTensor},
};
use burn::tensor::{Shape, Slice, TensorData};

use crate::ops::dropout::{Dropout, DropoutOps};
use crate::ops::{hold, widen};

/// Added to the scores of the future. Finite: Metal compiles with fast math, under which infinities are not to be relied on.
const MASKED: f32 = -1e30;

/// (B, T, C) -> (B, H, T, D), a view.
fn heads<B: Backend>(x: FloatTensor<B>, n_head: usize) -> FloatTensor<B> {
    let [batch, time, channels] = x.shape().dims::<3>();
    let x = B::float_reshape(x, Shape::new([batch, time, n_head, channels / n_head]));
    B::float_swap_dims(x, 1, 2)
}

/// (B, H, T, D) -> (B, T, C).
fn merge_heads<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, n_head, time, head_dim] = x.shape().dims::<4>();
    let x = B::float_swap_dims(x, 1, 2);
    B::float_reshape(x, Shape::new([batch, time, n_head * head_dim]))
}

/// qkv (B, T, 3C) -> q, k, v, each (B, H, T, D).
fn split_heads<B: Backend>(qkv: FloatTensor<B>, n_head: usize) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let [batch, time, width] = qkv.shape().dims::<3>();
    let channels = width / 3;
    let third = |i: usize| {
        let columns = Slice::from(i * channels..(i + 1) * channels);
        let slices = [Slice::from(0..batch), Slice::from(0..time), columns];
        heads::<B>(B::float_slice(qkv.clone(), &slices), n_head)
    };
    (third(0), third(1), third(2))
}

/// q kᵀ / √D with the future masked, (B, H, T, T).
fn masked_scores<B: Backend>(q: FloatTensor<B>, k: FloatTensor<B>) -> FloatTensor<B> {
    let [_, _, time, head_dim] = q.shape().dims::<4>();
    let mask = causal_mask::<B>(time, &q.device());
    let scale = 1.0 / (head_dim as f64).sqrt();
    let q = B::float_mul_scalar(q, scale.into()); // T × D products instead of T × T
    B::float_add(B::float_matmul(q, B::float_swap_dims(k, 2, 3)), mask)
}

/// (1, 1, T, T): 0 up to the diagonal, [`MASKED`] above it.
fn causal_mask<B: Backend>(time: usize, device: &Device<B>) -> FloatTensor<B> {
    let mask = (0..time).flat_map(|query| (0..time).map(move |key| if key > query { MASKED } else { 0.0 })).collect();
    B::float_from_data(TensorData::new::<f32, _>(mask, [1, 1, time, time]), device)
}

fn drop<B: DropoutOps>(x: FloatTensor<B>, dropout: Dropout) -> FloatTensor<B> {
    if dropout.is_on() { B::dropout(x, dropout, None) } else { x }
}

/// qkv (B, T, 3C) -> (out (B, T, C), lse (B, H, T, 1)).
pub(super) fn forward<B: DropoutOps>(
    qkv: FloatTensor<B>,
    n_head: usize,
    dropout: Dropout,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (q, k, v) = split_heads::<B>(qkv, n_head);
    let scores = masked_scores::<B>(q, k); // (B, H, T, T)
    let max = B::float_max_dim(scores.clone(), 3);
    let weights = B::float_exp(B::float_sub(scores, max.clone()));
    let sum = B::float_sum_dim(weights.clone(), 3);
    let probabilities = B::float_div(weights, sum.clone());
    let kept = drop::<B>(probabilities, dropout);
    let out = merge_heads::<B>(B::float_matmul(kept, v));
    (out, B::float_add(max, B::float_log(sum)))
}

/// dout, out (B, T, C), qkv (B, T, 3C), lse (B, H, T, 1) -> dqkv (B, T, 3C), `held` times itself where qkv is.
pub(super) fn backward<B: DropoutOps>(
    dout: FloatTensor<B>,
    qkv: FloatTensor<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    n_head: usize,
    dropout: Dropout,
    held: Option<f32>,
) -> FloatTensor<B> {
    let (q, k, v) = split_heads::<B>(widen::<B>(qkv, held.is_some()), n_head);
    let head_dim = q.shape()[3];
    let dout_heads = heads::<B>(dout, n_head); // (B, H, T, D)
    let out_heads = heads::<B>(out, n_head);
    let p = B::float_exp(B::float_sub(masked_scores::<B>(q.clone(), k.clone()), lse));
    // out = kept v  =>  dv = keptᵀ dout, dkept = dout vᵀ
    let kept = drop::<B>(p.clone(), dropout);
    let dv = B::float_matmul(B::float_swap_dims(kept, 2, 3), dout_heads.clone());
    let dkept = B::float_matmul(dout_heads.clone(), B::float_swap_dims(v, 2, 3));
    // kept = mask p  =>  dp = mask dkept
    let dp = drop::<B>(dkept, dropout);
    // p = softmax(s)  =>  ds = p (dp - Σ dp p), and Σ dp p = Σ dout out
    let delta = B::float_sum_dim(B::float_mul(dout_heads, out_heads), 3);
    let ds = B::float_mul(p, B::float_sub(dp, delta));
    let ds = B::float_mul_scalar(ds, (1.0 / (head_dim as f64).sqrt()).into());
    // s = q kᵀ / √D  =>  dq = ds k / √D, dk = dsᵀ q / √D
    let dq = B::float_matmul(ds.clone(), k);
    let dk = B::float_matmul(B::float_swap_dims(ds, 2, 3), q);
    hold::<B>(B::float_cat(vec![merge_heads::<B>(dq), merge_heads::<B>(dk), merge_heads::<B>(dv)], 2), held)
}
