//! A weight in f16 for the products of mixed precision. The weight itself, and its gradient, stay f32.

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    ops::FloatTensorOps,
    tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous};

use crate::kernel::lanes::{Lanes, serves};
use crate::kernel::{Kernel, empty_of, fold};

/// A copy of a tensor in f16.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait CastOps: Backend {
    /// x of any shape, f32 -> x rounded to f16.
    fn to_f16(x: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_cast(x, FloatDType::F16)
    }
}

impl CastOps for Flex {}

/// The kernel for this many elements.
pub fn kernel(elements: usize) -> Kernel {
    Lanes::of(elements).kernel("cast", true, "", &[include_str!("../../wgsl/cast.wgsl")], 256)
}

/// Every kernel of the cast.
pub fn kernels() -> Vec<Kernel> {
    [1, 4].map(kernel).to_vec()
}

impl CastOps for CubeBackend {
    fn to_f16(x: FloatTensor<Self>) -> FloatTensor<Self> {
        if !serves(&x, Ok(())) {
            return Self::float_cast(x, FloatDType::F16);
        }
        let x = into_contiguous(x);
        let y = empty_of(&x, x.meta.shape().clone(), DType::F16);
        let elements = x.meta.shape().num_elements();
        let lanes = Lanes::of(elements);
        kernel(elements).launch(fold(lanes.count.div_ceil(256) as u32), &[&x, &y], &[lanes.count as u32]);
        y
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
    fn to_f16(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let prepared = CastBackward.prepare::<C>([x.node()]).compute_bound().stateful();
        let y = B::to_f16(<Self as AutodiffBackend>::inner(x));
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish((), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}

/// x, rounded to f16. Its gradient comes back as the operations behind it make it: of a weight in f32.
pub fn to_f16<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as CastOps>::to_f16(x.into_dispatch()))
}
