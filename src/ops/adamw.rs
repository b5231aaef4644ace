//! AdamW's update of all parameters, and the sums of squares that the gradients' global norm is made of. Not differentiable.

use burn::backend::{
    Backend, Dispatch, Flex, TensorMetadata, backend_extension, get_device_settings, tensor::FloatTensor,
};
use burn::tensor::{Shape, Slice, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use super::Tensors;
use super::verdict::VERDICT;
use crate::cpu;
use crate::kernel::lanes::serves;
use crate::kernel::slots::{self, Slot, SlotKernel};
use crate::kernel::{Kernel, empty, own};

/// The numbers of AdamW that are the same in every step. Loshchilov and Hutter's decoupled decay, with PyTorch's order of operations.
/// Learning rate, decay and bias correction come with the verdict.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
}

impl AdamW {
    /// β1, 1 - β1, β2, 1 - β2 and ε: each made in f64, used in f32.
    pub fn factors(&self) -> [f32; 5] {
        [self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.eps].map(|factor| factor as f32)
    }
}

/// The optimizer's element-wise work.
#[backend_extension(Cube, Flex)]
pub trait AdamWOps: Backend {
    /// p, g, m, v, whether it decays, each of every parameter, and a verdict ([`crate::ops::verdict::VERDICT`]) -> new (p, m, v).
    fn adamw(
        #[extension_type] p: Tensors<Self>,
        #[extension_type] g: Tensors<Self>,
        #[extension_type] m: Tensors<Self>,
        #[extension_type] v: Tensors<Self>,
        verdict: FloatTensor<Self>,
        decays: Vec<bool>,
        hyper: AdamW,
    ) -> (Tensors<Self>, Tensors<Self>, Tensors<Self>) {
        let update = |p, g, m, v, decays| composed_update::<Self>(p, g, m, v, verdict.clone(), hyper, decays);
        one_by_one([p, g, m, v], decays, update)
    }

    /// At least one gradient -> sums (N) that add up to Σ g² over all of them.
    fn square_sums(#[extension_type] gradients: Tensors<Self>) -> FloatTensor<Self> {
        composed_square_sums::<Self>(gradients)
    }
}

impl AdamWOps for Flex {
    /// The same arithmetic in one pass over memory instead of seventeen, in place where nobody else holds the tensors.
    fn adamw(
        p: Tensors<Self>,
        g: Tensors<Self>,
        m: Tensors<Self>,
        v: Tensors<Self>,
        verdict: FloatTensor<Self>,
        decays: Vec<bool>,
        hyper: AdamW,
    ) -> (Tensors<Self>, Tensors<Self>, Tensors<Self>) {
        let tensors: Vec<_> = [&p, &g, &m, &v].into_iter().flat_map(|tensors| &tensors.0).collect();
        if !cpu::serves(&tensors) {
            let update = |p, g, m, v, decays| composed_update::<Self>(p, g, m, v, verdict.clone(), hyper, decays);
            return one_by_one([p, g, m, v], decays, update);
        }
        let verdict = cpu::contiguous(verdict);
        let words: [f32; VERDICT] = std::array::from_fn(|i| cpu::values(&verdict)[i]);
        let [_, applied, ..] = words;
        if applied == 0.0 {
            return (p, m, v);
        }
        one_by_one([p, g, m, v], decays, |p: FloatTensor<Self>, g, m, v, decays| {
            let g = cpu::contiguous(g);
            let [mut p, mut m, mut v] = [p, m, v].map(cpu::own);
            let (ps, ms, vs) = (p.storage_mut::<f32>(), m.storage_mut::<f32>(), v.storage_mut::<f32>());
            let update = cpu::elementwise::Update { p: ps, g: cpu::values(&g), m: ms, v: vs, decays };
            cpu::elementwise::adamw(update, words, hyper);
            (p, m, v)
        })
    }

    fn square_sums(gradients: Tensors<Self>) -> FloatTensor<Self> {
        let tensors: Vec<_> = gradients.0.iter().collect();
        if !cpu::serves(&tensors) {
            return composed_square_sums::<Self>(gradients);
        }
        let sum = |g: FloatTensor<Self>| cpu::elementwise::square_sum(cpu::values(&cpu::contiguous(g)));
        let sums: Vec<f32> = gradients.0.into_iter().map(sum).collect();
        let count = sums.len();
        cpu::tensor(sums, Shape::new([count]))
    }
}

