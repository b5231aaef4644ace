//! AdamW's update of one parameter, and the square sum that the global norm is made of. Not differentiable.

use burn::backend::{Backend, Dispatch, Flex, TensorMetadata, backend_extension, tensor::FloatTensor};
use burn::tensor::{Shape, Tensor};
use burn_cubecl::CubeBackend;

/// The numbers of one AdamW step. Loshchilov and Hutter's decoupled decay, with PyTorch's order of operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Counted from 1: the bias correction.
    pub step: u64,
}

/// The optimizer's element-wise work.
#[backend_extension(Cube, Flex)]
pub trait AdamWOps: Backend {
    /// p, g, m, v of one shape; scale (1) multiplies the gradient first (the global-norm clip). Returns new (p, m, v).
    fn adamw(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        hyper: AdamW,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let AdamW { lr, beta1, beta2, eps, weight_decay, step } = hyper;
        let ones = Shape::from(vec![1; p.shape().num_dims()]);
        let g = Self::float_mul(g, Self::float_reshape(scale, ones));
        // m = β1 m + (1 - β1) g, v = β2 v + (1 - β2) g²
        let m = Self::float_add(
            Self::float_mul_scalar(m, beta1.into()),
            Self::float_mul_scalar(g.clone(), (1.0 - beta1).into()),
        );
        let v = Self::float_add(
            Self::float_mul_scalar(v, beta2.into()),
            Self::float_mul_scalar(Self::float_mul(g.clone(), g), (1.0 - beta2).into()),
        );
        // p = p (1 - lr λ) - lr / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
        let correction1 = 1.0 - beta1.powi(step as i32);
        let correction2 = (1.0 - beta2.powi(step as i32)).sqrt();
        let root = Self::float_mul_scalar(Self::float_sqrt(v.clone()), (1.0 / correction2).into());
        let denominator = Self::float_add_scalar(root, eps.into());
        let update = Self::float_mul_scalar(Self::float_div(m.clone(), denominator), (lr / correction1).into());
        let p = if weight_decay == 0.0 { p } else { Self::float_mul_scalar(p, (1.0 - lr * weight_decay).into()) };
        (Self::float_sub(p, update), m, v)
    }

    /// Σ g², (1).
    fn square_sum(g: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_sum(Self::float_mul(g.clone(), g))
    }
}

impl AdamWOps for Flex {}

impl AdamWOps for CubeBackend {}

/// New (p, m, v) of one parameter of any shape; `scale` (1) multiplies the gradient first.
pub fn adamw<const D: usize>(
    p: Tensor<D>,
    g: Tensor<D>,
    m: Tensor<D>,
    v: Tensor<D>,
    scale: Tensor<1>,
    hyper: AdamW,
) -> (Tensor<D>, Tensor<D>, Tensor<D>) {
    let (p, m, v) = <Dispatch as AdamWOps>::adamw(
        p.into_dispatch(),
        g.into_dispatch(),
        m.into_dispatch(),
        v.into_dispatch(),
        scale.into_dispatch(),
        hyper,
    );
    (Tensor::from_dispatch(p), Tensor::from_dispatch(m), Tensor::from_dispatch(v))
}

/// Σ g² over all elements, (1).
pub fn square_sum<const D: usize>(g: Tensor<D>) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as AdamWOps>::square_sum(g.into_dispatch()))
}
