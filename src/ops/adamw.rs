//! AdamW's update of one parameter, and the global norm of all gradients with the clip made from it. Not differentiable.

use burn::backend::{Backend, Dispatch, Flex, TensorMetadata, backend_extension, tensor::FloatTensor};
use burn::tensor::{Shape, Slice, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use crate::kernel::lanes::{Lanes, serves};
use crate::kernel::{Kernel, empty, fold};

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

impl AdamW {
    /// β1, 1 - β1, β2, 1 - β2, the decay's 1 - lr λ, lr / (1 - β1^t), 1 / √(1 - β2^t) and ε: each made in f64, used in f32.
    pub fn factors(&self) -> [f32; 8] {
        let correction1 = 1.0 - self.beta1.powi(self.step as i32);
        let correction2 = 1.0 - self.beta2.powi(self.step as i32);
        [
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            1.0 - self.lr * self.weight_decay,
            self.lr / correction1,
            1.0 / correction2.sqrt(),
            self.eps,
        ]
        .map(|factor| factor as f32)
    }
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
        composed_update::<Self>(p, g, m, v, scale, hyper)
    }

    /// `sums` (N) with partial sums of g² in the elements from `first` on, at most one for every 8192 of g; what they add up to is Σ g². The
    /// elements must be 0 before.
    fn square_sums(g: FloatTensor<Self>, sums: FloatTensor<Self>, first: usize) -> FloatTensor<Self> {
        composed_square_sums::<Self>(g, sums, first)
    }

    /// sums (N) -> (norm (1), scale (1)): norm = √(Σ sums), and what it makes of the gradients, min(1, limit / (norm + 1e-6)),
    /// or 1 where `limit` is 0.
    fn norm_and_scale(sums: FloatTensor<Self>, limit: f64) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_norm_and_scale::<Self>(sums, limit)
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
        let [beta1, rest1, beta2, rest2, keep, rate, root2, eps] = hyper.factors();
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

/// The whole of [`AdamWOps::adamw`]'s default, for the GPU path to fall back on.
fn composed_update<B: Backend>(
    p: FloatTensor<B>,
    g: FloatTensor<B>,
    m: FloatTensor<B>,
    v: FloatTensor<B>,
    scale: FloatTensor<B>,
    hyper: AdamW,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step } = hyper;
    let ones = Shape::from(vec![1; p.shape().num_dims()]);
    let g = B::float_mul(g, B::float_reshape(scale, ones));
    // m = β1 m + (1 - β1) g, v = β2 v + (1 - β2) g²
    let m = B::float_add(B::float_mul_scalar(m, beta1.into()), B::float_mul_scalar(g.clone(), (1.0 - beta1).into()));
    let v = B::float_add(
        B::float_mul_scalar(v, beta2.into()),
        B::float_mul_scalar(B::float_mul(g.clone(), g), (1.0 - beta2).into()),
    );
    // p = p (1 - lr λ) - lr / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
    let correction1 = 1.0 - beta1.powi(step as i32);
    let correction2 = (1.0 - beta2.powi(step as i32)).sqrt();
    let root = B::float_mul_scalar(B::float_sqrt(v.clone()), (1.0 / correction2).into());
    let denominator = B::float_add_scalar(root, eps.into());
    let update = B::float_mul_scalar(B::float_div(m.clone(), denominator), (lr / correction1).into());
    let p = if weight_decay == 0.0 { p } else { B::float_mul_scalar(p, (1.0 - lr * weight_decay).into()) };
    (B::float_sub(p, update), m, v)
}

/// The whole of [`AdamWOps::square_sums`]'s default: one sum, the other places stay 0.
fn composed_square_sums<B: Backend>(g: FloatTensor<B>, sums: FloatTensor<B>, first: usize) -> FloatTensor<B> {
    let sum = B::float_sum(B::float_mul(g.clone(), g));
    B::float_slice_assign(sums, &[Slice::from(first..first + 1)], sum)
}

/// The whole of [`AdamWOps::norm_and_scale`]'s default.
fn composed_norm_and_scale<B: Backend>(sums: FloatTensor<B>, limit: f64) -> (FloatTensor<B>, FloatTensor<B>) {
    let norm = B::float_sqrt(B::float_sum(sums));
    let scale = if limit > 0.0 {
        let room = B::float_recip(B::float_add_scalar(norm.clone(), 1e-6.into()));
        B::float_clamp_max(B::float_mul_scalar(room, limit.into()), 1.0.into())
    } else {
        B::float_ones(norm.shape(), &norm.device(), norm.dtype().into())
    };
    (norm, scale)
}

/// Elements that a workgroup of the square sums adds up, and the most workgroups of one gradient.
const GROUP_ELEMENTS: usize = 8192;
const MOST_GROUPS: usize = 1024;

/// How many partial sums a gradient of `count` elements has.
fn places(count: usize) -> usize {
    count.div_ceil(GROUP_ELEMENTS).clamp(1, MOST_GROUPS)
}

/// The kernel of the partial sums of g².
pub fn square_sums_kernel(lanes: Lanes) -> Kernel {
    lanes.kernel("square_sums", false, "", &[include_str!("../../wgsl/square_sums.wgsl")], 256)
}

