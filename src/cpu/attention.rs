//! Causal attention, head by head and a block of queries at a time: the scores of a block stay in the cache, and the future's are
//! not made.

use std::mem::MaybeUninit;

use rayon::iter::IndexedParallelIterator;
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::math::{exp, max, sum};
use super::product::{Matrix, MatrixMut, Strips, product_alone};
use super::{each, filled, wide};
use crate::ops::dropout::Dropout;

/// Queries of a block.
pub const BLOCK: usize = 64;

/// Sizes of one call.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub time: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl Sizes {
    fn channels(self) -> usize {
        self.heads * self.head_dim
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// What all heads' scores come to, for the choice of threads.
    fn scores(self) -> usize {
        self.batch * self.heads * self.time * self.time
    }

    /// Where a head's part of a packed row of `thirds` · C elements begins, in the `third`.
    fn first(self, head: usize, thirds: usize, third: usize) -> usize {
        let (sequence, head) = (head / self.heads, head % self.heads);
        sequence * self.time * thirds * self.channels() + third * self.channels() + head * self.head_dim
    }

    /// (T, D) of one head in `packed` (B, T, thirds · C).
    fn head<'a>(self, packed: &'a [f32], head: usize, thirds: usize, third: usize) -> Matrix<'a> {
        let first = self.first(head, thirds, third);
        Matrix::new(&packed[first..], self.time, self.head_dim, thirds * self.channels())
    }

    /// `count` rows from `row` on of one head in a tensor (B, T, thirds · C).
    ///
    /// # Safety
    /// No two threads handle the same head.
    unsafe fn part<'a>(
        self,
        packed: &'a Strips,
        head: usize,
        (thirds, third): (usize, usize),
        row: usize,
        count: usize,
    ) -> MatrixMut<'a> {
        let stride = thirds * self.channels();
        // SAFETY: heads are disjoint, and what the caller promises.
        unsafe { packed.matrix(self.first(head, thirds, third) + row * stride, count, self.head_dim, stride) }
    }
}

/// qkv (B, T, 3C) -> (out (B, T, C), lse (B, H, T)).
pub fn forward(qkv: &[f32], sizes: Sizes, dropout: Dropout) -> (Vec<f32>, Vec<f32>) {
    let Sizes { batch, time, heads, .. } = sizes;
    let mut lse = vec![0.0; batch * heads * time];
    let fill = |out: &mut [MaybeUninit<f32>]| forward_into(Strips::room(out), &mut lse, qkv, sizes, dropout);
    // SAFETY: every head's columns of every row are a product.
    let out = unsafe { filled(batch * time * sizes.channels(), fill) };
    (out, lse)
}

fn forward_into(out: Strips, lse: &mut [f32], qkv: &[f32], sizes: Sizes, dropout: Dropout) {
    let time = sizes.time;
    each(lse.par_chunks_mut(time).enumerate(), sizes.scores(), |(head, lse)| {
        let [q, k, v] = [0, 1, 2].map(|third| sizes.head(qkv, head, 3, third));
        let mut scores = vec![0.0; BLOCK.min(time) * time];
        for first in (0..time).step_by(BLOCK) {
            let queries = BLOCK.min(time - first);
            let keys = first + queries;
            let scores = &mut scores[..queries * keys];
            product_alone(q.rows(first, queries), k.rows(0, keys).t(), MatrixMut::dense(scores, queries, keys), false);
            for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                let query = first + i;
                wide(
                    #[inline(always)]
                    || {
                        let (past, future) = row.split_at_mut(query + 1);
                        lse[query] = softmax(past, sizes.scale());
                        future.fill(0.0);
                        if dropout.is_on() {
                            dropout.multiply_row((head * time + query) as u32, past);
                        }
                    },
                );
            }
            // SAFETY: every task has a head of its own.
            let out = unsafe { sizes.part(&out, head, (1, 0), first, queries) };
            product_alone(Matrix::dense(scores, queries, keys), v.rows(0, keys), out, false);
        }
    });
}

/// row = softmax(row · scale); returns the logarithm of its sum of exponentials.
#[inline(always)]
fn softmax(row: &mut [f32], scale: f32) -> f32 {
    let largest = max(row);
    for score in row.iter_mut() {
        *score = exp((*score - largest) * scale);
    }
    let total = sum([row], |[score]| score);
    let factor = 1.0 / total;
    for score in row.iter_mut() {
        *score *= factor;
    }
    largest * scale + total.ln()
}

