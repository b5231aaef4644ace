//! The head and the loss, a chunk of the logits at a time.

use std::ops::Range;

use rayon::iter::IndexedParallelIterator;
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::math::{exp, max, sum};
use super::product::{Matrix, MatrixMut, product};
use super::{each, wide};

/// Logits that exist together, at most: 8 MiB, what a cache may hold between the products.
const CHUNK_ELEMENTS: usize = 2 << 20;

/// Fewest rows of a chunk: every chunk adds to all of dw.
const FEWEST_ROWS: usize = 256;

/// Rows whose logits exist together, of `rows` in all.
pub fn chunk_rows(rows: usize, vocab: usize) -> usize {
    (CHUNK_ELEMENTS / vocab).max(FEWEST_ROWS).min(rows)
}

/// What the loss is of.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    /// (rows, C).
    pub x: &'a [f32],
    /// (V, C).
    pub w: &'a [f32],
    /// (rows); negative ones are not counted.
    pub targets: &'a [i64],
    /// C.
    pub channels: usize,
}

impl<'a> Given<'a> {
    fn vocab(&self) -> usize {
        self.w.len() / self.channels
    }

    fn weights(&self) -> Matrix<'a> {
        Matrix::dense(self.w, self.vocab(), self.channels)
    }

    fn rows(&self, range: &Range<usize>) -> Matrix<'a> {
        Matrix::dense(&self.x[range.start * self.channels..], range.len(), self.channels)
    }

    /// How many targets count, at least 1.
    fn count(&self) -> f32 {
        self.targets.iter().filter(|target| **target >= 0).count().max(1) as f32
    }
}

/// The mean loss of the logits x wᵀ.
pub fn loss(given: Given) -> f32 {
    by_chunks(given, None, |_, _| ())
}

/// The mean loss, and its gradients times `scale`: dx (rows, C), dw (V, C).
pub fn loss_and_gradients(given: Given, scale: f32) -> (f32, [Vec<f32>; 2]) {
    let (vocab, channels, weights) = (given.vocab(), given.channels, given.weights());
    let [mut dx, mut dw] = [vec![0.0; given.x.len()], vec![0.0; given.w.len()]];
    let loss = by_chunks(given, Some(scale / given.count()), |rows, dlogits| {
        // logits = x wᵀ  =>  dx = dlogits w, dw = Σ dlogitsᵀ x
        let dlogits = Matrix::dense(dlogits, rows.len(), vocab);
        let dx = &mut dx[rows.start * channels..rows.end * channels];
        product(dlogits, weights, MatrixMut::dense(dx, rows.len(), channels), false);
        product(dlogits.t(), given.rows(&rows), MatrixMut::dense(&mut dw, vocab, channels), rows.start > 0);
    });
    (loss, [dx, dw])
}

/// The mean loss. Hands each chunk's rows to `and_then` with its logits, or their gradients where a target weighs `weight`.
fn by_chunks(given: Given, weight: Option<f32>, mut and_then: impl FnMut(Range<usize>, &[f32])) -> f32 {
    let (targets, vocab) = (given.targets, given.vocab());
    let chunk = chunk_rows(targets.len(), vocab);
    let mut logits = vec![0.0; chunk * vocab];
    let mut losses = vec![0.0; targets.len()];
    for first in (0..targets.len()).step_by(chunk) {
        let rows = first..(first + chunk).min(targets.len());
        let logits = &mut logits[..rows.len() * vocab];
        product(given.rows(&rows), given.weights().t(), MatrixMut::dense(logits, rows.len(), vocab), false);
        let losses = losses[rows.clone()].par_chunks_mut(1);
        let parts = logits.par_chunks_mut(vocab).zip(losses).zip(targets[rows.clone()].par_chunks(1));
        each(parts, rows.len() * vocab, |((logits, loss), target)| {
            wide(
                #[inline(always)]
                || loss[0] = row(logits, target[0], weight),
            );
        });
        and_then(rows, logits);
    }
    let sum: f64 = losses.into_iter().map(f64::from).sum();
    (sum / f64::from(given.count())) as f32
}

/// One row's loss; its logits become their gradient where a `weight` is given.
#[inline(always)]
fn row(logits: &mut [f32], target: i64, weight: Option<f32>) -> f32 {
    if target < 0 {
        logits.fill(0.0);
        return 0.0;
    }
    let largest = max(logits);
    let target = target as usize;
    // A target outside of the vocabulary has no loss: the step is skipped, as with any loss that is no number.
    let own = logits.get(target).map_or(f32::NAN, |logit| logit - largest);
    for logit in logits.iter_mut() {
        *logit = exp(*logit - largest);
    }
    let total = sum([logits], |[logit]| logit);
    if let Some(weight) = weight {
        let factor = weight / total;
        for logit in logits.iter_mut() {
            *logit *= factor;
        }
        if let Some(logit) = logits.get_mut(target) {
            *logit -= weight;
        }
    }
    total.ln() - own
}
