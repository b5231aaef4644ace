//! The tied head and the loss in one operation: the logits exist one chunk of rows at a time.
//!
//! When gradients are wanted they are made on the way (the loss is the end of the graph, its gradient is known up to a
//! factor): three matrix products instead of four, and no second pass over the vocabulary.

mod composed;

use std::ops::Range;

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, Int, Shape, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use super::linear::elem;
use super::linear::{product::Product, tiles::Layout};
use super::{Optional, Tensors, cast::CastOps, held};
use crate::cpu::{self, cross_entropy::Given};
use crate::kernel::{self, Kernel, Variant, fold};

/// A target that does not count, as in PyTorch's and nanoGPT's `ignore_index=-1`.
pub const IGNORED: i32 = -1;

/// Logits in one chunk at most: 64 MiB in f32, far below every device's binding limit and large enough to fill it.
const CHUNK_ELEMENTS: usize = 16 << 20;

/// `loss = mean over the targets that count of (logsumexp(x wᵀ) - (x wᵀ)[target])`
#[backend_extension(Cube, Flex, Autodiff)]
pub trait CrossEntropyOps: Backend {
    /// x (..., C), w (V, C), targets (rows) in 0..V or [`IGNORED`], scale (at least 1 element) -> loss (1) f32.
    ///
    /// The gradients, not the loss, are multiplied by scale's first element.
    fn cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        #[extension_type] _scale: Optional<Self>,
    ) -> FloatTensor<Self> {
        composed::loss::<Self>(x, w, targets)
    }

    /// As [`CrossEntropyOps::cross_entropy`], and its gradients for a unit cotangent: (loss (1), dx (..., C), dw (V, C) f32).
    fn cross_entropy_gradients(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        #[extension_type] scale: Optional<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::gradients::<Self>(x, w, targets, scale)
    }
}

/// The targets on the host, where the CPU's loops serve the loss.
fn cpu_targets(x: &FloatTensor<Flex>, w: &FloatTensor<Flex>, targets: &IntTensor<Flex>) -> Option<Vec<i64>> {
    if !cpu::serves(&[x, w]) {
        return None;
    }
    targets.clone().into_data().convert_dtype(DType::I64).try_into_vec().ok()
}

/// What the CPU's loops are given: tensors that are contiguous.
fn given<'a>(x: &'a FloatTensor<Flex>, w: &'a FloatTensor<Flex>, targets: &'a [i64]) -> Given<'a> {
    let [_, channels] = cpu::matrix(w);
    Given { x: cpu::values(x), w: cpu::values(w), targets, channels }
}

impl CrossEntropyOps for Flex {
    fn cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        _scale: Optional<Self>,
    ) -> FloatTensor<Self> {
        let Some(ids) = cpu_targets(&x, &w, &targets) else {
            return composed::loss::<Self>(x, w, targets);
        };
        let (x, w) = (cpu::contiguous(x), cpu::contiguous(w));
        let loss = cpu::cross_entropy::loss(given(&x, &w, &ids));
        cpu::tensor(vec![loss], Shape::new([1]))
    }

    fn cross_entropy_gradients(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        scale: Optional<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let Some(ids) = cpu_targets(&x, &w, &targets) else {
            return composed::gradients::<Self>(x, w, targets, scale);
        };
        let (x, w) = (cpu::contiguous(x), cpu::contiguous(w));
        let scale = scale.map(|scale| cpu::values(&cpu::contiguous(scale))[0]).unwrap_or(1.0);
        let (loss, [dx, dw]) = cpu::cross_entropy::loss_and_gradients(given(&x, &w, &ids), scale);
        (cpu::tensor(vec![loss], Shape::new([1])), cpu::tensor(dx, x.shape()), cpu::tensor(dw, w.shape()))
    }
}

/// Logits in one chunk on a GPU at most, in bytes: of GPT-2's vocabulary 2560 rows in f16, 1280 in f32, whole tiles. Every chunk reads and
/// writes dw once more; a product with as many rows is 0.198 TFLOP, and 0.2 is what a small GPU may be given at once.
const GPU_CHUNK_BYTES: usize = 246 << 20;

/// Elements from row to row of the logits: whole packs, so that the products can move packs. The padding holds zeros once it is
/// a gradient.
pub fn logits_stride(vocab: usize) -> usize {
    vocab.next_multiple_of(8)
}

/// Rows whose logits, in f16 (or f32), exist together in a buffer of `largest_buffer` bytes, at most.
pub fn chunk_rows(vocab: usize, f16: bool, composed: bool, largest_buffer: u64) -> usize {
    if composed {
        return (CHUNK_ELEMENTS / vocab.max(1)).max(1);
    }
    let bytes = GPU_CHUNK_BYTES.min(largest_buffer as usize);
    let row_bytes = logits_stride(vocab) * if f16 { 2 } else { 4 };
    (bytes / row_bytes.max(1) / CHUNK_ALIGNMENT * CHUNK_ALIGNMENT).max(CHUNK_ALIGNMENT)
}

/// A chunk begins where a binding may begin: at a multiple of 256 bytes.
const CHUNK_ALIGNMENT: usize = 64;

