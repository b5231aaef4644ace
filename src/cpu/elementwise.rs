//! Passes that treat each element by itself, and AdamW's sums of squares.

use std::mem::MaybeUninit;

use rayon::iter::IndexedParallelIterator;
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::math::{gelu, gelu_slope, sum};
use super::{BLOCK_ROWS, PART, add_blocks, each, filled, wide};
use crate::ops::adamw::AdamW;
use crate::ops::dropout::Dropout;
use crate::ops::linear::Gelu;
use crate::ops::verdict::VERDICT;

/// gelu(h) of every element.
pub fn gelu_of(h: &[f32], kind: Gelu) -> Vec<f32> {
    let fill = |y: &mut [MaybeUninit<f32>]| {
        each(y.par_chunks_mut(PART).zip(h.par_chunks(PART)), h.len(), |(y, h)| {
            wide(
                #[inline(always)]
                || {
                    for (y, h) in y.iter_mut().zip(h) {
                        y.write(gelu(*h, kind));
                    }
                },
            );
        });
    };
    // SAFETY: y and h have one length, and so have their parts.
    unsafe { filled(h.len(), fill) }
}

/// d = d · gelu'(h).
pub fn times_gelu_slope(d: &mut [f32], h: &[f32], kind: Gelu) {
    each(d.par_chunks_mut(PART).zip(h.par_chunks(PART)), h.len(), |(d, h)| {
        wide(
            #[inline(always)]
            || {
                for (d, h) in d.iter_mut().zip(h) {
                    *d *= gelu_slope(*h, kind);
                }
            },
        );
    });
}

/// The sums of the columns of x (rows, columns).
pub fn column_sums(x: &[f32], columns: usize) -> Vec<f32> {
    let block = BLOCK_ROWS * columns;
    let mut sums = vec![0.0; x.len().div_ceil(block) * columns];
    each(sums.par_chunks_mut(columns).zip(x.par_chunks(block)), x.len(), |(sums, x)| {
        sums.copy_from_slice(&add_blocks(x, columns));
    });
    add_blocks(&sums, columns)
}

/// Every row of y = bias (columns).
pub fn repeat(bias: &[f32], rows: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(rows * bias.len());
    for _ in 0..rows {
        y.extend_from_slice(bias);
    }
    y
}

/// x (rows, columns) = x · mask.
pub fn mask(x: &mut [f32], columns: usize, dropout: Dropout) {
    let elements = x.len();
    each(x.par_chunks_mut(columns).enumerate(), elements, |(row, x)| {
        wide(
            #[inline(always)]
            || dropout.multiply_row(row as u32, x),
        );
    });
}

/// y (rows, columns) = residual + y · mask.
pub fn drop_and_add(y: &mut [f32], residual: &[f32], columns: usize, dropout: Dropout) {
    let parts = y.par_chunks_mut(columns).zip(residual.par_chunks(columns)).enumerate();
    each(parts, residual.len(), |(row, (y, residual))| {
        wide(
            #[inline(always)]
            || {
                if dropout.is_on() {
                    dropout.multiply_row(row as u32, y);
                }
                for (y, residual) in y.iter_mut().zip(residual) {
                    *y += residual;
                }
            },
        );
    });
}

/// Σ g² over slices: parts in f32, their sum in f64.
pub fn square_sum(g: &[f32]) -> f32 {
    let part = |g: &[f32]| {
        wide(
            #[inline(always)]
            || sum([g], |[g]| g * g),
        )
    };
    let parts: Vec<f32> = g.chunks(PART).map(part).collect();
    parts.into_iter().map(f64::from).sum::<f64>() as f32
}

/// One parameter of an update: p, m, v are rewritten.
pub struct Update<'a> {
    /// Value.
    pub p: &'a mut [f32],
    /// Gradient.
    pub g: &'a [f32],
    /// First moment.
    pub m: &'a mut [f32],
    /// Second moment.
    pub v: &'a mut [f32],
    /// Whether it decays.
    pub decays: bool,
}

/// AdamW's update by a verdict's words (factor, _, rate, root_factor, keep).
pub fn adamw(update: Update, [factor, _, rate, root_factor, keep]: [f32; VERDICT], hyper: AdamW) {
    let [beta1, rest1, beta2, rest2, eps] = hyper.factors();
    let keep = if update.decays { keep } else { 1.0 };
    let Update { p, g, m, v, .. } = update;
    let elements = g.len();
    let moments = m.par_chunks_mut(PART).zip(v.par_chunks_mut(PART));
    each(p.par_chunks_mut(PART).zip(g.par_chunks(PART)).zip(moments), elements, |((p, g), (m, v))| {
        wide(
            #[inline(always)]
            || {
                for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
                    let g = g * factor;
                    *m = *m * beta1 + g * rest1;
                    *v = *v * beta2 + g * g * rest2;
                    *p = *p * keep - rate * *m / (v.sqrt() * root_factor + eps);
                }
            },
        );
    });
}
