//! The two halves of a block, each one operation: x + attention(norm(x)) and x + mlp(norm(x)).
//!
//! They are made of the other operations. As one node of the graph each, their backward adds what comes past the branch where
//! the norm's gradient is made, and costs the host one node instead of five.

use burn::backend::{
    Autodiff, Backend, Dispatch, ExtensionType, Flex, TensorMetadata,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;

use super::attention::AttentionOps;
use super::cast::to_f16;
use super::dropout::Dropout;
use super::layer_norm::LayerNormOps;
use super::linear::{Gelu, LinearOps};
use super::{Optional, held};

/// Half blocks.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait BlockOps: AttentionOps + LayerNormOps + LinearOps {
    /// x + dropout(attention(norm(x) w_inᵀ + b_in) w_outᵀ + b_out): x (B, T, C), norm (C), w_in (3C, C), w_out (C, C) -> (B, T, C).
    fn attention_block(
        x: FloatTensor<Self>,
        #[extension_type] weights: Weights<Self>,
        n_head: usize,
        dropouts: [Dropout; 2],
    ) -> FloatTensor<Self> {
        forward::<Self>(x, weights, Branch::Attention(n_head, dropouts[0]), dropouts[1]).0
    }

    /// x + dropout(gelu(norm(x) w_inᵀ + b_in) w_outᵀ + b_out): x (B, T, C), norm (C), w_in (4C, C), w_out (C, 4C) -> (B, T, C).
    fn mlp_block(
        x: FloatTensor<Self>,
        #[extension_type] weights: Weights<Self>,
        gelu: Gelu,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        forward::<Self>(x, weights, Branch::Mlp(gelu), dropout).0
    }
}

impl BlockOps for Flex {}
impl BlockOps for CubeBackend {}

/// The parameters of a half block. Biases are all there, or none is.
#[derive(ExtensionType, Clone, Debug)]
pub struct Weights<B: Backend> {
    norm_w: FloatTensor<B>,
    #[extension_type]
    norm_b: Optional<B>,
    w_in: FloatTensor<B>,
    /// What is multiplied instead of w_in: its copy in f16, which is there where x is f16, or may be where products of f32 round to it.
    /// The gradient is w_in's.
    #[extension_type]
    rounded_in: Optional<B>,
    #[extension_type]
    b_in: Optional<B>,
    w_out: FloatTensor<B>,
    /// As rounded_in.
    #[extension_type]
    rounded_out: Optional<B>,
    #[extension_type]
    b_out: Optional<B>,
}

/// What stands between the two products.
#[derive(Clone, Copy, Debug)]
enum Branch {
    /// Heads, dropout of the probabilities.
    Attention(usize, Dropout),
    Mlp(Gelu),
}

/// What the backward needs.
#[derive(Clone, Debug)]
struct Saved<B: BlockOps> {
    x: FloatTensor<B>,
    norm_w: FloatTensor<B>,
    mean: FloatTensor<B>,
    rstd: FloatTensor<B>,
    normed: FloatTensor<B>,
    /// As the backward multiplies it, and w_out.
    w_in: FloatTensor<B>,
    /// The first product: qkv, or what goes into GELU.
    inner: FloatTensor<B>,
    /// What the second product is made from.
    outer: FloatTensor<B>,
    /// Attention's log-sum-exp.
    lse: Option<FloatTensor<B>>,
    w_out: FloatTensor<B>,
    branch: Branch,
    dropout: Dropout,
    /// What the gradients are stored times that only products read, where these are f16 and x is not ([`held`]).
    held: Option<f32>,
}

fn forward<B: BlockOps>(
    x: FloatTensor<B>,
    weights: Weights<B>,
    branch: Branch,
    dropout: Dropout,
) -> (FloatTensor<B>, Saved<B>) {
    let Weights { norm_w, norm_b, w_in, rounded_in, b_in, w_out, rounded_out, b_out } = weights;
    let is_rounded = matches!(rounded_in, Optional::Present(_));
    // What only products read is stored as they would round it: f16 where everything else is f32.
    let held =
        (is_rounded && x.dtype() == DType::F32).then(|| held(x.shape().num_elements() / norm_w.shape()[0].max(1)));
    let (w_in, rounded_out) = (rounded_in.unwrap_or(w_in), rounded_out.unwrap_or(w_out.clone()));
    let (normed, mean, rstd) = B::layer_norm_forward(x.clone(), norm_w.clone(), norm_b, held.is_some());
    let (inner, outer, w_out, lse) = match branch {
        Branch::Attention(n_head, dropout) => {
            let qkv = B::linear_forward(normed.clone(), w_in.clone(), b_in);
            let (heads, lse) = B::causal_attention(qkv.clone(), n_head, dropout, held.is_some());
            (qkv, heads, if held.is_some() { w_out } else { rounded_out.clone() }, Some(lse))
        }
        Branch::Mlp(gelu) => {
            let (hidden, h) = B::linear_gelu(normed.clone(), w_in.clone(), b_in, gelu, held.is_some());
            (h, hidden, rounded_out.clone(), None)
        }
    };
    let y = B::linear_residual(outer.clone(), w_out, b_out, x.clone(), dropout);
    let w_out = rounded_out;
    (y, Saved { x, norm_w, mean, rstd, normed, w_in, inner, outer, lse, w_out, branch, dropout, held })
}

