//! Dropout with a counter-based generator: the mask is a pure function of (seed, step, site, row, column), so the backward
//! regenerates it, every device draws the same bits, and a resumed run is the same run.

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::{DType, Tensor, TensorData};
use burn_cubecl::{CubeBackend, kernel::into_contiguous};

use super::hold;
use crate::cpu;
use crate::kernel::lanes::Lanes;
use crate::kernel::{Kernel, PHILOX, clock, empty_of, fold, matrix};
use crate::rng::{philox4x32_7, philox4x32_7_lanes};

/// One place in the model, at one step, that drops elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The chance that an element is zeroed, in [0, 1); the others are multiplied by 1 / (1 - probability).
    pub probability: f32,
    /// The run's seed: the generator's key.
    pub seed: u64,
    /// The micro-step, counted from the start of the run.
    pub step: u32,
    /// Which of the model's dropouts this is.
    pub site: u32,
}

impl Dropout {
    /// No dropout: evaluation, sampling, or a probability of 0.
    pub const OFF: Self = Self { probability: 0.0, seed: 0, step: 0, site: 0 };

    /// The same step's dropout at another place.
    pub fn at(self, site: u32) -> Self {
        Self { site, ..self }
    }

    /// Whether anything is dropped.
    pub fn is_on(&self) -> bool {
        self.probability > 0.0
    }

    /// An element is kept where its random word is at least this.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 4_294_967_296.0).round() as u32
    }

    /// What kept elements are multiplied by.
    pub fn keep_scale(&self) -> f32 {
        1.0 / (1.0 - self.probability)
    }

    /// The factors (0 or `keep_scale`) of a (rows, columns) matrix, row-major: the definition of the mask.
    ///
    /// One Philox block serves four neighbouring columns: counter (column / 4, row, step, site), key = seed.
    pub fn factors(&self, rows: usize, columns: usize) -> Vec<f32> {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let (threshold, scale) = (self.threshold(), self.keep_scale());
        let mut factors = Vec::with_capacity(rows * columns);
        for row in 0..rows as u32 {
            for first in (0..columns as u32).step_by(4) {
                let words = philox4x32_7([first / 4, row, self.step, self.site], key);
                let width = (columns as u32 - first).min(4) as usize;
                factors.extend(words[..width].iter().map(|&word| if word >= threshold { scale } else { 0.0 }));
            }
        }
        factors
    }

    /// Multiplies the first elements of row `row` of a matrix by their factors.
    #[inline(always)]
    pub fn multiply_row(&self, row: u32, values: &mut [f32]) {
        /// Philox blocks at a time: their words fill the widest vectors.
        const BLOCKS: usize = 16;
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let (threshold, scale) = (self.threshold(), self.keep_scale());
        for (group, values) in values.chunks_mut(4 * BLOCKS).enumerate() {
            let columns = std::array::from_fn(|i| (group * BLOCKS + i) as u32);
            let counters = [columns, [row; BLOCKS], [self.step; BLOCKS], [self.site; BLOCKS]];
            let words = philox4x32_7_lanes(counters, key);
            let mut factors = [0.0; 4 * BLOCKS];
            for i in 0..BLOCKS {
                for (j, words) in words.iter().enumerate() {
                    factors[4 * i + j] = if words[i] >= threshold { scale } else { 0.0 };
                }
            }
            for (value, factor) in values.iter_mut().zip(factors) {
                *value *= factor;
            }
        }
    }

    /// The words of a kernel's parameters: seed, the step's distance from the clock, site, threshold, scale.
    pub fn params(&self) -> [u32; 6] {
        let distance = if self.is_on() { clock::distance(self.step) } else { 0 };
        [self.seed as u32, (self.seed >> 32) as u32, distance, self.site, self.threshold(), self.keep_scale().to_bits()]
    }
}

/// Dropout of any tensor, seen as a matrix (all leading dimensions, last dimension).
#[backend_extension(Cube, Flex, Autodiff)]
pub trait DropoutOps: Backend {
    /// x (..., K) times the mask's factors. Of x's type, or a gradient that is stored `held` times itself in f16.
    fn dropout(x: FloatTensor<Self>, dropout: Dropout, held: Option<f32>) -> FloatTensor<Self> {
        composed::<Self>(x, dropout, held)
    }
}

