//! Where a backward begins that is handed the gradient of its last tensor: Burn's own begins at a loss, with ones.

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
use burn::tensor::{Shape, Tensor};
use burn_cubecl::CubeBackend;

/// A root for the backward. Its value means nothing.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait CotangentOps: Backend {
    /// y, dy of one shape -> (1): 0, whose gradient with respect to y is dy.
    fn cotangent(y: FloatTensor<Self>, _dy: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_zeros(Shape::new([1]), &y.device(), y.dtype().into())
    }
}

impl CotangentOps for Flex {}

impl CotangentOps for CubeBackend {}

#[derive(Debug)]
struct CotangentBackward;

impl<B: CotangentOps> Backward<B, 1> for CotangentBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [y] = ops.parents;
        grads.consume::<B>(&ops.node); // the root's own gradient is 1
        if let Some(y) = y {
            grads.register::<B>(y.id, ops.state);
        }
    }
}

impl<B: CotangentOps, C: CheckpointStrategy> CotangentOps for Autodiff<B, C> {
    fn cotangent(y: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        let prepared = CotangentBackward.prepare::<C>([y.node()]).compute_bound().stateful();
        let dy = <Self as AutodiffBackend>::inner(dy);
        let root = B::cotangent(<Self as AutodiffBackend>::inner(y), dy.clone());
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(dy, root),
            OpsKind::UnTracked(prepared) => prepared.finish(root),
        }
    }
}

/// A tensor (1) whose `backward` gives the tracked `y` the gradient `dy`, to the bit: y, dy of one shape, dy without autodiff.
pub fn cotangent<const D: usize>(y: Tensor<D>, dy: Tensor<D>) -> Tensor<1> {
    let dy = Tensor::from_inner(dy);
    Tensor::from_dispatch(<Dispatch as CotangentOps>::cotangent(y.into_dispatch(), dy.into_dispatch()))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::checkpoint::read;

    #[test]
    fn the_backward_begins_with_the_given_gradient() {
        let device = Device::flex();
        let x = Tensor::<1>::from_data([1.0, 2.0], &device.clone().autodiff()).require_grad();
        let dy = Tensor::<1>::from_data([0.1, -3.0], &device);
        let dx = x.grad(&cotangent(x.clone() * 2.0, dy).backward());
        assert_eq!(dx.map(|dx| read(dx).unwrap()), Some(vec![0.2, -6.0]));
    }
}
