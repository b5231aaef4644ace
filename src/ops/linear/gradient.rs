//! The gradient of linear layers: one node of Burn's graph for each.

use burn::backend::{
    Autodiff, AutodiffBackend, Backend,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::FloatTensor,
};

use super::{Gelu, LinearOps};
use crate::ops::Optional;
use crate::ops::dropout::Dropout;

/// What stands between the product and the output.
#[derive(Clone, Debug)]
enum After<B: LinearOps> {
    None,
    Gelu(Gelu, FloatTensor<B>),
    Residual(Dropout),
}

#[derive(Clone, Debug)]
struct LinearState<B: LinearOps> {
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    has_bias: bool,
    after: After<B>,
}

/// Parents: x, w, then the bias and the residual where there are any.
#[derive(Debug)]
struct LinearBackward<const N: usize>;

impl<B: LinearOps, const N: usize> Backward<B, N> for LinearBackward<N> {
    type State = LinearState<B>;

    fn backward(self, ops: Ops<LinearState<B>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let LinearState { x, w, has_bias, after } = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let dy = match after {
            After::None => dy,
            After::Gelu(gelu, h) => B::gelu_dh(dy, h, gelu, None), // y = gelu(h)  =>  dh = dy gelu'(h)
            After::Residual(dropout) => {
                if let Some(residual) = &ops.parents[2 + usize::from(has_bias)] {
                    grads.register::<B>(residual.id, dy.clone()); // y = residual + ...
                }
                if dropout.is_on() { B::dropout(dy, dropout, None) } else { dy }
            }
        };
        if has_bias && let Some(b) = &ops.parents[2] {
            grads.register::<B>(b.id, B::linear_db(dy.clone(), None)); // h = ... + b  =>  db = Σ dh
        }
        if let Some(node) = &ops.parents[1] {
            grads.register::<B>(node.id, B::linear_dw(dy.clone(), x, None)); // h = x wᵀ  =>  dw = dhᵀ x
        }
        if let Some(node) = &ops.parents[0] {
            grads.register::<B>(node.id, B::linear_dx(dy, w, None)); // h = x wᵀ  =>  dx = dh w
        }
    }
}

/// Ends the recording of one node.
fn record<B: LinearOps, C: CheckpointStrategy, const N: usize>(
    node: OpsKind<LinearBackward<N>, B, LinearState<B>, C, N>,
    y: FloatTensor<B>,
    state: LinearState<B>,
) -> FloatTensor<Autodiff<B, C>> {
    match node {
        OpsKind::Tracked(prepared) => prepared.finish(state, y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

impl<B: LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn linear_forward(x: FloatTensor<Self>, w: FloatTensor<Self>, b: Optional<Self>) -> FloatTensor<Self> {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let y = B::linear_forward(xi.clone(), wi.clone(), bi);
        let state = state(xi, wi, has_bias(&b), After::None);
        match b {
            Optional::Present(b) => record(
                LinearBackward::<3>.prepare::<C>([x.node(), w.node(), b.node()]).compute_bound().stateful(),
                y,
                state,
            ),
            Optional::Absent => {
                record(LinearBackward::<2>.prepare::<C>([x.node(), w.node()]).compute_bound().stateful(), y, state)
            }
        }
    }

    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        gelu: Gelu,
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let (y, h) = B::linear_gelu(xi.clone(), wi.clone(), bi, gelu, whole);
        let state = state(xi, wi, has_bias(&b), After::Gelu(gelu, h.clone()));
        let y = match b {
            Optional::Present(b) => record(
                LinearBackward::<3>.prepare::<C>([x.node(), w.node(), b.node()]).compute_bound().stateful(),
                y,
                state,
            ),
            Optional::Absent => {
                record(LinearBackward::<2>.prepare::<C>([x.node(), w.node()]).compute_bound().stateful(), y, state)
            }
        };
        (y, <Self as AutodiffBackend>::from_inner(h))
    }

    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let ri = <Self as AutodiffBackend>::inner(residual.clone());
        let y = B::linear_residual(xi.clone(), wi.clone(), bi, ri, dropout);
        let state = state(xi, wi, has_bias(&b), After::Residual(dropout));
        let (x, w, r) = (x.node(), w.node(), residual.node());
        match b {
            Optional::Present(b) => {
                record(LinearBackward::<4>.prepare::<C>([x, w, b.node(), r]).compute_bound().stateful(), y, state)
            }
            Optional::Absent => {
                record(LinearBackward::<3>.prepare::<C>([x, w, r]).compute_bound().stateful(), y, state)
            }
        }
    }
}

/// The tensors of the backend below.
fn inner<B: LinearOps, C: CheckpointStrategy>(
    x: &FloatTensor<Autodiff<B, C>>,
    w: &FloatTensor<Autodiff<B, C>>,
    b: &Optional<Autodiff<B, C>>,
) -> (FloatTensor<B>, FloatTensor<B>, Optional<B>) {
    (x.primitive().clone(), w.primitive().clone(), b.inner())
}

fn has_bias<B: Backend>(bias: &Optional<B>) -> bool {
    matches!(bias, Optional::Present(_))
}

fn state<B: LinearOps>(x: FloatTensor<B>, w: FloatTensor<B>, has_bias: bool, after: After<B>) -> LinearState<B> {
    LinearState { x, w, has_bias, after }
}