/// The kernel of the norm and the clip.
pub fn norm_kernel() -> Kernel {
    Kernel::new("gradient_norm", String::new(), vec![include_str!("../../wgsl/gradient_norm.wgsl")], (256, 1, 1))
}

/// The kernel of the update.
pub fn update_kernel(lanes: Lanes) -> Kernel {
    lanes.kernel("adamw", false, "", &[include_str!("../../wgsl/adamw.wgsl")], 256)
}

/// Every kernel of the optimizer.
pub fn kernels() -> Vec<Kernel> {
    let by_lanes = [1, 4].map(Lanes::of).map(|lanes| [square_sums_kernel(lanes), update_kernel(lanes)]);
    by_lanes.into_iter().flatten().chain([norm_kernel()]).collect()
}

/// Queues the partial sums of g² into `places(elements)` elements of `sums` from `first` on; both contiguous.
///
/// For the tests, which give their own outputs; the optimizer calls [`global_norm`].
pub fn launch_square_sums(g: &CubeTensor, sums: &CubeTensor, first: usize) {
    let count = g.meta.shape().num_elements();
    let lanes = Lanes::of(count);
    let groups = places(count) as u32;
    square_sums_kernel(lanes).launch((groups, 1, 1), &[g, sums], &[lanes.count as u32, first as u32]);
}

/// Queues sums (N) -> norm (1), scale (1).
pub fn launch_norm(sums: &CubeTensor, limit: f64, norm: &CubeTensor, scale: &CubeTensor) {
    let count = sums.meta.shape().num_elements() as u32;
    norm_kernel().launch((1, 1, 1), &[sums, norm, scale], &[count, (limit as f32).to_bits()]);
}

/// Queues the update of p, m and v in place; all contiguous.
pub fn launch_update(p: &CubeTensor, g: &CubeTensor, m: &CubeTensor, v: &CubeTensor, scale: &CubeTensor, hyper: AdamW) {
    let lanes = Lanes::of(p.meta.shape().num_elements());
    let mut params = vec![lanes.count as u32];
    params.extend(hyper.factors().map(f32::to_bits));
    let groups = lanes.count.div_ceil(256) as u32;
    update_kernel(lanes).launch(fold(groups), &[p, g, m, v, scale], &params);
}

/// A contiguous tensor of this content that nobody else sees: itself where that is so already.
fn own(tensor: CubeTensor) -> CubeTensor {
    let tensor = into_contiguous(tensor);
    if tensor.can_mut() { tensor } else { tensor.copy() }
}

impl AdamWOps for CubeBackend {
    /// One launch, in place where nobody else holds the tensors.
    fn adamw(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        hyper: AdamW,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !serves(&p, Ok(())) {
            return composed_update::<Self>(p, g, m, v, scale, hyper);
        }
        let (g, scale) = (into_contiguous(g), into_contiguous(scale));
        let (p, m, v) = (own(p), own(m), own(v));
        launch_update(&p, &g, &m, &v, &scale, hyper);
        (p, m, v)
    }

    fn square_sums(g: FloatTensor<Self>, sums: FloatTensor<Self>, first: usize) -> FloatTensor<Self> {
        if !serves(&g, Ok(())) {
            return composed_square_sums::<Self>(g, sums, first);
        }
        let (g, sums) = (into_contiguous(g), own(sums));
        launch_square_sums(&g, &sums, first);
        sums
    }

    fn norm_and_scale(sums: FloatTensor<Self>, limit: f64) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !serves(&sums, Ok(())) {
            return composed_norm_and_scale::<Self>(sums, limit);
        }
        let sums = into_contiguous(sums);
        let [norm, scale] = [(); 2].map(|()| empty(&sums, Shape::new([1])));
        launch_norm(&sums, limit, &norm, &scale);
        (norm, scale)
    }
}

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

/// (norm, scale), each (1) on the device: √(Σ g²) over all gradients, and min(1, limit / (norm + 1e-6)), or 1 where `limit`
/// is 0. None where there is no gradient.
pub fn global_norm<'a>(
    gradients: impl Iterator<Item = &'a Tensor<1>> + Clone,
    limit: f64,
) -> Option<(Tensor<1>, Tensor<1>)> {
    let device = gradients.clone().next()?.device();
    let total: usize = gradients.clone().map(|g| places(g.dims()[0])).sum();
    let mut sums = Tensor::<1>::zeros([total], &device).into_dispatch();
    let mut first = 0;
    for gradient in gradients {
        sums = <Dispatch as AdamWOps>::square_sums(gradient.clone().into_dispatch(), sums, first);
        first += places(gradient.dims()[0]);
    }
    let (norm, scale) = <Dispatch as AdamWOps>::norm_and_scale(sums, limit);
    Some((Tensor::from_dispatch(norm), Tensor::from_dispatch(scale)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_valid_and_fits() {
        for kernel in kernels() {
            let bytes = kernel.workgroup_memory().unwrap_or_else(|error| panic!("{error}"));
            assert!(bytes <= 32 << 10, "{bytes} bytes of workgroup memory");
        }
    }
}