/// The kernel that counts the targets that count, and weighs each.
pub fn count_kernel() -> Kernel {
    let files = vec![include_str!("../../wgsl/cross_entropy_count.wgsl")];
    Kernel::new("cross_entropy_count", String::new(), files, (256, 1, 1))
}

/// What takes the place of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gradient {
    /// They stay.
    Unwanted,
    /// Their gradient, of their type.
    Whole,
    /// Their gradient as products round it: f16, some times itself, in the first half of each row of f32.
    Held,
}

/// The kernel that makes rows of losses from logits in f16 (or f32), and, if wanted, the gradient of the logits.
pub fn rows_kernel(gradient: Gradient, f16: bool) -> Kernel {
    let (types, file) = match gradient {
        Gradient::Held => ("", include_str!("../../wgsl/cross_entropy_held.wgsl")),
        Gradient::Unwanted | Gradient::Whole => (elem(f16), include_str!("../../wgsl/cross_entropy_whole.wgsl")),
    };
    let header = format!("{types}const GRADIENT: bool = {};\n", gradient != Gradient::Unwanted);
    Kernel::new("cross_entropy", header, vec![include_str!("../../wgsl/cross_entropy.wgsl"), file], (256, 1, 1))
}

/// The kernel that makes the mean of the losses.
pub fn mean_kernel() -> Kernel {
    let files = vec![include_str!("../../wgsl/cross_entropy_mean.wgsl")];
    Kernel::new("cross_entropy_mean", String::new(), files, (256, 1, 1))
}

/// Every kernel of the loss but its matrix products.
pub fn kernels() -> Vec<Kernel> {
    let whole = [Gradient::Unwanted, Gradient::Whole];
    let rows = [false, true].into_iter().flat_map(|f16| whole.map(|gradient| rows_kernel(gradient, f16)));
    rows.chain([rows_kernel(Gradient::Held, false), count_kernel(), mean_kernel()]).collect()
}

/// The rows of `matrix` (..., columns) in `rows`, as a matrix over the same memory.
fn rows_of(matrix: &CubeTensor, columns: usize, rows: &Range<usize>) -> CubeTensor {
    let all = matrix.meta.shape().num_elements() / columns;
    let bytes = |rows: usize| (rows * columns * matrix.dtype.size()) as u64;
    let handle = matrix.handle.clone().offset_start(bytes(rows.start)).offset_end(bytes(all - rows.end));
    let shape = Shape::new([rows.len(), columns]);
    CubeTensor::new_contiguous(matrix.client.clone(), matrix.device.clone(), shape, handle, matrix.dtype)
}

/// The memory of a matrix in f32 as one in f16, each of whose rows has twice as many elements.
fn as_halves(matrix: &CubeTensor) -> CubeTensor {
    let [rows, columns] = matrix.meta.shape().dims::<2>();
    let (client, handle) = (matrix.client.clone(), matrix.handle.clone());
    CubeTensor::new_contiguous(client, matrix.device.clone(), Shape::new([rows, 2 * columns]), handle, DType::F16)
}

/// Where the gradients of a loss go, dx (..., C) and dw (V, C), and what they are multiplied by.
struct Wanted<'a> {
    dx: &'a CubeTensor,
    dw: &'a CubeTensor,
    scale: Optional<CubeBackend>,
}

/// loss (1) for x (..., C), with its gradients where they are wanted.
///
/// Where products round f32, x, w and the logits' gradient are stored as they round it ([`held`]): the same roundings, half the bytes.
fn fused(variant: Variant, x: &CubeTensor, w: &CubeTensor, targets: &CubeTensor, wanted: Option<Wanted>) -> CubeTensor {
    let [vocab, channels] = w.meta.shape().dims::<2>();
    let rows = x.meta.shape().num_elements() / channels;
    let dtype = x.dtype;
    let f16 = dtype == DType::F16;
    let stride = logits_stride(vocab);
    let rounded = CubeBackend::as_multiplied(Tensors(vec![x.clone(), w.clone()])).0;
    let (x, w, held) = match rounded.as_slice() {
        [x, w] => (x, w, Some(held(rows))),
        _ => (x, w, None),
    };
    let f32s = |shape: Shape| kernel::empty_of(x, shape, DType::F32);
    let (count, losses, loss) = (f32s(Shape::new([2])), f32s(Shape::new([rows])), f32s(Shape::new([1])));
    // What is bound where there is no scale only has to be a buffer: `count` itself would be bound twice.
    let (scale, is_scaled) = match &wanted {
        Some(Wanted { scale: Optional::Present(scale), .. }) => (scale, true),
        _ => (&losses, false),
    };
    count_kernel().launch((1, 1, 1), &[targets, scale, &count], &[rows as u32, u32::from(is_scaled)]);
    let chunk = chunk_rows(vocab, f16, false, kernel::largest_buffer(x)).min(rows);
    let logits = kernel::empty_of(x, Shape::new([chunk, stride]), dtype);
    let dlogits = match held {
        Some(_) => as_halves(&logits),
        None => logits.clone(),
    };
    let gradient = match (&wanted, held) {
        (None, _) => Gradient::Unwanted,
        (Some(_), None) => Gradient::Whole,
        (Some(_), Some(_)) => Gradient::Held,
    };
    let kernel = rows_kernel(gradient, f16);
    for start in (0..rows).step_by(chunk) {
        let range = start..(start + chunk).min(rows);
        let here = range.len();
        let x = rows_of(x, channels, &range);
        let product = Product::plain(Layout::Nt, &x, w, here, vocab, channels);
        Product { strides: [channels, channels, stride], ..product }.launch(variant, &logits);
        let [rows_here, vocab_size, row, first] = [here, vocab, stride, start].map(|size| size as u32);
        let params = [rows_here, vocab_size, row, first, held.unwrap_or(1.0).to_bits()];
        kernel.clone().launch(fold(here as u32), &[&logits, targets, &losses, &count], &params);
        if let Some(Wanted { dx, dw, .. }) = &wanted {
            // logits = x wᵀ  =>  dx = dlogits w, dw = Σ dlogitsᵀ x
            let strides = [dlogits.meta.shape()[1], channels, channels];
            let product = Product::plain(Layout::Nn, &dlogits, w, here, channels, vocab).of_gradient(rows, held);
            Product { strides, ..product }.launch_tall(variant, &rows_of(dx, channels, &range), false);
            let product = Product::plain(Layout::Tn, &dlogits, &x, vocab, channels, here).of_gradient(rows, held);
            Product { strides, ..product }.launch_tall(variant, dw, start > 0);
        }
    }
    mean_kernel().launch((1, 1, 1), &[&losses, &count, &loss], &[rows as u32]);
    loss
}