/// Parents: x, norm_w, w_in, w_out, then norm_b, b_in, b_out where there are biases.
#[derive(Debug)]
struct BlockBackward<const N: usize>;

impl<B: BlockOps, const N: usize> Backward<B, N> for BlockBackward<N> {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Saved<B>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let s = ops.state;
        // The parent's id where a gradient of it is wanted.
        let wanted = |i: usize| -> Option<NodeId> { ops.parents.get(i).and_then(Option::as_ref).map(|node| node.id) };
        let [x, norm_w, w_in, w_out, norm_b, b_in, b_out] = std::array::from_fn(wanted);
        // y = x + dropout(outer w_outᵀ + b_out)
        let is_whole = !s.dropout.is_on() && s.held.is_none();
        let dz = if is_whole { dy.clone() } else { B::dropout(dy.clone(), s.dropout, s.held) };
        if let Some(b_out) = b_out {
            grads.register::<B>(b_out, B::linear_db(dz.clone(), s.held));
        }
        // Attention's backward needs the heads once more; the MLP's hidden layer goes as soon as it can.
        let heads = matches!(s.branch, Branch::Attention(..)).then(|| s.outer.clone());
        if let Some(w_out) = w_out {
            grads.register::<B>(w_out, B::linear_dw(dz.clone(), s.outer, s.held));
        }
        let dinner = match (s.branch, heads.zip(s.lse)) {
            (Branch::Attention(n_head, dropout), Some((heads, lse))) => {
                let dheads = B::linear_dx(dz, s.w_out, s.held);
                B::causal_attention_backward(dheads, s.inner, heads, lse, n_head, dropout, s.held)
            }
            // outer = gelu(inner)
            (Branch::Mlp(gelu), _) => B::linear_dh(dz, s.w_out, s.inner, gelu, s.held),
            (Branch::Attention(..), None) => return, // attention's forward always has one
        };
        // inner = normed w_inᵀ + b_in
        if let Some(b_in) = b_in {
            grads.register::<B>(b_in, B::linear_db(dinner.clone(), s.held));
        }
        if let Some(w_in) = w_in {
            grads.register::<B>(w_in, B::linear_dw(dinner.clone(), s.normed, s.held));
        }
        if x.is_none() && norm_w.is_none() && norm_b.is_none() {
            return;
        }
        let dnormed = B::linear_dx(dinner, s.w_in, s.held);
        // normed = norm(x); x goes past the branch too
        let (dx, dw, db) = B::layer_norm_backward(dnormed, s.x, s.norm_w, s.mean, s.rstd, Optional::Present(dy));
        for (parent, gradient) in [(x, dx), (norm_w, dw), (norm_b, db)] {
            if let Some(parent) = parent {
                grads.register::<B>(parent, gradient);
            }
        }
    }
}

impl<B: BlockOps, C: CheckpointStrategy> BlockOps for Autodiff<B, C> {
    fn attention_block(
        x: FloatTensor<Self>,
        weights: Weights<Self>,
        n_head: usize,
        dropouts: [Dropout; 2],
    ) -> FloatTensor<Self> {
        record::<B, C>(x, weights, Branch::Attention(n_head, dropouts[0]), dropouts[1])
    }

    fn mlp_block(x: FloatTensor<Self>, weights: Weights<Self>, gelu: Gelu, dropout: Dropout) -> FloatTensor<Self> {
        record::<B, C>(x, weights, Branch::Mlp(gelu), dropout)
    }
}

