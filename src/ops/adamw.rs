//! AdamW's update of one parameter, and the sums of squares that the gradients' global norm is made of. Not differentiable.

use burn::backend::{
    Backend, Dispatch, Flex, TensorMetadata, backend_extension, get_device_settings, tensor::FloatTensor,
};
use burn::tensor::{Shape, Slice, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use crate::kernel::lanes::{Lanes, serves};
use crate::kernel::{Kernel, fold, own};

/// The numbers of one AdamW step. Loshchilov and Hutter's decoupled decay, with PyTorch's order of operations. The bias
/// correction, which counts the updates made, comes with the verdict.
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
}

impl AdamW {
    /// β1, 1 - β1, β2, 1 - β2, the decay's 1 - lr λ, and ε: each made in f64, used in f32.
    pub fn factors(&self) -> [f32; 6] {
        let keep = 1.0 - self.lr * self.weight_decay;
        [self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, keep, self.eps].map(|factor| factor as f32)
    }
}

/// The optimizer's element-wise work.
#[backend_extension(Cube, Flex)]
pub trait AdamWOps: Backend {
    /// p, g, m, v of one shape and a verdict ([`crate::ops::verdict::VERDICT`]) -> new (p, m, v).
    fn adamw(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        verdict: FloatTensor<Self>,
        hyper: AdamW,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed_update::<Self>(p, g, m, v, verdict, hyper)
    }

    /// `sums` (N) with partial sums of g² in the elements from `first` on, at most one for every 8192 of g; what they add up to is Σ g². The
    /// elements must be 0 before.
    fn square_sums(g: FloatTensor<Self>, sums: FloatTensor<Self>, first: usize) -> FloatTensor<Self> {
        composed_square_sums::<Self>(g, sums, first)
    }
}

