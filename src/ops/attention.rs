//! Causal self-attention over the packed projection: no transposed copy of q, k or v is ever asked of the caller.

pub mod tiles;

use std::{ops::Range, sync::Once};

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

use self::tiles::{HEAD_DIMS, Pass, Variant, Version};
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
fn version(qkv: &CubeTensor, n_head: usize, is_mixed: bool) -> Option<Version> {
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
    Some(Version { variant, few_registers: kernel::few_registers(qkv) })
}

/// Sizes and dropout as the attention kernels' `Params` for some of the batch * heads, and the factor of a gradient of `out`'s type, which one
/// of qkv in f16 keeps.
fn params(qkv: &CubeTensor, out: &CubeTensor, n_head: usize, heads: Range<usize>, dropout: Dropout) -> Vec<u32> {
    let [batch, time, _] = qkv.meta.shape().dims::<3>();
    let mut params = vec![heads.len() as u32, n_head as u32, time as u32, heads.start as u32];
    params.extend(dropout.params());
    let scale = gradient_scale(out, batch * time);
    let result = if qkv.dtype == DType::F16 { 1.0 } else { scale.recip() };
    params.extend([scale, result].map(f32::to_bits));
    params
}

/// Queues one of the tiled kernels over `tensors`, bound in the order that its file states; all are contiguous. Cooperative ones take an
/// f32 out or dout beside qkv in f16 too, and dqkv is held then.
///
/// For the tests and benchmarks, which give their own outputs; the model calls [`causal_attention`].
pub fn launch(pass: Pass, version: Version, n_head: usize, dropout: Dropout, tensors: &[&CubeTensor]) {
    let heads = 0..tensors[0].meta.shape()[0] * n_head;
    launch_heads(pass, version, n_head, heads, dropout, tensors, tensors[1]);
}

/// The same for some of the batch * heads. `out` is what stands for the type of out: it or its gradient.
fn launch_heads(
    pass: Pass,
    version: Version,
    n_head: usize,
    heads: Range<usize>,
    dropout: Dropout,
    tensors: &[&CubeTensor],
    out: &CubeTensor,
) {
    let qkv = tensors[0];
    let [_, time, width] = qkv.meta.shape().dims::<3>();
    let head_dim = width / 3 / n_head;
    let f16 = [qkv, out].map(|tensor| tensor.dtype == DType::F16);
    let (kernel, rows) = tiles::kernel(pass, version, head_dim, f16, dropout.is_on());
    let groups = heads.len() * time.div_ceil(rows as usize);
    // Products of the lower triangle: two forward; backward five, of which dQ and dK/dV share S and dP where both make them.
    let products = match pass {
        Pass::Forward => 2.0,
        Pass::Dq | Pass::Dkv => 2.5,
        Pass::DkvDs => 4.0,
        Pass::DqOfDs => 1.0,
    };
    let flops = products * (heads.len() * head_dim) as f64 * (time as f64).powi(2);
    let params = params(qkv, out, n_head, heads, dropout);
    kernel.with_work(Work { flops, ..Work::default() }).launch(fold(groups as u32), tensors, &params);
}

/// Queues delta = rowsum(dout · out) over [dout, out, delta].
pub fn launch_delta(n_head: usize, qkv: &CubeTensor, tensors: &[&CubeTensor]) {
    let [batch, time, width] = qkv.meta.shape().dims::<3>();
    let (kernel, rows) = tiles::delta_kernel(width / 3 / n_head, tensors[0].dtype == DType::F16);
    let groups = (batch * time * n_head).div_ceil(rows as usize);
    let params = params(qkv, tensors[0], n_head, 0..batch * n_head, Dropout::OFF);
    kernel.launch(fold(groups as u32), tensors, &params);
}

