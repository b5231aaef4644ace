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
use burn::tensor::{DType, FloatDType, Int, Shape, Slice, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use super::dropout::{Dropout, DropoutOps};
use crate::kernel::lanes::{Lanes, serves};
use crate::kernel::{Kernel, PHILOX, empty, empty_of, fold};

/// `x[b, t] = dropout(wte[token[b, t]] + wpe[t])`
#[backend_extension(Cube, Flex, Autodiff)]
pub trait EmbeddingOps: DropoutOps {
    /// tokens (B, T) in 0..V, wte (V, C), wpe (block_size, C) with block_size >= T -> (B, T, C) in f16 (or f32).
    fn embed(
        tokens: IntTensor<Self>,
        wte: FloatTensor<Self>,
        wpe: FloatTensor<Self>,
        dropout: Dropout,
        f16: bool,
    ) -> FloatTensor<Self> {
        composed_forward::<Self>(tokens, wte, wpe, dropout, f16)
    }

    /// dx (B, T, C), tokens (B, T) -> (dwte (vocab, C), dwpe (block_size, C)), both f32.
    fn embed_backward(
        dx: FloatTensor<Self>,
        tokens: IntTensor<Self>,
        vocab: usize,
        block_size: usize,
        dropout: Dropout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_backward::<Self>(dx, tokens, vocab, block_size, dropout)
    }
}

impl EmbeddingOps for Flex {}

/// The whole of [`EmbeddingOps::embed`]'s default, for the GPU path to fall back on.
fn composed_forward<B: DropoutOps>(
    tokens: IntTensor<B>,
    wte: FloatTensor<B>,
    wpe: FloatTensor<B>,
    dropout: Dropout,
    f16: bool,
) -> FloatTensor<B> {
    let [batch, time] = tokens.shape().dims::<2>();
    let channels = wte.shape()[1];
    let indices = B::int_reshape(tokens, Shape::new([batch * time]));
    let token = B::float_select(wte, 0, indices);
    let token = B::float_reshape(token, Shape::new([batch, time, channels]));
    let rows = [Slice::from(0..time), Slice::from(0..channels)];
    let position = B::float_reshape(B::float_slice(wpe, &rows), Shape::new([1, time, channels]));
    let x = B::float_add(token, position);
    let x = if dropout.is_on() { B::dropout(x, dropout, None) } else { x };
    if f16 { B::float_cast(x, FloatDType::F16) } else { x }
}

/// The whole of [`EmbeddingOps::embed_backward`]'s default.
fn composed_backward<B: DropoutOps>(
    dx: FloatTensor<B>,
    tokens: IntTensor<B>,
    vocab: usize,
    block_size: usize,
    dropout: Dropout,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let [batch, time, channels] = dx.shape().dims::<3>();
    let device = dx.device();
    let dx = B::float_cast(dx, FloatDType::F32);
    let dx = if dropout.is_on() {
        B::dropout(dx, dropout, None) // x = mask (token + position)
    } else {
        dx
    };
    let zeros = |rows| B::float_zeros(Shape::new([rows, channels]), &device, FloatDType::F32);
    let dwte = B::float_select_assign(
        zeros(vocab),
        0,
        B::int_reshape(tokens, Shape::new([batch * time])),
        B::float_reshape(dx.clone(), Shape::new([batch * time, channels])),
        IndexingUpdateOp::Add,
    );
    let over_batch = B::float_reshape(B::float_sum_dim(dx, 0), Shape::new([time, channels]));
    let dwpe = if time == block_size {
        over_batch
    } else {
        let rows = [Slice::from(0..time), Slice::from(0..channels)];
        B::float_slice_assign(zeros(block_size), &rows, over_batch)
    };
    (dwte, dwpe)
}

/// Tokens that a workgroup sorts.
pub const BLOCK: usize = 1024;

/// What a sort key has room for beside a position among [`BLOCK`].
const LARGEST_VOCAB: usize = (1 << 22) - 2;

/// Rows of gradient per row of wte, on average, from which on a workgroup makes one row instead of 16.
const LONG_LISTS: usize = 8;

/// Whether our kernels serve these tensors.
fn is_served(activation: &CubeTensor, tokens: &CubeTensor, vocab: usize) -> bool {
    let case = match tokens.dtype {
        _ if vocab > LARGEST_VOCAB => Err("an embedding of more than 4 million rows"),
        DType::I32 | DType::U32 => Ok(()),
        _ => Err("tokens that are not of 32 bits"),
    };
    serves(activation, case)
}

/// The forward kernel.
pub fn forward_kernel(lanes: Lanes, f16: bool, dropout: bool) -> Kernel {
    let files = [PHILOX, include_str!("../../wgsl/embedding_forward.wgsl")];
    lanes.kernel("embedding_forward", [f16; 2], &format!("const DROPOUT: bool = {dropout};\n"), &files, 256)
}

/// The last of the backward's three kernels; `rows`: the rows of wte and wpe that a workgroup makes, 1 or 16.
pub fn backward_kernel(lanes: Lanes, f16: bool, dropout: bool, rows: usize) -> Kernel {
    let constants = format!("const DROPOUT: bool = {dropout};\nconst ROWS: u32 = {rows}u;\n");
    let files = [PHILOX, include_str!("../../wgsl/embedding_backward.wgsl")];
    lanes.kernel("embedding_backward", [f16; 2], &constants, &files, 256)
}

/// The first of the backward's three kernels.
pub fn sort_kernel() -> Kernel {
    Kernel::new("embedding_sort", String::new(), vec![include_str!("../../wgsl/embedding_sort.wgsl")], (256, 1, 1))
}

/// The second of the backward's three kernels.
pub fn rank_kernel() -> Kernel {
    Kernel::new("embedding_rank", String::new(), vec![include_str!("../../wgsl/embedding_rank.wgsl")], (256, 1, 1))
}

/// Every kernel of the embedding.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![sort_kernel(), rank_kernel()];
    for lanes in [1, 4].map(Lanes::of) {
        for dropout in [false, true] {
            for f16 in [false, true] {
                kernels.push(forward_kernel(lanes, f16, dropout));
                kernels.extend([1, 16].map(|rows| backward_kernel(lanes, f16, dropout, rows)));
            }
        }
    }
    kernels
}