/// The kernels for `x`, unless there are no rows, for which Burn's primitives know the answer.
fn variant(x: &CubeTensor) -> Option<Variant> {
    kernel::variant(x).filter(|_| x.meta.shape().num_elements() > 0)
}

impl CrossEntropyOps for CubeBackend {
    fn cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        _scale: Optional<Self>,
    ) -> FloatTensor<Self> {
        let Some(variant) = variant(&x) else {
            return composed::loss::<Self>(x, w, targets);
        };
        fused(variant, &into_contiguous(x), &into_contiguous(w), &into_contiguous(targets), None)
    }

    fn cross_entropy_gradients(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        scale: Optional<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let Some(variant) = variant(&x) else {
            return composed::gradients::<Self>(x, w, targets, scale);
        };
        let (x, w) = (into_contiguous(x), into_contiguous(w));
        let (dx, dw) = (kernel::empty_like(&x), kernel::empty_of(&x, w.meta.shape().clone(), DType::F32));
        let wanted = Wanted { dx: &dx, dw: &dw, scale };
        let loss = fused(variant, &x, &w, &into_contiguous(targets), Some(wanted));
        (loss, dx, dw)
    }
}

/// Parents: x, w. State: their gradients for a unit cotangent.
#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: CrossEntropyOps> Backward<B, 2> for CrossEntropyBackward {
    type State = [FloatTensor<B>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dloss = grads.consume::<B>(&ops.node); // (1)
        for (parent, gradient) in ops.parents.into_iter().zip(ops.state) {
            if let Some(parent) = parent {
                let ones = Shape::from(vec![1; gradient.shape().num_dims()]);
                let factor = B::float_cast(B::float_reshape(dloss.clone(), ones), gradient.dtype().into());
                grads.register::<B>(parent.id, B::float_mul(gradient, factor));
            }
        }
    }
}

impl<B: CrossEntropyOps, C: CheckpointStrategy> CrossEntropyOps for Autodiff<B, C> {
    fn cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        scale: Optional<Self>,
    ) -> FloatTensor<Self> {
        let parents = [x.node(), w.node()];
        let prepared = CrossEntropyBackward.prepare::<C>(parents).compute_bound().stateful();
        let x = <Self as AutodiffBackend>::inner(x);
        let w = <Self as AutodiffBackend>::inner(w);
        match prepared {
            OpsKind::Tracked(prepared) => {
                let (loss, dx, dw) = B::cross_entropy_gradients(x, w, targets, scale.inner());
                prepared.finish([dx, dw], loss)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(B::cross_entropy(x, w, targets, Optional::Absent)),
        }
    }
}

/// Mean cross-entropy of the logits x wᵀ: x (B, T, C), w (V, C), targets (B, T) in 0..V or [`IGNORED`] -> (1), in nats.
pub fn cross_entropy(x: Tensor<3>, w: Tensor<2>, targets: Tensor<2, Int>) -> Tensor<1> {
    cross_entropy_scaled(x, w, targets, None)
}

/// As [`cross_entropy`]; its gradients are multiplied by the first element of `scale`, a loss scale, before they are rounded to x's
/// type, which a factor on the loss would not do.
pub fn cross_entropy_scaled(
    x: Tensor<3>,
    w: Tensor<2>,
    targets: Tensor<2, Int>,
    scale: Option<Tensor<1>>,
) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as CrossEntropyOps>::cross_entropy(
        x.into_dispatch(),
        w.into_dispatch(),
        targets.into_dispatch(),
        Optional::of(scale),
    ))
}
