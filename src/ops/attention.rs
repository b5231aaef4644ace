//! Causal self-attention over the packed projection: no transposed copy of q, k or v is ever asked of the caller.

pub mod tiles;

use std::sync::Once;

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    ops::FloatTensorOps,
    tensor::{Device, FloatTensor},
};
use burn::tensor::{DType, FloatDType, Shape, Slice, Tensor, TensorData};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use self::tiles::{HEAD_DIMS, Pass, Variant};
use super::dropout::{Dropout, DropoutOps};
use super::{gradient_scale, hold, widen};
use crate::cpu::{self, attention::Sizes};
use crate::kernel::{self, Work, fold};

/// Added to the scores of the future. Finite: Metal compiles with fast math, under which infinities are not to be relied on.
const MASKED: f32 = -1e30;

/// out = dropout(softmax(mask(q kᵀ / √D))) v for every head, D = C / n_head.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait AttentionOps: DropoutOps {
    /// qkv (B, T, 3C) -> (out (B, T, C), lse (B, H, T, 1)): lse is the natural log of each row's sum of exponentials, before
    /// dropout. Only these two are saved: the backward computes the probabilities again. out is of qkv's type, or f32 where `whole`.
    fn causal_attention(
        qkv: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_forward::<Self>(widen::<Self>(qkv, whole), n_head, dropout)
    }

    /// dout, out (B, T, C), qkv (B, T, 3C), lse (B, H, T, 1) -> dqkv (B, T, 3C), of qkv's type. Beside a dout in f32 qkv may be f16, and
    /// dqkv is `held` times itself then.
    fn causal_attention_backward(
        dout: FloatTensor<Self>,
        qkv: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
        held: Option<f32>,
    ) -> FloatTensor<Self> {
        composed_backward::<Self>(dout, qkv, out, lse, n_head, dropout, held)
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
    if dropout.is_on() { B::dropout(x, dropout, None) } else { x }
}

/// Sizes of a packed projection, where the CPU's loops serve it.
fn cpu_sizes(qkv: &FloatTensor<Flex>, heads: usize) -> Option<Sizes> {
    let [batch, time, width] = qkv.shape().dims::<3>();
    let sizes = Sizes { batch, time, heads, head_dim: width / 3 / heads };
    (cpu::serves(&[qkv]) && width == 3 * heads * sizes.head_dim).then_some(sizes)
}

impl AttentionOps for Flex {
    fn causal_attention(
        qkv: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let Some(sizes) = cpu_sizes(&qkv, n_head) else {
            return composed_forward::<Self>(widen::<Self>(qkv, whole), n_head, dropout);
        };
        let qkv = cpu::contiguous(qkv);
        let (out, lse) = cpu::attention::forward(cpu::values(&qkv), sizes, dropout);
        let Sizes { batch, time, heads, head_dim } = sizes;
        let (out_shape, lse_shape) = (Shape::new([batch, time, heads * head_dim]), Shape::new([batch, heads, time, 1]));
        (cpu::tensor(out, out_shape), cpu::tensor(lse, lse_shape))
    }

    fn causal_attention_backward(
        dout: FloatTensor<Self>,
        qkv: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
        held: Option<f32>,
    ) -> FloatTensor<Self> {
        let Some(sizes) = cpu_sizes(&qkv, n_head) else {
            return composed_backward::<Self>(dout, qkv, out, lse, n_head, dropout, held);
        };
        let [dout, qkv, out, lse] = [dout, qkv, out, lse].map(cpu::contiguous);
        let [given_dout, given_qkv, given_out, given_lse] = [&dout, &qkv, &out, &lse].map(cpu::values);
        let given = cpu::attention::Backward { dout: given_dout, qkv: given_qkv, out: given_out, lse: given_lse };
        hold::<Self>(cpu::tensor(cpu::attention::backward(given, sizes, dropout), qkv.shape()), held)
    }
}

/// The whole of [`AttentionOps::causal_attention`]'s default, for the GPU path to fall back on.
fn composed_forward<B: DropoutOps>(
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

/// The whole of [`AttentionOps::causal_attention_backward`]'s default.
fn composed_backward<B: DropoutOps>(
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

/// The kernels that serve `qkv` under the user's choice, and beside it an f32 out where `is_mixed`; none: the composed version.
fn variant(qkv: &CubeTensor, n_head: usize, is_mixed: bool) -> Option<Variant> {
    let channels = qkv.meta.shape()[2] / 3;
    let head_dim = channels / n_head;
    let variant = kernel::variant(qkv).filter(|variant| !is_mixed || variant.rounds_f32())?;
    if !HEAD_DIMS.contains(&head_dim) {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            tracing::warn!(
                "no fused attention for head dimension {head_dim} (there is {HEAD_DIMS:?}): composed instead"
            );
        });
        return None;
    }
    Some(variant)
}

/// Sizes and dropout as the attention kernels' `Params`, and the factor of a gradient of `out`'s type, which one of qkv in f16 keeps.
fn params(qkv: &CubeTensor, out: &CubeTensor, n_head: usize, dropout: Dropout) -> Vec<u32> {
    let [batch, time, _] = qkv.meta.shape().dims::<3>();
    let mut params = vec![batch as u32, n_head as u32, time as u32, 0];
    params.extend(dropout.params());
    let scale = gradient_scale(out, batch * time);
    let result = if qkv.dtype == DType::F16 { 1.0 } else { scale.recip() };
    params.extend([scale, result].map(f32::to_bits));
    params
}

