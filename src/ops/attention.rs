//! Causal self-attention over the packed projection: no transposed copy of q, k or v is ever asked of the caller.

mod composed;
pub mod launches;
pub mod tiles;

use std::sync::Once;

use burn::backend::{
    Autodiff, AutodiffBackend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    ops::FloatTensorOps,
    tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Shape, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use self::launches::{heads_kept, launch, launch_delta, launch_gradients};
use self::tiles::{HEAD_DIMS, Pass, Version};
use super::dropout::{Dropout, DropoutOps};
use super::{hold, widen};
use crate::cpu::{self, attention::Sizes};
use crate::kernel;

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
        composed::forward::<Self>(widen::<Self>(qkv, whole), n_head, dropout)
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
        composed::backward::<Self>(dout, qkv, out, lse, n_head, dropout, held)
    }
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
            return composed::forward::<Self>(widen::<Self>(qkv, whole), n_head, dropout);
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
            return composed::backward::<Self>(dout, qkv, out, lse, n_head, dropout, held);
        };
        let [dout, qkv, out, lse] = [dout, qkv, out, lse].map(cpu::contiguous);
        let [given_dout, given_qkv, given_out, given_lse] = [&dout, &qkv, &out, &lse].map(cpu::values);
        let given = cpu::attention::Backward { dout: given_dout, qkv: given_qkv, out: given_out, lse: given_lse };
        hold::<Self>(cpu::tensor(cpu::attention::backward(given, sizes, dropout), qkv.shape()), held)
    }
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

/// A contiguous f32 tensor (B, H, T, 1) on qkv's device.
fn row_values(qkv: &CubeTensor, n_head: usize) -> CubeTensor {
    let [batch, time, _] = qkv.meta.shape().dims::<3>();
    kernel::empty_of(qkv, Shape::new([batch, n_head, time, 1]), DType::F32)
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
            let (out, lse) = composed::forward::<Self>(Self::float_cast(qkv, FloatDType::F32), n_head, dropout);
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
            return Self::float_cast(composed::backward::<Self>(dout, qkv, out, lse, n_head, dropout, held), dtype);
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
