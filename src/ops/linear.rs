//! Linear layers with what follows them: bias, bias + GELU, bias + dropout + residual.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    ops::ActivationOps,
    tensor::FloatTensor,
};
use burn::tensor::{Shape, Tensor};
use burn_cubecl::CubeBackend;
use serde::{Deserialize, Serialize};

use super::dropout::{Dropout, DropoutOps};
use super::{Bias, flatten};

/// Which GELU: GPT-2 was trained with the tanh approximation, nanoGPT uses the exact one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// x Φ(x) with the error function.
    #[default]
    Erf,
    /// x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))).
    Tanh,
}

/// √(2/π), the constant of the tanh GELU.
const TANH_SCALE: f64 = 0.797_884_560_802_865_4;
const TANH_CUBIC: f64 = 0.044_715;

/// y = x Wᵀ + b and its three gradients. W is (out, in), row-major.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait LinearOps: DropoutOps {
    /// x (..., K), w (N, K), b (N) -> (..., N).
    fn linear_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Bias<Self>,
    ) -> FloatTensor<Self> {
        let mut shape = x.shape();
        let outputs = w.shape()[0];
        let y = Self::float_matmul(flatten::<Self>(x), Self::float_transpose(w)); // (M, N)
        let y = match b {
            Bias::Present(b) => Self::float_add(y, Self::float_reshape(b, Shape::new([1, outputs]))),
            Bias::Absent => y,
        };
        let last = shape.num_dims() - 1;
        shape[last] = outputs;
        Self::float_reshape(y, shape)
    }

    /// dx (..., K) = dy (..., N) · w (N, K).
    fn linear_dx(dy: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let mut shape = dy.shape();
        let last = shape.num_dims() - 1;
        shape[last] = w.shape()[1];
        Self::float_reshape(Self::float_matmul(flatten::<Self>(dy), w), shape)
    }

    /// dw (N, K) = dyᵀ · x over all rows.
    fn linear_dw(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(Self::float_transpose(flatten::<Self>(dy)), flatten::<Self>(x))
    }

    /// db (N) = sum of dy over all rows.
    fn linear_db(dy: FloatTensor<Self>) -> FloatTensor<Self> {
        let outputs = dy.shape()[dy.shape().num_dims() - 1];
        Self::float_reshape(Self::float_sum_dim(flatten::<Self>(dy), 0), Shape::new([outputs]))
    }

    /// h = x Wᵀ + b, y = gelu(h). Returns (y, h): the backward needs h.
    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Bias<Self>,
        gelu: Gelu,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let h = Self::linear_forward(x, w, b);
        (Self::gelu_of(h.clone(), gelu), h)
    }

    /// gelu(h), element by element.
    fn gelu_of(h: FloatTensor<Self>, gelu: Gelu) -> FloatTensor<Self> {
        match gelu {
            Gelu::Erf => Self::gelu(h),
            Gelu::Tanh => {
                let tanh = Self::float_tanh(tanh_argument::<Self>(h.clone()));
                let half = Self::float_mul_scalar(h, 0.5.into());
                Self::float_mul(half, Self::float_add_scalar(tanh, 1.0.into()))
            }
        }
    }

    /// dh = dy · gelu'(h).
    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu) -> FloatTensor<Self> {
        composed_gelu_dh::<Self>(dy, h, gelu)
    }

    /// y = residual + dropout(x Wᵀ + b).
    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Bias<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let y = Self::linear_forward(x, w, b);
        let y = if dropout.is_on() { Self::dropout(y, dropout) } else { y };
        Self::float_add(residual, y)
    }
}