/// Queues one of the tiled kernels over `tensors`, bound in the order that its file states; all are contiguous. Cooperative ones take an
/// f32 out or dout beside qkv in f16 too, and dqkv is held then.
/// `few_registers` is its device's ([`kernel::Capabilities`]).
///
/// For the tests and benchmarks, which give their own outputs; the model calls [`causal_attention`].
pub fn launch(
    pass: Pass,
    variant: Variant,
    few_registers: bool,
    n_head: usize,
    dropout: Dropout,
    qkv: &CubeTensor,
    tensors: &[&CubeTensor],
) {
    let [batch, time, width] = qkv.meta.shape().dims::<3>();
    let f16 = [qkv, tensors[1]].map(|tensor| tensor.dtype == DType::F16);
    let (kernel, rows) = tiles::kernel(pass, variant, few_registers, width / 3 / n_head, f16, dropout.is_on());
    let groups = batch * n_head * time.div_ceil(rows as usize);
    // Two products of the lower triangle forward; backward makes five, of which dQ and dK/dV share S and dP.
    let products = if pass == Pass::Forward { 2.0 } else { 2.5 };
    let flops = products * (batch * width / 3) as f64 * (time as f64).powi(2);
    kernel.with_work(Work { flops, ..Work::default() }).launch(
        fold(groups as u32),
        tensors,
        &params(qkv, tensors[1], n_head, dropout),
    );
}

/// Queues delta = rowsum(dout · out) over [dout, out, delta].
pub fn launch_delta(n_head: usize, qkv: &CubeTensor, tensors: &[&CubeTensor]) {
    let [batch, time, width] = qkv.meta.shape().dims::<3>();
    let (kernel, rows) = tiles::delta_kernel(width / 3 / n_head, tensors[0].dtype == DType::F16);
    let groups = (batch * time * n_head).div_ceil(rows as usize);
    kernel.launch(fold(groups as u32), tensors, &params(qkv, tensors[0], n_head, Dropout::OFF));
}

/// A contiguous f32 tensor (B, H, T, 1) on qkv's device.
fn row_values(qkv: &CubeTensor, n_head: usize) -> CubeTensor {
    let [batch, time, _] = qkv.meta.shape().dims::<3>();
    let shape = Shape::new([batch, n_head, time, 1]);
    let buffer = qkv.client.empty(shape.num_elements() * 4);
    CubeTensor::new_contiguous(qkv.client.clone(), qkv.device.clone(), shape, buffer, DType::F32)
}

impl AttentionOps for CubeBackend {
    fn causal_attention(
        qkv: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let dtype = if whole { DType::F32 } else { qkv.dtype };
        let Some(variant) = variant(&qkv, n_head, dtype != qkv.dtype) else {
            // In f32: f16 has no room for the mask, nor for sums of exponentials.
            let (out, lse) = composed_forward::<Self>(Self::float_cast(qkv, FloatDType::F32), n_head, dropout);
            return (Self::float_cast(out, dtype.into()), lse);
        };
        let qkv = into_contiguous(qkv);
        let [batch, time, width] = qkv.meta.shape().dims::<3>();
        let out = kernel::empty_of(&qkv, Shape::new([batch, time, width / 3]), dtype);
        let lse = row_values(&qkv, n_head);
        launch(Pass::Forward, variant, kernel::few_registers(&qkv), n_head, dropout, &qkv, &[&qkv, &out, &lse]);
        (out, lse)
    }

    fn causal_attention_backward(
        dout: FloatTensor<Self>,
        qkv: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
        held: Option<f32>,
    ) -> FloatTensor<Self> {
        let Some(variant) = variant(&qkv, n_head, held.is_some()) else {
            let dtype = qkv.dtype.into();
            let [dout, qkv, out] = [dout, qkv, out].map(|tensor| Self::float_cast(tensor, FloatDType::F32));
            return Self::float_cast(composed_backward::<Self>(dout, qkv, out, lse, n_head, dropout, held), dtype);
        };
        let (dout, qkv, out, lse) =
            (into_contiguous(dout), into_contiguous(qkv), into_contiguous(out), into_contiguous(lse));
        let delta = row_values(&qkv, n_head);
        let dqkv = kernel::empty_like(&qkv);
        launch_delta(n_head, &qkv, &[&dout, &out, &delta]);
        let tensors = [&qkv, &dout, &lse, &delta, &dqkv];
        for pass in [Pass::Dq, Pass::Dkv] {
            launch(pass, variant, kernel::few_registers(&qkv), n_head, dropout, &qkv, &tensors);
        }
        dqkv
    }
}

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
            let dqkv = B::causal_attention_backward(dout, s.qkv, s.out, s.lse, s.n_head, s.dropout, None);
            grads.register::<B>(qkv.id, dqkv);
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn causal_attention(
        qkv: FloatTensor<Self>,
        n_head: usize,
        dropout: Dropout,
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let prepared = AttentionBackward.prepare::<C>([qkv.node()]).compute_bound().stateful();
        let qkv = <Self as AutodiffBackend>::inner(qkv);
        let (out, lse) = B::causal_attention(qkv.clone(), n_head, dropout, whole);
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
    let (out, _) = <Dispatch as AttentionOps>::causal_attention(qkv.into_dispatch(), n_head, dropout, false);
    Tensor::from_dispatch(out)
}
