//! Token plus position embedding, with dropout on the sum.

use burn::backend::{
    Autodiff, AutodiffBackend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::{FloatTensor, IndexingUpdateOp, IntTensor},
};
use burn::tensor::{Int, Shape, Slice, Tensor};
use burn_cubecl::CubeBackend;

use super::dropout::{Dropout, DropoutOps};

/// `x[b, t] = dropout(wte[token[b, t]] + wpe[t])`
#[backend_extension(Cube, Flex, Autodiff)]
pub trait EmbeddingOps: DropoutOps {
    /// tokens (B, T) in 0..V, wte (V, C), wpe (block_size, C) with block_size >= T -> (B, T, C).
    fn embed(
        tokens: IntTensor<Self>,
        wte: FloatTensor<Self>,
        wpe: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let [batch, time] = tokens.shape().dims::<2>();
        let channels = wte.shape()[1];
        let indices = Self::int_reshape(tokens, Shape::new([batch * time]));
        let token = Self::float_select(wte, 0, indices);
        let token = Self::float_reshape(token, Shape::new([batch, time, channels]));
        let rows = [Slice::from(0..time), Slice::from(0..channels)];
        let position = Self::float_reshape(Self::float_slice(wpe, &rows), Shape::new([1, time, channels]));
        let x = Self::float_add(token, position);
        if dropout.is_on() { Self::dropout(x, dropout) } else { x }
    }

    /// dx (B, T, C), tokens (B, T) -> (dwte (vocab, C), dwpe (block_size, C)).
    fn embed_backward(
        dx: FloatTensor<Self>,
        tokens: IntTensor<Self>,
        vocab: usize,
        block_size: usize,
        dropout: Dropout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [batch, time, channels] = dx.shape().dims::<3>();
        let (device, dtype) = (dx.device(), dx.dtype().into());
        let dx = if dropout.is_on() {
            Self::dropout(dx, dropout) // x = mask (token + position)
        } else {
            dx
        };
        let zeros = |rows| Self::float_zeros(Shape::new([rows, channels]), &device, dtype);
        let dwte = Self::float_select_assign(
            zeros(vocab),
            0,
            Self::int_reshape(tokens, Shape::new([batch * time])),
            Self::float_reshape(dx.clone(), Shape::new([batch * time, channels])),
            IndexingUpdateOp::Add,
        );
        let over_batch = Self::float_reshape(Self::float_sum_dim(dx, 0), Shape::new([time, channels]));
        let dwpe = if time == block_size {
            over_batch
        } else {
            let rows = [Slice::from(0..time), Slice::from(0..channels)];
            Self::float_slice_assign(zeros(block_size), &rows, over_batch)
        };
        (dwte, dwpe)
    }
}

impl EmbeddingOps for Flex {}

impl EmbeddingOps for CubeBackend {}

#[derive(Clone, Debug)]
struct EmbeddingState<B: EmbeddingOps> {
    tokens: IntTensor<B>,
    vocab: usize,
    block_size: usize,
    dropout: Dropout,
}

/// Parents: wte, wpe.
#[derive(Debug)]
struct EmbeddingBackward;

impl<B: EmbeddingOps> Backward<B, 2> for EmbeddingBackward {
    type State = EmbeddingState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dx = grads.consume::<B>(&ops.node);
        let s = ops.state;
        let (dwte, dwpe) = B::embed_backward(dx, s.tokens, s.vocab, s.block_size, s.dropout);
        for (parent, gradient) in ops.parents.into_iter().zip([dwte, dwpe]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: EmbeddingOps, C: CheckpointStrategy> EmbeddingOps for Autodiff<B, C> {
    fn embed(
        tokens: IntTensor<Self>,
        wte: FloatTensor<Self>,
        wpe: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let parents = [wte.node(), wpe.node()];
        let prepared = EmbeddingBackward.prepare::<C>(parents).compute_bound().stateful();
        let wte = <Self as AutodiffBackend>::inner(wte);
        let wpe = <Self as AutodiffBackend>::inner(wpe);
        let state =
            EmbeddingState { tokens: tokens.clone(), vocab: wte.shape()[0], block_size: wpe.shape()[0], dropout };
        let x = B::embed(tokens, wte, wpe, dropout);
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(state, x),
            OpsKind::UnTracked(prepared) => prepared.finish(x),
        }
    }
}

/// `dropout(wte[tokens] + wpe)`: tokens (B, T) in 0..V, wte (V, C), wpe (block_size, C) -> (B, T, C).
pub fn embedding(tokens: Tensor<2, Int>, wte: Tensor<2>, wpe: Tensor<2>, dropout: Dropout) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as EmbeddingOps>::embed(
        tokens.into_dispatch(),
        wte.into_dispatch(),
        wpe.into_dispatch(),
        dropout,
    ))
}