/// Queues the forward: tokens (B, T), wte (V, C), wpe (block_size, C) -> x (B, T, C); all contiguous.
///
/// For the tests, which give their own outputs; the model calls [`embedding`].
pub fn launch_forward(tokens: &CubeTensor, wte: &CubeTensor, wpe: &CubeTensor, dropout: Dropout, x: &CubeTensor) {
    let [batch, time, channels] = x.meta.shape().dims::<3>();
    let lanes = Lanes::of(channels);
    let kernel = forward_kernel(lanes, x.dtype == DType::F16, dropout.is_on());
    let rows = batch * time;
    let mut params = vec![rows as u32, lanes.count as u32, time as u32, wte.meta.shape()[0] as u32];
    params.extend(dropout.params());
    let groups = (rows * lanes.count).div_ceil(256) as u32;
    kernel.launch(fold(groups), &[tokens, wte, wpe, x], &params);
}

/// Queues the backward: dx (B, T, C), tokens (B, T) -> dwte (V, C), dwpe (block_size, C); all contiguous.
pub fn launch_backward(dx: &CubeTensor, tokens: &CubeTensor, dropout: Dropout, dwte: &CubeTensor, dwpe: &CubeTensor) {
    let [batch, time, channels] = dx.meta.shape().dims::<3>();
    let (vocab, block_size) = (dwte.meta.shape()[0], dwpe.meta.shape()[0]);
    let count = batch * time;
    let blocks = count.div_ceil(BLOCK);
    let sorted = empty(tokens, Shape::new([blocks * BLOCK]));
    let order = empty(tokens, Shape::new([count]));
    let starts = empty(tokens, Shape::new([vocab + 1]));
    sort_kernel().launch(fold(blocks as u32), &[tokens, &sorted], &[count as u32, vocab as u32]);
    let keys = (blocks * BLOCK + vocab + 1).div_ceil(256) as u32;
    rank_kernel().launch(fold(keys), &[&sorted, &order, &starts], &[blocks as u32, vocab as u32]);

    let lanes = Lanes::of(channels);
    let rows = if count >= LONG_LISTS * vocab { 1 } else { 16 };
    let kernel = backward_kernel(lanes, dx.dtype == DType::F16, dropout.is_on(), rows);
    let mut params = [batch, time, lanes.count, vocab, block_size].map(|size| size as u32).to_vec();
    params.extend(dropout.params());
    let groups = (vocab + block_size).div_ceil(rows) * lanes.count.div_ceil(16);
    kernel.launch(fold(groups as u32), &[dx, &order, &starts, dwte, dwpe], &params);
}