/// The new (p, m, v) of every parameter of (p, g, m, v), updated one after the other.
fn one_by_one<B: Backend>(
    parameters: [Tensors<B>; 4],
    decays: Vec<bool>,
    update: impl Fn(
        FloatTensor<B>,
        FloatTensor<B>,
        FloatTensor<B>,
        FloatTensor<B>,
        bool,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>),
) -> (Tensors<B>, Tensors<B>, Tensors<B>) {
    let [p, g, m, v] = parameters.map(|tensors| tensors.0);
    let parameters = p.into_iter().zip(g).zip(m).zip(v).zip(decays);
    let updated = parameters.map(|((((p, g), m), v), decays)| update(p, g, m, v, decays));
    let (mut p, mut m, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (new_p, new_m, new_v) in updated {
        p.push(new_p);
        m.push(new_m);
        v.push(new_v);
    }
    (Tensors(p), Tensors(m), Tensors(v))
}

/// One parameter's update in Burn primitives.
fn composed_update<B: Backend>(
    p: FloatTensor<B>,
    g: FloatTensor<B>,
    m: FloatTensor<B>,
    v: FloatTensor<B>,
    verdict: FloatTensor<B>,
    hyper: AdamW,
    decays: bool,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let AdamW { beta1, beta2, eps, .. } = hyper;
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
    let decayed = if decays { B::float_mul(p.clone(), word(4)) } else { p.clone() };
    let new_p = B::float_sub(decayed, update);
    // Where nothing is applied g may be NaN: the old values are taken, not multiplied.
    let bools = get_device_settings::<B>(&p.device()).bool_dtype;
    let skipped = B::float_lower_elem(word(1), 0.5.into(), bools);
    let shape = p.shape();
    let choose = |new, old| B::float_mask_where(new, B::bool_expand(skipped.clone(), shape.clone()), old);
    (choose(new_p, p), choose(new_m, m), choose(new_v, v))
}

/// The whole of [`AdamWOps::square_sums`]'s default: one sum a gradient.
fn composed_square_sums<B: Backend>(gradients: Tensors<B>) -> FloatTensor<B> {
    let sums = gradients.0.into_iter().map(|g| B::float_sum(B::float_mul(g.clone(), g)));
    B::float_cat(sums.collect(), 0)
}

static SQUARE_SUMS: SlotKernel = SlotKernel::new(
    "square_sums",
    false,
    include_str!("../../wgsl/square_sums_slot.wgsl"),
    include_str!("../../wgsl/square_sums.wgsl"),
    4, // all in flight at once
);

static UPDATE: SlotKernel = SlotKernel::new(
    "adamw",
    false,
    include_str!("../../wgsl/adamw_slot.wgsl"),
    include_str!("../../wgsl/adamw.wgsl"),
    2,
);

/// The kernel of the partial sums of g².
pub fn square_sums_kernel() -> &'static SlotKernel {
    &SQUARE_SUMS
}

/// The kernel of the update.
pub fn update_kernel() -> &'static SlotKernel {
    &UPDATE
}

/// Every kernel of the optimizer but the verdict's.
pub fn kernels() -> Vec<Kernel> {
    [SQUARE_SUMS.kernels(), UPDATE.kernels()].concat()
}

/// Places of the partial sums of gradients of `counts` elements.
pub fn places(counts: impl IntoIterator<Item = usize>) -> usize {
    counts.into_iter().map(|count| SQUARE_SUMS.groups(count)).sum()
}

/// Queues the partial sums of g² of contiguous gradients, at most `most` a launch, into their [`places`] in `sums`.
///
/// For the tests, which give their own outputs; the optimizer calls [`square_sums`].
pub fn launch_square_sums(gradients: &[&CubeTensor], sums: &CubeTensor, most: usize) {
    let slots: Vec<_> = gradients.iter().map(|g| Slot { buffers: vec![*g], factor: 0.0 }).collect();
    SQUARE_SUMS.launch(&slots, &[sums], &[], most);
}