/// What the backward reads.
pub struct Backward<'a> {
    /// (B, T, C).
    pub dout: &'a [f32],
    /// (B, T, 3C).
    pub qkv: &'a [f32],
    /// (B, T, C).
    pub out: &'a [f32],
    /// (B, H, T).
    pub lse: &'a [f32],
}

/// -> dqkv (B, T, 3C).
pub fn backward(given: Backward, sizes: Sizes, dropout: Dropout) -> Vec<f32> {
    // SAFETY: every head's columns of every row of each third are a product: the last block of queries has all keys.
    unsafe { filled(given.qkv.len(), |dqkv| backward_into(Strips::room(dqkv), given, sizes, dropout)) }
}

fn backward_into(dqkv: Strips, given: Backward, sizes: Sizes, dropout: Dropout) {
    let Sizes { time, head_dim, .. } = sizes;
    let Backward { dout, qkv, out, lse } = given;
    each(lse.par_chunks(time).enumerate(), 2 * sizes.scores(), |(head, lse)| {
        let [q, k, v] = [0, 1, 2].map(|third| sizes.head(qkv, head, 3, third));
        let douts = sizes.head(dout, head, 1, 0);
        let first_row = sizes.first(head, 1, 0);
        let mut p = vec![0.0; BLOCK.min(time) * time];
        let mut ds = vec![0.0; BLOCK.min(time) * time];
        let mut kept = vec![0.0; if dropout.is_on() { BLOCK.min(time) * time } else { 0 }];
        // From the last block on: its products with all keys are what the others are added to.
        for first in (0..time).step_by(BLOCK).rev() {
            let queries = BLOCK.min(time - first);
            let keys = first + queries;
            let add = keys < time;
            let (p, ds) = (&mut p[..queries * keys], &mut ds[..queries * keys]);
            let (q, dout_rows) = (q.rows(first, queries), douts.rows(first, queries));
            let (k, v) = (k.rows(0, keys), v.rows(0, keys));
            product_alone(q, k.t(), MatrixMut::dense(p, queries, keys), false);
            product_alone(dout_rows, v.t(), MatrixMut::dense(ds, queries, keys), false);
            for i in 0..queries {
                let query = first + i;
                let here = i * keys..(i + 1) * keys;
                let (p, ds) = (&mut p[here.clone()], &mut ds[here.clone()]);
                let at = first_row + query * sizes.channels();
                let (dout, out) = (&dout[at..at + head_dim], &out[at..at + head_dim]);
                wide(
                    #[inline(always)]
                    || {
                        let (past, future) = p.split_at_mut(query + 1);
                        future.fill(0.0);
                        let (dpast, dfuture) = ds.split_at_mut(query + 1);
                        dfuture.fill(0.0);
                        for score in past.iter_mut() {
                            *score = exp(*score * sizes.scale() - lse[query]);
                        }
                        if dropout.is_on() {
                            // kept = mask p  =>  dp = mask dkept
                            let (row, kept) = ((head * time + query) as u32, &mut kept[here]);
                            kept.fill(1.0);
                            dropout.multiply_row(row, &mut kept[..=query]);
                            for ((d, factor), p) in dpast.iter_mut().zip(kept.iter_mut()).zip(past.iter()) {
                                *d *= *factor;
                                *factor *= p;
                            }
                            kept[query + 1..].fill(0.0);
                        }
                        // p = softmax(s)  =>  ds = p (dp - Σ dp p), and Σ dp p = Σ dout out
                        let delta = sum([dout, out], |[dout, out]| dout * out);
                        for (d, p) in dpast.iter_mut().zip(past) {
                            *d = *p * (*d - delta) * sizes.scale();
                        }
                    },
                );
            }
            // out = kept v  =>  dv = keptᵀ dout; s = q kᵀ / √D  =>  dq = ds k / √D, dk = dsᵀ q / √D
            let kept = Matrix::dense(if dropout.is_on() { &kept[..queries * keys] } else { p }, queries, keys);
            let ds = Matrix::dense(ds, queries, keys);
            // SAFETY: every task has a head of its own, and each matrix ends with its product.
            let part = |third, row, count| unsafe { sizes.part(&dqkv, head, (3, third), row, count) };
            product_alone(ds, k, part(0, first, queries), false);
            product_alone(ds.t(), q, part(1, 0, keys), add);
            product_alone(kept.t(), dout_rows, part(2, 0, keys), add);
        }
    });
}
