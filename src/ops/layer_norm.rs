//! Layer normalisation over the last dimension, with an optional bias.

use burn::backend::{
    Autodiff, Backend, Dispatch, Flex, TensorMetadata,
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

use super::{Bias, flatten};

/// GPT-2's and nanoGPT's epsilon.
pub const EPSILON: f64 = 1e-5;

/// y = (x - mean) · rstd · w + b, rstd = 1 / √(variance + ε), each row by itself.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait LayerNormOps: Backend {
    /// x (..., C), w (C), b (C) -> (y (..., C), mean (rows, 1), rstd (rows, 1)).
    fn layer_norm_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Bias<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let shape = x.shape();
        let row = Shape::new([1, w.shape()[0]]);
        let x = flatten::<Self>(x);
        let mean = Self::float_mean_dim(x.clone(), 1);
        let centred = Self::float_sub(x, mean.clone());
        let variance = Self::float_mean_dim(Self::float_mul(centred.clone(), centred.clone()), 1);
        let rstd = Self::float_recip(Self::float_sqrt(Self::float_add_scalar(variance, EPSILON.into())));
        let normed = Self::float_mul(centred, rstd.clone());
        let y = Self::float_mul(normed, Self::float_reshape(w, row.clone()));
        let y = match b {
            Bias::Present(b) => Self::float_add(y, Self::float_reshape(b, row)),
            Bias::Absent => y,
        };
        (Self::float_reshape(y, shape), mean, rstd)
    }

    /// dy, x (..., C), w (C), mean and rstd (rows, 1) -> (dx (..., C), dw (C), db (C)).
    fn layer_norm_backward(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        rstd: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let shape = x.shape();
        let features = w.shape();
        let row = Shape::new([1, features[0]]);
        let (dy, x) = (flatten::<Self>(dy), flatten::<Self>(x));
        let normed = Self::float_mul(Self::float_sub(x, mean), rstd.clone()); // y = normed · w + b
        let dw = Self::float_sum_dim(Self::float_mul(dy.clone(), normed.clone()), 0);
        let db = Self::float_sum_dim(dy.clone(), 0);
        let dnormed = Self::float_mul(dy, Self::float_reshape(w, row));
        // normed = (x - mean) rstd  =>  dx = rstd (dnormed - mean(dnormed) - normed · mean(dnormed · normed))
        let average = Self::float_mean_dim(dnormed.clone(), 1);
        let along = Self::float_mean_dim(Self::float_mul(dnormed.clone(), normed.clone()), 1);
        let dx = Self::float_sub(Self::float_sub(dnormed, average), Self::float_mul(normed, along));
        let dx = Self::float_mul(dx, rstd);
        (Self::float_reshape(dx, shape), Self::float_reshape(dw, features.clone()), Self::float_reshape(db, features))
    }
}

impl LayerNormOps for Flex {}

impl LayerNormOps for CubeBackend {}

/// x, w, mean, rstd.
type Saved<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

/// Parents: x, w, then the bias where there is one.
#[derive(Debug)]
struct LayerNormBackward<const N: usize>;

impl<B: LayerNormOps, const N: usize> Backward<B, N> for LayerNormBackward<N> {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Saved<B>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, w, mean, rstd) = ops.state;
        let (dx, dw, db) = B::layer_norm_backward(dy, x, w, mean, rstd);
        for (parent, gradient) in ops.parents.into_iter().zip([dx, dw, db]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: LayerNormOps, C: CheckpointStrategy> LayerNormOps for Autodiff<B, C> {
    fn layer_norm_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Bias<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (xi, wi) = (x.primitive().clone(), w.primitive().clone());
        let bi = match &b {
            Bias::Present(b) => Bias::Present(b.primitive().clone()),
            Bias::Absent => Bias::Absent,
        };
        let (y, mean, rstd) = B::layer_norm_forward(xi.clone(), wi.clone(), bi);
        let saved = (xi, wi, mean.clone(), rstd.clone());
        let y = match b {
            Bias::Present(b) => {
                let parents = [x.node(), w.node(), b.node()];
                match LayerNormBackward::<3>.prepare::<C>(parents).compute_bound().stateful() {
                    OpsKind::Tracked(prepared) => prepared.finish(saved, y),
                    OpsKind::UnTracked(prepared) => prepared.finish(y),
                }
            }
            Bias::Absent => {
                let parents = [x.node(), w.node()];
                match LayerNormBackward::<2>.prepare::<C>(parents).compute_bound().stateful() {
                    OpsKind::Tracked(prepared) => prepared.finish(saved, y),
                    OpsKind::UnTracked(prepared) => prepared.finish(y),
                }
            }
        };
        let constant = <Self as burn::backend::AutodiffBackend>::from_inner;
        (y, constant(mean), constant(rstd))
    }
}

/// Layer normalisation of x (..., C) with weight w (C) and bias b (C); ε is [`EPSILON`].
pub fn layer_norm<const D: usize>(x: Tensor<D>, w: Tensor<1>, b: Option<Tensor<1>>) -> Tensor<D> {
    let (y, _, _) = <Dispatch as LayerNormOps>::layer_norm_forward(x.into_dispatch(), w.into_dispatch(), Bias::of(b));
    Tensor::from_dispatch(y)
}