/// Runs the forward below and records it as one node.
fn record<B: BlockOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weights: Weights<Autodiff<B, C>>,
    branch: Branch,
    dropout: Dropout,
) -> FloatTensor<Autodiff<B, C>> {
    let Weights { norm_w, norm_b, w_in, rounded_in, b_in, w_out, rounded_out, b_out } = weights;
    let inner = |tensor: &FloatTensor<Autodiff<B, C>>| tensor.primitive().clone();
    let below = Weights {
        norm_w: inner(&norm_w),
        norm_b: norm_b.inner(),
        w_in: inner(&w_in),
        rounded_in: rounded_in.inner(),
        b_in: b_in.inner(),
        w_out: inner(&w_out),
        rounded_out: rounded_out.inner(),
        b_out: b_out.inner(),
    };
    let (y, saved) = forward::<B>(inner(&x), below, branch, dropout);
    let [x, norm_w, w_in, w_out] = [x, norm_w, w_in, w_out].map(|tensor| tensor.node());
    match (norm_b, b_in, b_out) {
        (Optional::Present(norm_b), Optional::Present(b_in), Optional::Present(b_out)) => {
            let parents = [x, norm_w, w_in, w_out, norm_b.node(), b_in.node(), b_out.node()];
            match BlockBackward::<7>.prepare::<C>(parents).compute_bound().stateful() {
                OpsKind::Tracked(prepared) => prepared.finish(saved, y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
        _ => match BlockBackward::<4>.prepare::<C>([x, norm_w, w_in, w_out]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(saved, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        },
    }
}

/// The parameters of a half block.
pub struct Parameters {
    /// The norm's weight (C) and bias (C).
    pub norm: (Tensor<1>, Option<Tensor<1>>),
    /// The first product's.
    pub inner: Layer,
    /// The second product's.
    pub outer: Layer,
}

/// The parameters of a product.
pub struct Layer {
    /// (out, in) f32.
    pub weight: Tensor<2>,
    /// The weight in f16, without autodiff, where somebody has it: then it is what is multiplied.
    pub rounded: Option<Tensor<2>>,
    /// (out).
    pub bias: Option<Tensor<1>>,
}

impl Parameters {
    /// Zeros for the biases that are missing where another is there, and copies of the weights in f16 where x is and they are
    /// missing.
    fn complete(mut self, x: &Tensor<3>) -> Weights<Dispatch> {
        let Self { norm, inner, outer } = &mut self;
        if norm.1.is_some() || inner.bias.is_some() || outer.bias.is_some() {
            let zeros = |count: usize| Tensor::zeros([count], &norm.0.device());
            let counts = [norm.0.dims()[0], inner.weight.dims()[0], outer.weight.dims()[0]];
            for (bias, count) in [&mut norm.1, &mut inner.bias, &mut outer.bias].into_iter().zip(counts) {
                bias.get_or_insert_with(|| zeros(count));
            }
        }
        for layer in [inner, outer] {
            if x.dtype() == DType::F16 && layer.rounded.is_none() {
                layer.rounded = Some(to_f16(layer.weight.clone().inner()));
            }
        }
        let Self { norm, inner, outer } = self;
        Weights {
            norm_w: norm.0.into_dispatch(),
            norm_b: Optional::of(norm.1),
            w_in: inner.weight.into_dispatch(),
            rounded_in: Optional::of(inner.rounded),
            b_in: Optional::of(inner.bias),
            w_out: outer.weight.into_dispatch(),
            rounded_out: Optional::of(outer.rounded),
            b_out: Optional::of(outer.bias),
        }
    }
}

/// x + dropout(attention(norm(x))), its dropout the second, the first on the probabilities: x (B, T, C) -> (B, T, C). Weights are
/// f32 and are multiplied in x's type, or as they are rounded.
pub fn attention_block(x: Tensor<3>, parameters: Parameters, n_head: usize, dropouts: [Dropout; 2]) -> Tensor<3> {
    let weights = parameters.complete(&x);
    let y = <Dispatch as BlockOps>::attention_block(x.into_dispatch(), weights, n_head, dropouts);
    Tensor::from_dispatch(y)
}

/// x + dropout(mlp(norm(x))): x (B, T, C) -> (B, T, C). Weights are f32 and are multiplied in x's type, or as they are rounded.
pub fn mlp_block(x: Tensor<3>, parameters: Parameters, gelu: Gelu, dropout: Dropout) -> Tensor<3> {
    let weights = parameters.complete(&x);
    Tensor::from_dispatch(<Dispatch as BlockOps>::mlp_block(x.into_dispatch(), weights, gelu, dropout))
}
