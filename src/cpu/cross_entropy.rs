//! The head and the loss, a chunk of the logits at a time.

use rayon::iter::IndexedParallelIterator;
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::math::{exp, max, sum};
use super::product::{Matrix, MatrixMut, product};
use super::{each, wide};

/// Logits that exist together, at most: 8 MiB, what a cache may hold between the products.
const CHUNK_ELEMENTS: usize = 2 << 20;

/// Fewest rows of a chunk: every chunk adds to all of dw.
const FEWEST_ROWS: usize = 256;

/// The mean loss of the logits x wᵀ, and where gradients are wanted, times a scale, [dx (rows, C), dw (V, C)]: x (rows, C), w (V, C),
/// targets (rows), negative ones not counted.
pub fn loss(
    x: &[f32],
    w: &[f32],
    targets: &[i64],
    channels: usize,
    scale: Option<f32>,
) -> (f32, Option<[Vec<f32>; 2]>) {
    let vocab = w.len() / channels;
    let weights = Matrix::dense(w, vocab, channels);
    let count = targets.iter().filter(|target| **target >= 0).count().max(1) as f32;
    let mut gradients = scale.map(|_| [vec![0.0; x.len()], vec![0.0; w.len()]]);
    let chunk = (CHUNK_ELEMENTS / vocab).max(FEWEST_ROWS).min(targets.len());
    let mut logits = vec![0.0; chunk * vocab];
    let mut losses = vec![0.0; targets.len()];
    for first in (0..targets.len()).step_by(chunk) {
        let rows = first..(first + chunk).min(targets.len());
        let here = rows.len();
        let channel_range = rows.start * channels..rows.end * channels;
        let logits = &mut logits[..here * vocab];
        let x = Matrix::dense(&x[channel_range.clone()], here, channels);
        product(x, weights.t(), MatrixMut::dense(logits, here, vocab), false);
        let weight = scale.map(|scale| scale / count);
        let parts =
            logits.par_chunks_mut(vocab).zip(losses[rows.clone()].par_chunks_mut(1)).zip(targets[rows].par_chunks(1));
        each(parts, here * vocab, |((logits, loss), target)| {
            wide(
                #[inline(always)]
                || loss[0] = row(logits, target[0], weight),
            );
        });
        if let Some([dx, dw]) = &mut gradients {
            // logits = x wᵀ  =>  dx = dlogits w, dw = Σ dlogitsᵀ x
            let dlogits = Matrix::dense(logits, here, vocab);
            product(dlogits, weights, MatrixMut::dense(&mut dx[channel_range], here, channels), false);
            product(dlogits.t(), x, MatrixMut::dense(dw, vocab, channels), first > 0);
        }
    }
    let sum: f64 = losses.into_iter().map(f64::from).sum();
    ((sum / f64::from(count)) as f32, gradients)
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