/// The whole of [`DropoutOps::dropout`]'s default, for the CPU's path to fall back on.
fn composed<B: Backend>(x: FloatTensor<B>, dropout: Dropout, held: Option<f32>) -> FloatTensor<B> {
    let shape = x.shape();
    let columns = shape[shape.num_dims() - 1];
    let factors = dropout.factors(shape.num_elements() / columns.max(1), columns);
    let mask = B::float_from_data(TensorData::new(factors, shape).convert_dtype(x.dtype()), &x.device());
    hold::<B>(B::float_mul(x, mask), held)
}

impl DropoutOps for Flex {
    fn dropout(x: FloatTensor<Self>, dropout: Dropout, held: Option<f32>) -> FloatTensor<Self> {
        if held.is_some() || !cpu::serves(&[&x]) {
            return composed::<Self>(x, dropout, held);
        }
        let [_, columns] = cpu::matrix(&x);
        let mut x = cpu::own(x);
        cpu::elementwise::mask(x.storage_mut::<f32>(), columns, dropout);
        x
    }
}

/// The kernel for rows of `columns` elements, given and made in f16 (or f32): one lane a thread, 256 threads a workgroup. Nothing is
/// dropped without `drops`.
pub fn kernel(columns: usize, f16: [bool; 2], drops: bool) -> Kernel {
    let constants = format!("const DROPOUT: bool = {drops};\n");
    Lanes::of(columns).kernel("dropout", f16, &constants, &[PHILOX, include_str!("../../wgsl/dropout.wgsl")], 256)
}

/// Every kernel of dropout.
pub fn kernels() -> Vec<Kernel> {
    let cases = [([false; 2], true), ([true; 2], true), ([false, true], true), ([false, true], false)];
    [1, 4].into_iter().flat_map(|columns| cases.map(|(f16, drops)| kernel(columns, f16, drops))).collect()
}

impl DropoutOps for CubeBackend {
    fn dropout(x: FloatTensor<Self>, dropout: Dropout, held: Option<f32>) -> FloatTensor<Self> {
        let x = into_contiguous(x);
        let y = empty_of(&x, x.meta.shape().clone(), if held.is_some() { DType::F16 } else { x.dtype });
        let (rows, columns) = matrix(&x);
        let lanes = Lanes::of(columns);
        let groups = (rows * lanes.count).div_ceil(256) as u32;
        let mut params = vec![rows as u32, lanes.count as u32];
        params.extend(dropout.params());
        params.push(held.unwrap_or(1.0).to_bits());
        let f16 = [&x, &y].map(|tensor| tensor.dtype == DType::F16);
        kernel(columns, f16, dropout.is_on()).launch(fold(groups), &[&x, &y], &params);
        y
    }
}

#[derive(Debug)]
struct DropoutBackward;

impl<B: DropoutOps> Backward<B, 1> for DropoutBackward {
    type State = Dropout;

    fn backward(self, ops: Ops<Dropout, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(x) = x {
            grads.register::<B>(x.id, B::dropout(dy, ops.state, None)); // y = x * mask  =>  dx = dy * mask
        }
    }
}

impl<B: DropoutOps, C: CheckpointStrategy> DropoutOps for Autodiff<B, C> {
    fn dropout(x: FloatTensor<Self>, dropout: Dropout, held: Option<f32>) -> FloatTensor<Self> {
        let prepared = DropoutBackward.prepare::<C>([x.node()]).compute_bound().stateful();
        let y = B::dropout(<Self as AutodiffBackend>::inner(x), dropout, held);
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(dropout, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}

/// x (..., K) with elements dropped; `x` itself where `dropout` is off.
pub fn dropout<const D: usize>(x: Tensor<D>, dropout: Dropout) -> Tensor<D> {
    if !dropout.is_on() {
        return x;
    }
    Tensor::from_dispatch(<Dispatch as DropoutOps>::dropout(x.into_dispatch(), dropout, None))
}