/// Queues the update of parameters (p, g, m, v), each with whether it decays, at most `most` a launch: p, m and v in place; all
/// contiguous.
pub fn launch_update(parameters: &[([&CubeTensor; 4], bool)], verdict: &CubeTensor, hyper: AdamW, most: usize) {
    let mut slots = Vec::with_capacity(parameters.len());
    for (tensors, decays) in parameters {
        slots.push(Slot { buffers: tensors.to_vec(), factor: f32::from(*decays) });
    }
    UPDATE.launch(&slots, &[verdict], &hyper.factors().map(f32::to_bits), most);
}

/// Whether our kernels serve all of `tensors`.
fn serve(tensors: &Tensors<CubeBackend>) -> bool {
    tensors.0.iter().all(|tensor| serves(tensor, Ok(())))
}

impl AdamWOps for CubeBackend {
    /// In place where nobody else holds the tensors.
    fn adamw(
        p: Tensors<Self>,
        g: Tensors<Self>,
        m: Tensors<Self>,
        v: Tensors<Self>,
        verdict: FloatTensor<Self>,
        decays: Vec<bool>,
        hyper: AdamW,
    ) -> (Tensors<Self>, Tensors<Self>, Tensors<Self>) {
        if !serve(&p) {
            let update = |p, g, m, v, decays| composed_update::<Self>(p, g, m, v, verdict.clone(), hyper, decays);
            return one_by_one([p, g, m, v], decays, update);
        }
        let [p, m, v] = [p, m, v].map(|tensors| tensors.0.into_iter().map(own).collect::<Vec<_>>());
        let g: Vec<_> = g.0.into_iter().map(into_contiguous).collect();
        let tensors = p.iter().zip(&g).zip(&m).zip(&v).map(|(((p, g), m), v)| [p, g, m, v]);
        let parameters: Vec<_> = tensors.zip(decays).collect();
        let verdict = into_contiguous(verdict);
        launch_update(&parameters, &verdict, hyper, slots::most(&verdict, 4, 1));
        (Tensors(p), Tensors(m), Tensors(v))
    }

    fn square_sums(gradients: Tensors<Self>) -> FloatTensor<Self> {
        if !serve(&gradients) {
            return composed_square_sums::<Self>(gradients);
        }
        let gradients: Vec<_> = gradients.0.into_iter().map(into_contiguous).collect();
        let gradients: Vec<_> = gradients.iter().collect();
        let counts = gradients.iter().map(|g| g.meta.shape().num_elements());
        let sums = empty(gradients[0], Shape::new([places(counts)]));
        launch_square_sums(&gradients, &sums, slots::most(&sums, 1, 1));
        sums
    }
}

/// One parameter for the update, flattened.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its value.
    pub p: Tensor<1>,
    /// Its gradient.
    pub g: Tensor<1>,
    /// First moment.
    pub m: Tensor<1>,
    /// Second moment.
    pub v: Tensor<1>,
    /// Whether it decays.
    pub decays: bool,
}

/// New [p, m, v] of every parameter, by a verdict ([`crate::ops::verdict::VERDICT`]).
pub fn adamw(parameters: Vec<Parameter>, verdict: Tensor<1>, hyper: AdamW) -> Vec<[Tensor<1>; 3]> {
    let (mut p, mut g, mut m, mut v, mut decays) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for parameter in parameters {
        p.push(parameter.p);
        g.push(parameter.g);
        m.push(parameter.m);
        v.push(parameter.v);
        decays.push(parameter.decays);
    }
    let [p, g, m, v] = [p, g, m, v].map(Tensors::of);
    let (p, m, v) = <Dispatch as AdamWOps>::adamw(p, g, m, v, verdict.into_dispatch(), decays, hyper);
    let updated = p.into_tensors().zip(m.into_tensors()).zip(v.into_tensors());
    updated.map(|((p, m), v)| [p, m, v]).collect()
}

/// Partial sums of squares, on the device, that add up to Σ g² over all gradients. None where there is no gradient.
pub fn square_sums<'a>(gradients: impl Iterator<Item = &'a Tensor<1>>) -> Option<Tensor<1>> {
    let gradients = Tensors::of(gradients.cloned());
    (!gradients.0.is_empty()).then(|| Tensor::from_dispatch(<Dispatch as AdamWOps>::square_sums(gradients)))
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