/// Queues the gradients over [qkv, dout, lse, delta, dqkv], with dS kept between dK/dV and dQ for `heads_kept` of the batch * heads at a
/// time; 0: not at all, dQ computes it again.
pub fn launch_gradients(
    version: Version,
    n_head: usize,
    dropout: Dropout,
    heads_kept: usize,
    tensors: [&CubeTensor; 5],
) {
    let [qkv, dout, lse, delta, dqkv] = tensors;
    if heads_kept == 0 {
        for pass in [Pass::Dq, Pass::Dkv] {
            launch(pass, version, n_head, dropout, &tensors);
        }
        return;
    }
    let [batch, time, _] = qkv.meta.shape().dims::<3>();
    let (dtype, [keys, queries]) = tiles::kept(version.variant, time);
    let kept = kernel::empty_of(qkv, Shape::new([heads_kept, keys, queries]), dtype);
    for first in (0..batch * n_head).step_by(heads_kept) {
        let heads = first..(first + heads_kept).min(batch * n_head);
        let all = [qkv, dout, lse, delta, dqkv, &kept];
        launch_heads(Pass::DkvDs, version, n_head, heads.clone(), dropout, &all, dout);
        launch_heads(Pass::DqOfDs, version, n_head, heads, dropout, &[qkv, &kept, dqkv], dout);
    }
}

/// Bytes of one head's dS.
fn head_kept(variant: Variant, time: usize) -> u64 {
    let (dtype, [keys, queries]) = tiles::kept(variant, time);
    (keys * queries * dtype.size()) as u64
}

/// Bytes of dS that are kept at once, of `heads` heads of `time` tokens.
pub fn bytes_kept(variant: Variant, heads: usize, time: usize, largest_buffer: u64) -> u64 {
    heads_kept(variant, heads, time, largest_buffer) as u64 * head_kept(variant, time)
}

/// Bytes of dS that are kept at once at most: room for the 96 heads of 1024 tokens of GPT-2's 8 sequences in f32. Half of it, and so two rounds
/// of half as many workgroups, cost 1.3 ms of 154 on an H200.
const LARGEST_KEPT: u64 = 512 << 20;

/// The longest sequences whose dS is kept. Twice as long, four heads are a round, 512 workgroups, and what is saved is lost by waiting for the
/// last of each round: 10.8 to 13.6 ms in f32 and 2.15 to 2.69 in f16 at (1, 12, 8192, 64) on an H200, 3.06 to 2.57 and 0.59 to 0.54 at 4096.
const LONGEST_KEPT: usize = 4096;

/// For how many of `heads` heads of `time` tokens dS is kept at once; 0: for none, as they are too long or not one fits.
///
/// dS costs a write and a read and saves two of nine products: D / 2 FLOPs for each byte of f32, D of f16. GPUs make 10 to 30 in the time of one.
pub fn heads_kept(variant: Variant, heads: usize, time: usize, largest_buffer: u64) -> usize {
    let most = (LARGEST_KEPT.min(largest_buffer) / head_kept(variant, time).max(1)) as usize;
    if most == 0 || time > LONGEST_KEPT { 0 } else { heads.div_ceil(heads.div_ceil(most).max(1)) } // rounds of one size
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
        let Some(version) = version(&qkv, n_head, dtype != qkv.dtype) else {
            // In f32: f16 has no room for the mask, nor for sums of exponentials.
            let (out, lse) = composed_forward::<Self>(Self::float_cast(qkv, FloatDType::F32), n_head, dropout);
            return (Self::float_cast(out, dtype.into()), lse);
        };
        let qkv = into_contiguous(qkv);
        let [batch, time, width] = qkv.meta.shape().dims::<3>();
        let out = kernel::empty_of(&qkv, Shape::new([batch, time, width / 3]), dtype);
        let lse = row_values(&qkv, n_head);
        launch(Pass::Forward, version, n_head, dropout, &[&qkv, &out, &lse]);
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
        let Some(version) = version(&qkv, n_head, held.is_some()) else {
            let dtype = qkv.dtype.into();
            let [dout, qkv, out] = [dout, qkv, out].map(|tensor| Self::float_cast(tensor, FloatDType::F32));
            return Self::float_cast(composed_backward::<Self>(dout, qkv, out, lse, n_head, dropout, held), dtype);
        };
        let (dout, qkv, out, lse) =
            (into_contiguous(dout), into_contiguous(qkv), into_contiguous(out), into_contiguous(lse));
        let delta = row_values(&qkv, n_head);
        let dqkv = kernel::empty_like(&qkv);
        launch_delta(n_head, &qkv, &[&dout, &out, &delta]);
        let [batch, time, _] = qkv.meta.shape().dims::<3>();
        let heads_kept = heads_kept(version.variant, batch * n_head, time, kernel::largest_buffer(&qkv));
        launch_gradients(version, n_head, dropout, heads_kept, [&qkv, &dout, &lse, &delta, &dqkv]);
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
