//! [`CrossEntropyOps`](super::CrossEntropyOps) in Burn primitives: its definition, and what the other paths fall back on.

use std::ops::Range;

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, IndexingUpdateOp, IntTensor},
};
use burn::tensor::{Shape, Slice};

use super::chunk_rows;
use crate::ops::{Optional, flatten};

pub(super) fn loss<B: Backend>(x: FloatTensor<B>, w: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let x = flatten::<B>(x);
    let batch = Targets::<B>::new(targets, &x);
    let losses =
        chunks(x.shape()[0], w.shape()[0]).map(|rows| chunk_loss::<B>(&x, &w, &batch, &batch.count, rows).0).collect();
    mean::<B>(losses, batch.count)
}

pub(super) fn gradients<B: Backend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: IntTensor<B>,
    scale: Optional<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let shape = x.shape();
    let x = flatten::<B>(x);
    let batch = Targets::<B>::new(targets, &x);
    let weight = B::float_recip(batch.count.clone());
    let weight = match scale {
        Optional::Present(scale) => {
            let first = B::float_slice(scale, &[Slice::from(0..1)]);
            B::float_mul(weight, B::float_reshape(first, Shape::new([1, 1])))
        }
        Optional::Absent => weight,
    };
    let (mut losses, mut dx, mut dw) = (Vec::new(), Vec::new(), None);
    for rows in chunks(x.shape()[0], w.shape()[0]) {
        let (loss, dlogits, x_rows) = chunk_loss::<B>(&x, &w, &batch, &weight, rows);
        losses.push(loss);
        // logits = x wᵀ  =>  dx = dlogits w, dw = Σ dlogitsᵀ x
        dx.push(B::float_matmul(dlogits.clone(), w.clone()));
        let part = B::float_matmul(B::float_transpose(dlogits), x_rows);
        dw = Some(match dw {
            Some(sum) => B::float_add(sum, part),
            None => part,
        });
    }
    let dx = match dx.len() {
        1 => dx.swap_remove(0),
        _ => B::float_cat(dx, 0),
    };
    let dw = dw.unwrap_or_else(|| {
        B::float_zeros(w.shape(), &w.device(), w.dtype().into()) // no rows at all
    });
    (mean::<B>(losses, batch.count), B::float_reshape(dx, shape), dw)
}

/// The targets, prepared once for all chunks.
struct Targets<B: Backend> {
    /// (rows, 1), every ignored target replaced by 0.
    indices: IntTensor<B>,
    /// (rows, 1): 1 where the target counts, 0 where it is ignored.
    counts: FloatTensor<B>,
    /// (1): how many count, at least 1.
    count: FloatTensor<B>,
}

impl<B: Backend> Targets<B> {
    fn new(targets: IntTensor<B>, like: &FloatTensor<B>) -> Self {
        let rows = targets.shape().num_elements();
        let targets = B::int_reshape(targets, Shape::new([rows, 1]));
        // -1 -> 0, anything else -> 1, without a boolean tensor (a u32 each on wgpu)
        let one_if_counted = B::int_clamp(B::int_add_scalar(targets.clone(), 1.into()), 0.into(), 1.into());
        let counts = B::int_into_float(one_if_counted, like.dtype().into());
        let count = B::float_clamp_min(B::float_sum(counts.clone()), 1.0.into());
        Self {
            indices: B::int_clamp_min(targets, 0.into()),
            counts,
            count: B::float_reshape(count, Shape::new([1, 1])),
        }
    }
}

/// The ranges of rows whose logits exist together.
fn chunks(rows: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let chunk = chunk_rows(vocab, false, true, u64::MAX);
    (0..rows).step_by(chunk).map(move |start| start..(start + chunk).min(rows))
}

/// The chunk's summed loss (1, 1), dlogits (rows, V) where a target weighs `weight` (1, 1), and x's rows.
fn chunk_loss<B: Backend>(
    x: &FloatTensor<B>,
    w: &FloatTensor<B>,
    batch: &Targets<B>,
    weight: &FloatTensor<B>,
    rows: Range<usize>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let pick = |tensor: &FloatTensor<B>| {
        let columns = tensor.shape()[1];
        let slices = [Slice::from(rows.clone()), Slice::from(0..columns)];
        B::float_slice(tensor.clone(), &slices)
    };
    let x = pick(x);
    let counts = pick(&batch.counts);
    let slices = [Slice::from(rows.clone()), Slice::from(0..1)];
    let indices = B::int_slice(batch.indices.clone(), &slices);

    let logits = B::float_matmul(x.clone(), B::float_transpose(w.clone()));
    let max = B::float_max_dim(logits.clone(), 1);
    let shifted = B::float_sub(logits, max);
    let target = B::float_gather(1, shifted.clone(), indices.clone());
    let exponentials = B::float_exp(shifted);
    let sum = B::float_sum_dim(exponentials.clone(), 1);
    let loss = B::float_sub(B::float_log(sum.clone()), target); // (rows, 1)
    let loss = B::float_sum(B::float_mul(loss, counts.clone()));

    // loss = Σ counts (log Σ exp(logits) - logits[target]) weight
    //   =>  dlogits = (softmax(logits) - onehot(target)) counts weight
    let weight = B::float_mul(counts, weight.clone());
    let softmax = B::float_mul(exponentials, B::float_div(weight.clone(), sum));
    let dlogits = B::float_scatter(1, softmax, indices, B::float_neg(weight), IndexingUpdateOp::Add);
    (B::float_reshape(loss, Shape::new([1, 1])), dlogits, x)
}

/// Σ losses / count, (1).
fn mean<B: Backend>(losses: Vec<FloatTensor<B>>, count: FloatTensor<B>) -> FloatTensor<B> {
    let sum = losses.into_iter().reduce(B::float_add);
    let mean = match sum {
        Some(sum) => B::float_div(sum, count),
        None => count,
    };
    B::float_reshape(mean, Shape::new([1]))
}
