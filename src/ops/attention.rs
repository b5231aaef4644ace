//! Causal self-attention over the packed projection: no transposed copy of q, k or v is ever asked of the caller.

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::{Device, FloatTensor},
};
use burn::tensor::{Shape, Slice, Tensor, TensorData};
use burn_cubecl::CubeBackend;

use super::dropout::{Dropout, DropoutOps};

/// Added to the scores of the future. Finite: Metal compiles with fast math, under which infinities are not to be relied on.
const MASKED: f32 = -1e30;

/// out = dropout(softmax(mask(q kᵀ / √D))) v for every head, D = C / n_head.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait AttentionOps: DropoutOps {
    /// qkv (B, T, 3C) -> (out (B, T, C), lse (B, H, T, 1)): lse is the natural log of each row's sum of exponentials, before
    /// dropout. Only these two are saved: the backward computes the probabilities again.
    fn causal_attention(
        qkv: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (q, k, v) = split_heads::<Self>(qkv, n_head);
        let scores = masked_scores::<Self>(q, k); // (B, H, T, T)
        let max = Self::float_max_dim(scores.clone(), 3);
        let weights = Self::float_exp(Self::float_sub(scores, max.clone()));
        let sum = Self::float_sum_dim(weights.clone(), 3);
        let probabilities = Self::float_div(weights, sum.clone());
        let kept = drop::<Self>(probabilities, dropout);
        let out = merge_heads::<Self>(Self::float_matmul(kept, v));
        (out, Self::float_add(max, Self::float_log(sum)))
    }

    /// dout, out (B, T, C), qkv (B, T, 3C), lse (B, H, T, 1) -> dqkv (B, T, 3C).
    fn causal_attention_backward(
        dout: FloatTensor<Self>,
        qkv: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let (q, k, v) = split_heads::<Self>(qkv, n_head);
        let head_dim = q.shape()[3];
        let dout_heads = heads::<Self>(dout, n_head); // (B, H, T, D)
        let out_heads = heads::<Self>(out, n_head);
        let p = Self::float_exp(Self::float_sub(masked_scores::<Self>(q.clone(), k.clone()), lse));
        // out = kept v  =>  dv = keptᵀ dout, dkept = dout vᵀ
        let kept = drop::<Self>(p.clone(), dropout);
        let dv = Self::float_matmul(Self::float_swap_dims(kept, 2, 3), dout_heads.clone());
        let dkept = Self::float_matmul(dout_heads.clone(), Self::float_swap_dims(v, 2, 3));
        // kept = mask p  =>  dp = mask dkept
        let dp = drop::<Self>(dkept, dropout);
        // p = softmax(s)  =>  ds = p (dp - Σ dp p), and Σ dp p = Σ dout out
        let delta = Self::float_sum_dim(Self::float_mul(dout_heads, out_heads), 3);
        let ds = Self::float_mul(p, Self::float_sub(dp, delta));
        let ds = Self::float_mul_scalar(ds, (1.0 / (head_dim as f64).sqrt()).into());
        // s = q kᵀ / √D  =>  dq = ds k / √D, dk = dsᵀ q / √D
        let dq = Self::float_matmul(ds.clone(), k);
        let dk = Self::float_matmul(Self::float_swap_dims(ds, 2, 3), q);
        Self::float_cat(vec![merge_heads::<Self>(dq), merge_heads::<Self>(dk), merge_heads::<Self>(dv)], 2)
    }
}

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
    if dropout.is_on() { B::dropout(x, dropout) } else { x }
}

impl AttentionOps for Flex {}

impl AttentionOps for CubeBackend {}

#[derive(Clone, Debug)]
struct AttentionState<B: AttentionOps> {
    qkv: FloatTensor<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    n_head: usize,
    dropout: Dropout,
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: AttentionOps> Backward<B, 1> for AttentionBackward {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [qkv] = ops.parents;
        let dout = grads.consume::<B>(&ops.node);
        if let Some(qkv) = qkv {
            let s = ops.state;
            let dqkv = B::causal_attention_backward(dout, s.qkv, s.out, s.lse, s.n_head, s.dropout);
            grads.register::<B>(qkv.id, dqkv);
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn causal_attention(
        qkv: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let prepared = AttentionBackward.prepare::<C>([qkv.node()]).compute_bound().stateful();
        let qkv = <Self as AutodiffBackend>::inner(qkv);
        let (out, lse) = B::causal_attention(qkv.clone(), n_head, dropout);
        let out = match prepared {
            OpsKind::Tracked(prepared) => {
                let state = AttentionState { qkv, out: out.clone(), lse: lse.clone(), n_head, dropout };
                prepared.finish(state, out)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        };
        (out, <Self as AutodiffBackend>::from_inner(lse))
    }
}

/// Causal attention: qkv (B, T, 3C), packed as q, k, v with head h at columns h·D .. (h+1)·D of each third -> (B, T, C).
pub fn causal_attention(qkv: Tensor<3>, n_head: usize, dropout: Dropout) -> Tensor<3> {
    let (out, _) = <Dispatch as AttentionOps>::causal_attention(qkv.into_dispatch(), n_head, dropout);
    Tensor::from_dispatch(out)
}