/// dh = dy · gelu'(h) in Burn primitives.
fn composed_gelu_dh<B: Backend>(dy: FloatTensor<B>, h: FloatTensor<B>, gelu: Gelu) -> FloatTensor<B> {
    match gelu {
        Gelu::Erf => {
            // gelu' = Φ(h) + h φ(h). Burn's own gelu_backward is that of the tanh approximation on wgpu.
            let scaled = B::float_mul_scalar(h.clone(), FRAC_1_SQRT_2.into());
            let twice_cdf = B::float_add_scalar(B::float_erf(scaled), 1.0.into());
            let cdf = B::float_mul_scalar(twice_cdf, 0.5.into());
            let square = B::float_mul(h.clone(), h.clone());
            let pdf = B::float_exp(B::float_mul_scalar(square, (-0.5).into()));
            let pdf = B::float_mul_scalar(pdf, (0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2).into());
            B::float_mul(dy, B::float_add(cdf, B::float_mul(h, pdf)))
        }
        Gelu::Tanh => {
            // gelu' = (1 + t)/2 + h/2 (1 - t²) √(2/π) (1 + 3 · 0.044715 h²), t = tanh(argument)
            let t = B::float_tanh(tanh_argument::<B>(h.clone()));
            let half = B::float_mul_scalar(B::float_add_scalar(t.clone(), 1.0.into()), 0.5.into());
            let sech2 = B::float_add_scalar(B::float_neg(B::float_mul(t.clone(), t)), 1.0.into());
            let square = B::float_mul(h.clone(), h.clone());
            let slope = B::float_add_scalar(B::float_mul_scalar(square, (3.0 * TANH_CUBIC).into()), 1.0.into());
            let inner = B::float_mul(B::float_mul(h, sech2), slope);
            let inner = B::float_mul_scalar(inner, (0.5 * TANH_SCALE).into());
            B::float_mul(dy, B::float_add(half, inner))
        }
    }
}

/// √(2/π) (h + 0.044715 h³).
fn tanh_argument<B: Backend>(h: FloatTensor<B>) -> FloatTensor<B> {
    let square = B::float_mul(h.clone(), h.clone());
    let factor = B::float_add_scalar(B::float_mul_scalar(square, TANH_CUBIC.into()), 1.0.into());
    B::float_mul_scalar(B::float_mul(h, factor), TANH_SCALE.into())
}

impl LinearOps for Flex {
    /// Flex's own gelu_backward is the exact one, in a single pass over memory instead of ten.
    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu) -> FloatTensor<Self> {
        match gelu {
            Gelu::Erf => Self::gelu_backward(h, dy),
            Gelu::Tanh => composed_gelu_dh::<Self>(dy, h, gelu),
        }
    }
}

impl LinearOps for CubeBackend {}

/// What stands between the product and the output.
#[derive(Clone, Debug)]
enum Epilogue<B: LinearOps> {
    None,
    Gelu(Gelu, FloatTensor<B>),
    Residual(Dropout),
}

#[derive(Clone, Debug)]
struct LinearState<B: LinearOps> {
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    has_bias: bool,
    epilogue: Epilogue<B>,
}

/// Parents: x, w, then the bias and the residual where there are any.
#[derive(Debug)]
struct LinearBackward<const N: usize>;

impl<B: LinearOps, const N: usize> Backward<B, N> for LinearBackward<N> {
    type State = LinearState<B>;