impl EmbeddingOps for CubeBackend {
    fn embed(
        tokens: IntTensor<Self>,
        wte: FloatTensor<Self>,
        wpe: FloatTensor<Self>,
        dropout: Dropout,
        f16: bool,
    ) -> FloatTensor<Self> {
        if !is_served(&wte, &tokens, wte.meta.shape()[0]) {
            return composed_forward::<Self>(tokens, wte, wpe, dropout, f16);
        }
        let [tokens, wte, wpe] = [tokens, wte, wpe].map(into_contiguous);
        let [batch, time] = tokens.meta.shape().dims::<2>();
        let dtype = if f16 { DType::F16 } else { DType::F32 };
        let x = empty_of(&wte, Shape::new([batch, time, wte.meta.shape()[1]]), dtype);
        launch_forward(&tokens, &wte, &wpe, dropout, &x);
        x
    }

    fn embed_backward(
        dx: FloatTensor<Self>,
        tokens: IntTensor<Self>,
        vocab: usize,
        block_size: usize,
        dropout: Dropout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !is_served(&dx, &tokens, vocab) {
            return composed_backward::<Self>(dx, tokens, vocab, block_size, dropout);
        }
        let [dx, tokens] = [dx, tokens].map(into_contiguous);
        let channels = dx.meta.shape()[2];
        let [dwte, dwpe] = [vocab, block_size].map(|rows| empty_of(&dx, Shape::new([rows, channels]), DType::F32));
        launch_backward(&dx, &tokens, dropout, &dwte, &dwpe);
        (dwte, dwpe)
    }
}

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
        f16: bool,
    ) -> FloatTensor<Self> {
        let parents = [wte.node(), wpe.node()];
        let prepared = EmbeddingBackward.prepare::<C>(parents).compute_bound().stateful();
        let wte = <Self as AutodiffBackend>::inner(wte);
        let wpe = <Self as AutodiffBackend>::inner(wpe);
        let state =
            EmbeddingState { tokens: tokens.clone(), vocab: wte.shape()[0], block_size: wpe.shape()[0], dropout };
        let x = B::embed(tokens, wte, wpe, dropout, f16);
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(state, x),
            OpsKind::UnTracked(prepared) => prepared.finish(x),
        }
    }
}

/// `dropout(wte[tokens] + wpe)`: tokens (B, T) in 0..V, wte (V, C), wpe (block_size, C) -> (B, T, C) in f16 (or f32).
pub fn embedding(tokens: Tensor<2, Int>, wte: Tensor<2>, wpe: Tensor<2>, dropout: Dropout, f16: bool) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as EmbeddingOps>::embed(
        tokens.into_dispatch(),
        wte.into_dispatch(),
        wpe.into_dispatch(),
        dropout,
        f16,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_valid_and_fits() {
        for lanes in [Lanes::of(6), Lanes::of(768)] {
            for (f16, dropout) in [(false, false), (false, true), (true, false), (true, true)] {
                let kernels = [
                    forward_kernel(lanes, f16, dropout),
                    backward_kernel(lanes, f16, dropout, 1),
                    backward_kernel(lanes, f16, dropout, 16),
                    sort_kernel(),
                    rank_kernel(),
                ];
                for kernel in kernels {
                    let bytes =
                        kernel.workgroup_memory().unwrap_or_else(|error| panic!("{lanes:?} f16 {f16}: {error}"));
                    assert!(bytes <= 32 << 10, "{lanes:?} f16 {f16}: {bytes} bytes of workgroup memory");
                }
            }
        }
    }
}
