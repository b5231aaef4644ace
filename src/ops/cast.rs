//! Weights in f16 for the products of mixed precision. The weights themselves, and their gradients, stay f32.

use burn::backend::{
    Autodiff, Backend, Dispatch, Flex,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
};
use burn::tensor::{DType, FloatDType, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use super::Tensors;
use crate::kernel::lanes::serves;
use crate::kernel::slots::{self, Slot, SlotKernel};
use crate::kernel::{Kernel, Variant, empty_of, variant};

/// Copies of tensors in f16.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait CastOps: Backend {
    /// At least one tensor of any shape, f32 -> as many rounded to f16.
    fn to_f16(#[extension_type] x: Tensors<Self>) -> Tensors<Self> {
        composed_casts::<Self>(x)
    }

    /// The same of tensors that products would round to f16 anyway; none where they would not.
    fn as_multiplied(#[extension_type] x: Tensors<Self>) -> Tensors<Self> {
        let _ = x;
        Tensors(Vec::new())
    }
}

/// The whole of [`CastOps::to_f16`]'s default, for the GPU path to fall back on.
fn composed_casts<B: Backend>(x: Tensors<B>) -> Tensors<B> {
    Tensors(x.0.into_iter().map(|x| B::float_cast(x, FloatDType::F16)).collect())
}

impl CastOps for Flex {}

static CAST: SlotKernel = SlotKernel::new(
    "cast",
    true,
    include_str!("../../wgsl/cast_slot.wgsl"),
    include_str!("../../wgsl/cast.wgsl"),
    2, // as the update, which has more to load at once
);

/// The kernel.
pub fn kernel() -> &'static SlotKernel {
    &CAST
}

/// Every kernel of the cast.
pub fn kernels() -> Vec<Kernel> {
    CAST.kernels()
}

/// Queues x, f32 -> y, f16, of each (x, y), at most `most` a launch; all contiguous.
///
/// For the tests, which give their own outputs; the model calls [`to_f16`].
pub fn launch(casts: &[(&CubeTensor, &CubeTensor)], most: usize) {
    let slots: Vec<_> = casts.iter().map(|(x, y)| Slot { buffers: vec![*x, *y], factor: 0.0 }).collect();
    CAST.launch(&slots, &[], &[], most);
}

impl CastOps for CubeBackend {
    fn to_f16(x: Tensors<Self>) -> Tensors<Self> {
        if !x.0.iter().all(|x| serves(x, Ok(()))) {
            return composed_casts::<Self>(x);
        }
        let x: Vec<_> = x.0.into_iter().map(into_contiguous).collect();
        let y: Vec<_> = x.iter().map(|x| empty_of(x, x.meta.shape().clone(), DType::F16)).collect();
        let casts: Vec<_> = x.iter().zip(&y).collect();
        launch(&casts, slots::most(&x[0], 2, 0));
        Tensors(y)
    }

    fn as_multiplied(x: Tensors<Self>) -> Tensors<Self> {
        let rounds = x.0.iter().all(|x| x.dtype == DType::F32 && variant(x).is_some_and(Variant::rounds_f32));
        if rounds { Self::to_f16(x) } else { Tensors(Vec::new()) }
    }
}

#[derive(Debug)]
struct CastBackward;

impl<B: CastOps> Backward<B, 1> for CastBackward {
    type State = ();

    fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(x) = x {
            grads.register::<B>(x.id, dy); // of the rounding's slope 1; the products make it in f32
        }
    }
}

impl<B: CastOps, C: CheckpointStrategy> CastOps for Autodiff<B, C> {
    fn to_f16(x: Tensors<Self>) -> Tensors<Self> {
        let below = Tensors(x.0.iter().map(|x| x.primitive().clone()).collect());
        let record = |(x, y): (Self::FloatTensorPrimitive, _)| match CastBackward
            .prepare::<C>([x.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prepared) => prepared.finish((), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        };
        Tensors(x.0.into_iter().zip(B::to_f16(below).0).map(record).collect())
    }
}

/// At least one tensor -> as many, rounded to f16. Their gradients come back as the operations behind them make them: of
/// weights in f32.
pub fn all_to_f16<const D: usize>(x: impl IntoIterator<Item = Tensor<D>>) -> impl Iterator<Item = Tensor<D>> {
    <Dispatch as CastOps>::to_f16(Tensors::of(x)).into_tensors()
}

/// As many of at least one tensor, without autodiff, as cooperative products of f32 tensors round them; nothing where products do not
/// round.
pub fn all_as_multiplied<const D: usize>(x: impl IntoIterator<Item = Tensor<D>>) -> impl Iterator<Item = Tensor<D>> {
    <Dispatch as CastOps>::as_multiplied(Tensors::of(x)).into_tensors()
}

/// As [`all_to_f16`], of one tensor.
pub fn to_f16<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as CastOps>::to_f16(Tensors::of([x])).0.swap_remove(0))
}