    fn backward(self, ops: Ops<LinearState<B>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let LinearState { x, w, has_bias, epilogue } = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let dy = match epilogue {
            Epilogue::None => dy,
            Epilogue::Gelu(gelu, h) => B::gelu_dh(dy, h, gelu), // y = gelu(h)  =>  dh = dy gelu'(h)
            Epilogue::Residual(dropout) => {
                if let Some(residual) = &ops.parents[2 + usize::from(has_bias)] {
                    grads.register::<B>(residual.id, dy.clone()); // y = residual + ...
                }
                if dropout.is_on() { B::dropout(dy, dropout) } else { dy }
            }
        };
        if has_bias && let Some(b) = &ops.parents[2] {
            grads.register::<B>(b.id, B::linear_db(dy.clone())); // h = ... + b  =>  db = Σ dh
        }
        if let Some(node) = &ops.parents[1] {
            grads.register::<B>(node.id, B::linear_dw(dy.clone(), x)); // h = x wᵀ  =>  dw = dhᵀ x
        }
        if let Some(node) = &ops.parents[0] {
            grads.register::<B>(node.id, B::linear_dx(dy, w)); // h = x wᵀ  =>  dx = dh w
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
    fn linear_forward(x: FloatTensor<Self>, w: FloatTensor<Self>, b: Bias<Self>) -> FloatTensor<Self> {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let y = B::linear_forward(xi.clone(), wi.clone(), bi);
        let state = state(xi, wi, has_bias(&b), Epilogue::None);
        match b {
            Bias::Present(b) => record(
                LinearBackward::<3>.prepare::<C>([x.node(), w.node(), b.node()]).compute_bound().stateful(),
                y,
                state,
            ),
            Bias::Absent => {
                record(LinearBackward::<2>.prepare::<C>([x.node(), w.node()]).compute_bound().stateful(), y, state)
            }
        }
    }

    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Bias<Self>,
        gelu: Gelu,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let (y, h) = B::linear_gelu(xi.clone(), wi.clone(), bi, gelu);
        let state = state(xi, wi, has_bias(&b), Epilogue::Gelu(gelu, h.clone()));
        let y = match b {
            Bias::Present(b) => record(
                LinearBackward::<3>.prepare::<C>([x.node(), w.node(), b.node()]).compute_bound().stateful(),
                y,
                state,
            ),
            Bias::Absent => {
                record(LinearBackward::<2>.prepare::<C>([x.node(), w.node()]).compute_bound().stateful(), y, state)
            }
        };
        (y, <Self as AutodiffBackend>::from_inner(h))
    }

    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Bias<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let ri = <Self as AutodiffBackend>::inner(residual.clone());
        let y = B::linear_residual(xi.clone(), wi.clone(), bi, ri, dropout);
        let state = state(xi, wi, has_bias(&b), Epilogue::Residual(dropout));
        let (x, w, r) = (x.node(), w.node(), residual.node());
        match b {
            Bias::Present(b) => {
                record(LinearBackward::<4>.prepare::<C>([x, w, b.node(), r]).compute_bound().stateful(), y, state)
            }
            Bias::Absent => record(LinearBackward::<3>.prepare::<C>([x, w, r]).compute_bound().stateful(), y, state),
        }
    }
}

/// The tensors of the backend below.
fn inner<B: LinearOps, C: CheckpointStrategy>(
    x: &FloatTensor<Autodiff<B, C>>,
    w: &FloatTensor<Autodiff<B, C>>,
    b: &Bias<Autodiff<B, C>>,
) -> (FloatTensor<B>, FloatTensor<B>, Bias<B>) {
    let b = match b {
        Bias::Present(b) => Bias::Present(b.primitive().clone()),
        Bias::Absent => Bias::Absent,
    };
    (x.primitive().clone(), w.primitive().clone(), b)
}

fn has_bias<B: Backend>(bias: &Bias<B>) -> bool {
    matches!(bias, Bias::Present(_))
}

fn state<B: LinearOps>(x: FloatTensor<B>, w: FloatTensor<B>, has_bias: bool, epilogue: Epilogue<B>) -> LinearState<B> {
    LinearState { x, w, has_bias, epilogue }
}

/// x (..., K), w (N, K), b (N) -> x wᵀ + b, (..., N).
pub fn linear<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as LinearOps>::linear_forward(x.into_dispatch(), w.into_dispatch(), Bias::of(b)))
}

/// gelu(x wᵀ + b): x (..., K), w (N, K), b (N) -> (..., N).
pub fn linear_gelu<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>, gelu: Gelu) -> Tensor<D> {
    let (y, _) = <Dispatch as LinearOps>::linear_gelu(x.into_dispatch(), w.into_dispatch(), Bias::of(b), gelu);
    Tensor::from_dispatch(y)
}

/// residual + dropout(x wᵀ + b): x (..., K), w (N, K), b (N), residual (..., N) -> (..., N).
pub fn linear_residual<const D: usize>(
    x: Tensor<D>,
    w: Tensor<2>,
    b: Option<Tensor<1>>,
    residual: Tensor<D>,
    dropout: Dropout,
) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as LinearOps>::linear_residual(
        x.into_dispatch(),
        w.into_dispatch(),
        Bias::of(b),
        residual.into_dispatch(),
        dropout,
    ))
}
