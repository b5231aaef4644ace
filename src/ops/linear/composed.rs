//! [`LinearOps`](super::LinearOps) in Burn primitives: its definition, and what the other paths fall back on.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;

use super::{Gelu, TANH_CUBIC, TANH_SCALE};
use crate::ops::dropout::{Dropout, DropoutOps};
use crate::ops::{Optional, flatten, release, widen};

pub(super) fn forward<B: Backend>(x: FloatTensor<B>, w: FloatTensor<B>, b: Optional<B>) -> FloatTensor<B> {
    let mut shape = x.shape();
    let outputs = w.shape()[0];
    let y = B::float_matmul(flatten::<B>(x), B::float_transpose(w)); // (M, N)
    let y = match b {
        Optional::Present(b) => B::float_add(y, B::float_reshape(b, Shape::new([1, outputs]))),
        Optional::Absent => y,
    };
    let last = shape.num_dims() - 1;
    shape[last] = outputs;
    B::float_reshape(y, shape)
}

pub(super) fn dx<B: Backend>(dy: FloatTensor<B>, w: FloatTensor<B>, held: Option<f32>) -> FloatTensor<B> {
    let (dy, w) = (release::<B>(dy, held), widen::<B>(w, held.is_some()));
    let mut shape = dy.shape();
    let last = shape.num_dims() - 1;
    shape[last] = w.shape()[1];
    B::float_reshape(B::float_matmul(flatten::<B>(dy), w), shape)
}

pub(super) fn dw<B: Backend>(dy: FloatTensor<B>, x: FloatTensor<B>, held: Option<f32>) -> FloatTensor<B> {
    let (dy, x) = (release::<B>(dy, held), widen::<B>(x, held.is_some()));
    B::float_matmul(B::float_transpose(flatten::<B>(dy)), flatten::<B>(x))
}

pub(super) fn db<B: Backend>(dy: FloatTensor<B>, held: Option<f32>) -> FloatTensor<B> {
    let dy = release::<B>(dy, held);
    let outputs = dy.shape()[dy.shape().num_dims() - 1];
    B::float_reshape(B::float_sum_dim(flatten::<B>(dy), 0), Shape::new([outputs]))
}

pub(super) fn gelu<B: Backend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    b: Optional<B>,
    gelu: Gelu,
    whole: bool,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = x.dtype();
    let h = forward::<B>(widen::<B>(x, whole), widen::<B>(w, whole), b);
    let y = match gelu {
        Gelu::Erf => B::gelu(h.clone()),
        Gelu::Tanh => {
            let tanh = B::float_tanh(tanh_argument::<B>(h.clone()));
            let half = B::float_mul_scalar(h.clone(), 0.5.into());
            B::float_mul(half, B::float_add_scalar(tanh, 1.0.into()))
        }
    };
    (if whole { B::float_cast(y, dtype.into()) } else { y }, h)
}

pub(super) fn residual<B: DropoutOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    b: Optional<B>,
    residual: FloatTensor<B>,
    dropout: Dropout,
) -> FloatTensor<B> {
    let whole = residual.dtype() != x.dtype();
    let y = forward::<B>(widen::<B>(x, whole), widen::<B>(w, whole), b);
    let y = if dropout.is_on() { B::dropout(y, dropout, None) } else { y };
    B::float_add(residual, y)
}

pub(super) fn gelu_dh<B: Backend>(dy: FloatTensor<B>, h: FloatTensor<B>, gelu: Gelu) -> FloatTensor<B> {
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