impl AdamWOps for Flex {
    /// The same arithmetic in one pass over memory instead of seventeen, in place where nobody else holds the tensors.
    fn adamw(
        mut p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        mut m: FloatTensor<Self>,
        mut v: FloatTensor<Self>,
        verdict: FloatTensor<Self>,
        hyper: AdamW,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (g, verdict) = (g.to_contiguous(), verdict.to_contiguous());
        let first = verdict.layout().start_offset();
        let [factor, applied, rate, root_factor] = std::array::from_fn(|i| verdict.storage::<f32>()[first + i]);
        if applied == 0.0 {
            return (p, m, v);
        }
        for tensor in [&mut p, &mut m, &mut v] {
            if !tensor.is_contiguous() || tensor.layout().start_offset() != 0 {
                *tensor = tensor.to_contiguous();
            }
        }
        let [beta1, rest1, beta2, rest2, keep, eps] = hyper.factors();
        let offset = g.layout().start_offset();
        let count = g.layout().num_elements();
        let gradients = &g.storage::<f32>()[offset..offset + count];
        let (ps, ms, vs) = (p.storage_mut::<f32>(), m.storage_mut::<f32>(), v.storage_mut::<f32>());
        for (((p, m), v), g) in ps.iter_mut().zip(ms).zip(vs).zip(gradients) {
            let g = g * factor;
            *m = *m * beta1 + g * rest1;
            *v = *v * beta2 + g * g * rest2;
            *p = *p * keep - rate * *m / (v.sqrt() * root_factor + eps);
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
    verdict: FloatTensor<B>,
    hyper: AdamW,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let AdamW { lr, beta1, beta2, eps, weight_decay } = hyper;
    let ones = Shape::from(vec![1; p.shape().num_dims()]);
    let word = |i: usize| {
        let word = B::float_slice(verdict.clone(), &[Slice::from(i..i + 1)]);
        B::float_reshape(word, ones.clone())
    };
    let g = B::float_mul(g, word(0));
    // m = β1 m + (1 - β1) g, v = β2 v + (1 - β2) g²
    let new_m = B::float_add(
        B::float_mul_scalar(m.clone(), beta1.into()),
        B::float_mul_scalar(g.clone(), (1.0 - beta1).into()),
    );
    let new_v = B::float_add(
        B::float_mul_scalar(v.clone(), beta2.into()),
        B::float_mul_scalar(B::float_mul(g.clone(), g), (1.0 - beta2).into()),
    );
    // p = p (1 - lr λ) - lr / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
    let root = B::float_mul(B::float_sqrt(new_v.clone()), word(3));
    let denominator = B::float_add_scalar(root, eps.into());
    let update = B::float_mul(B::float_div(new_m.clone(), denominator), word(2));
    let decayed = B::float_mul_scalar(p.clone(), (1.0 - lr * weight_decay).into());
    let new_p = B::float_sub(decayed, update);
    // Where nothing is applied g may be NaN: the old values are taken, not multiplied.
    let bools = get_device_settings::<B>(&p.device()).bool_dtype;
    let skipped = B::float_lower_elem(word(1), 0.5.into(), bools);
    let shape = p.shape();
    let choose = |new, old| B::float_mask_where(new, B::bool_expand(skipped.clone(), shape.clone()), old);
    (choose(new_p, p), choose(new_m, m), choose(new_v, v))
}

/// The whole of [`AdamWOps::square_sums`]'s default: one sum, the other places stay 0.
fn composed_square_sums<B: Backend>(g: FloatTensor<B>, sums: FloatTensor<B>, first: usize) -> FloatTensor<B> {
    let sum = B::float_sum(B::float_mul(g.clone(), g));
    B::float_slice_assign(sums, &[Slice::from(first..first + 1)], sum)
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

/// The kernel of the update.
pub fn update_kernel(lanes: Lanes) -> Kernel {
    lanes.kernel("adamw", false, "", &[include_str!("../../wgsl/adamw.wgsl")], 256)
}

/// Every kernel of the optimizer but the verdict's.
pub fn kernels() -> Vec<Kernel> {
    let by_lanes = [1, 4].map(Lanes::of).map(|lanes| [square_sums_kernel(lanes), update_kernel(lanes)]);
    by_lanes.into_iter().flatten().collect()
}

/// Queues the partial sums of g² into `places(elements)` elements of `sums` from `first` on; both contiguous.
///
/// For the tests, which give their own outputs; the optimizer calls [`square_sums`].
pub fn launch_square_sums(g: &CubeTensor, sums: &CubeTensor, first: usize) {
    let count = g.meta.shape().num_elements();
    let lanes = Lanes::of(count);
    let groups = places(count) as u32;
    square_sums_kernel(lanes).launch((groups, 1, 1), &[g, sums], &[lanes.count as u32, first as u32]);
}

/// Queues the update of p, m and v in place; all contiguous.
pub fn launch_update(
    p: &CubeTensor,
    g: &CubeTensor,
    m: &CubeTensor,
    v: &CubeTensor,
    verdict: &CubeTensor,
    hyper: AdamW,
) {
    let lanes = Lanes::of(p.meta.shape().num_elements());
    let mut params = vec![lanes.count as u32];
    params.extend(hyper.factors().map(f32::to_bits));
    let groups = lanes.count.div_ceil(256) as u32;
    update_kernel(lanes).launch(fold(groups), &[p, g, m, v, verdict], &params);
}

impl AdamWOps for CubeBackend {
    /// One launch, in place where nobody else holds the tensors.
    fn adamw(
        p: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        verdict: FloatTensor<Self>,
        hyper: AdamW,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !serves(&p, Ok(())) {
            return composed_update::<Self>(p, g, m, v, verdict, hyper);
        }
        let (g, verdict) = (into_contiguous(g), into_contiguous(verdict));
        let (p, m, v) = (own(p), own(m), own(v));
        launch_update(&p, &g, &m, &v, &verdict, hyper);
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
}

/// New (p, m, v) of one parameter of any shape, by a verdict ([`crate::ops::verdict::VERDICT`]).
pub fn adamw<const D: usize>(
    p: Tensor<D>,
    g: Tensor<D>,
    m: Tensor<D>,
    v: Tensor<D>,
    verdict: Tensor<1>,
    hyper: AdamW,
) -> (Tensor<D>, Tensor<D>, Tensor<D>) {
    let (p, m, v) = <Dispatch as AdamWOps>::adamw(
        p.into_dispatch(),
        g.into_dispatch(),
        m.into_dispatch(),
        v.into_dispatch(),
        verdict.into_dispatch(),
        hyper,
    );
    (Tensor::from_dispatch(p), Tensor::from_dispatch(m), Tensor::from_dispatch(v))
}

/// Partial sums of squares, on the device, that add up to Σ g² over all gradients. None where there is no gradient.
pub fn square_sums<'a>(gradients: impl Iterator<Item = &'a Tensor<1>> + Clone) -> Option<Tensor<1>> {
    let device = gradients.clone().next()?.device();
    let total: usize = gradients.clone().map(|g| places(g.dims()[0])).sum();
    let mut sums = Tensor::<1>::zeros([total], &device).into_dispatch();
    let mut first = 0;
    for gradient in gradients {
        sums = <Dispatch as AdamWOps>::square_sums(gradient.clone().into_dispatch(), sums, first);
        first += places(gradient.dims()[0]);
    }
    Some(Tensor::from_dispatch(sums))
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
