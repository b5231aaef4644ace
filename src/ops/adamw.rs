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

impl AdamWOps for Flex {
    /// The same arithmetic in one pass over memory instead of fourteen, in place where nobody else holds the tensors.
    fn adamw(
        mut p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        mut m: FloatTensor<Self>,
        mut v: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        hyper: AdamW,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (g, scale) = (g.to_contiguous(), scale.to_contiguous());
        for tensor in [&mut p, &mut m, &mut v] {
            if !tensor.is_contiguous() || tensor.layout().start_offset() != 0 {
                *tensor = tensor.to_contiguous();
            }
        }
        let [beta1, beta2, eps] = [hyper.beta1, hyper.beta2, hyper.eps].map(|x| x as f32);
        let [rest1, rest2] = [1.0 - hyper.beta1, 1.0 - hyper.beta2].map(|x| x as f32);
        let correction1 = 1.0 - hyper.beta1.powi(hyper.step as i32);
        let root2 = (1.0 / (1.0 - hyper.beta2.powi(hyper.step as i32)).sqrt()) as f32;
        let rate = (hyper.lr / correction1) as f32;
        let keep = (1.0 - hyper.lr * hyper.weight_decay) as f32;
        let scale = scale.storage::<f32>()[scale.layout().start_offset()];
        let offset = g.layout().start_offset();
        let count = g.layout().num_elements();
        let gradients = &g.storage::<f32>()[offset..offset + count];
        let (ps, ms, vs) = (p.storage_mut::<f32>(), m.storage_mut::<f32>(), v.storage_mut::<f32>());
        for (((p, m), v), g) in ps.iter_mut().zip(ms).zip(vs).zip(gradients) {
            let g = g * scale;
            *m = *m * beta1 + g * rest1;
            *v = *v * beta2 + g * g * rest2;
            *p = *p * keep - rate * *m / (v.sqrt() * root2 + eps);
        }
        (p, m, v)
    }
}

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
