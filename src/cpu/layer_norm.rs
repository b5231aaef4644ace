//! Layer normalisation of rows.

use std::mem::MaybeUninit;

use rayon::iter::IndexedParallelIterator;
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::math::sum;
use super::{BLOCK_ROWS, add_blocks, each, filled, wide};
use crate::ops::layer_norm::EPSILON;

/// x (rows, C), w (C), b (C) -> (y (rows, C), mean (rows), rstd (rows)).
pub fn forward(x: &[f32], w: &[f32], b: Option<&[f32]>) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let columns = w.len();
    let rows = x.len() / columns;
    assert!(x.len() == rows * columns && b.is_none_or(|b| b.len() == columns), "sizes that do not fit");
    let (mut mean, mut rstd) = (vec![0.0; rows], vec![0.0; rows]);
    let block = BLOCK_ROWS * columns;
    let numbers = mean.par_chunks_mut(BLOCK_ROWS).zip(rstd.par_chunks_mut(BLOCK_ROWS));
    let fill = |y: &mut [MaybeUninit<f32>]| {
        each(y.par_chunks_mut(block).zip(x.par_chunks(block)).zip(numbers), x.len(), |((y, x), (mean, rstd))| {
            let rows = y.chunks_exact_mut(columns).zip(x.chunks_exact(columns)).zip(mean.iter_mut().zip(rstd));
            for ((y, x), (mean, rstd)) in rows {
                wide(
                    #[inline(always)]
                    || (*mean, *rstd) = forward_row(y, x, w, b),
                );
            }
        });
    };
    // SAFETY: y and x have one length, and so have their blocks and rows.
    let y = unsafe { filled(x.len(), fill) };
    (y, mean, rstd)
}

/// Writes all of y: as long as x and w, and b where there is one.
#[inline(always)]
fn forward_row(y: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], b: Option<&[f32]>) -> (f32, f32) {
    let columns = x.len() as f32;
    let mean = sum([x], |[x]| x) / columns;
    let variance = sum([x], |[x]| (x - mean) * (x - mean)) / columns;
    let rstd = 1.0 / (variance + EPSILON as f32).sqrt();
    match b {
        Some(b) => {
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                y.write((x - mean) * rstd * w + b);
            }
        }
        None => {
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                y.write((x - mean) * rstd * w);
            }
        }
    }
    (mean, rstd)
}

/// What the backward reads.
pub struct Backward<'a> {
    /// (rows, C).
    pub dy: &'a [f32],
    /// (rows, C).
    pub x: &'a [f32],
    /// (C).
    pub w: &'a [f32],
    /// (rows).
    pub mean: &'a [f32],
    /// (rows).
    pub rstd: &'a [f32],
    /// (rows, C), added to dx.
    pub past: Option<&'a [f32]>,
}

/// -> (dx (rows, C), dw (C), db (C)).
pub fn backward(given: Backward) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Backward { dy, x, w, mean, rstd, past } = given;
    let columns = w.len();
    let block = BLOCK_ROWS * columns;
    let mut dx = match past {
        Some(past) => past.to_vec(),
        None => vec![0.0; x.len()],
    };
    // dw and db of a block, side by side
    let mut sums = vec![0.0; x.len().div_ceil(block) * 2 * columns];
    let parts = dx.par_chunks_mut(block).zip(sums.par_chunks_mut(2 * columns)).enumerate();
    each(parts, x.len(), |(i, (dx, sums))| {
        let (dw, db) = sums.split_at_mut(columns);
        for (j, dx) in dx.chunks_exact_mut(columns).enumerate() {
            let row = i * BLOCK_ROWS + j;
            let here = row * columns..(row + 1) * columns;
            let (dy, x) = (&dy[here.clone()], &x[here]);
            let numbers = (mean[row], rstd[row]);
            wide(
                #[inline(always)]
                || backward_row(dx, [dw, db], dy, x, w, numbers),
            );
        }
    });
    let sums = add_blocks(&sums, 2 * columns);
    (dx, sums[..columns].to_vec(), sums[columns..].to_vec())
}

/// Adds to dx, dw and db what one row gives.
#[inline(always)]
fn backward_row(dx: &mut [f32], [dw, db]: [&mut [f32]; 2], dy: &[f32], x: &[f32], w: &[f32], (mean, rstd): (f32, f32)) {
    let columns = dx.len();
    let (dw, db, dy, x, w) = (&mut dw[..columns], &mut db[..columns], &dy[..columns], &x[..columns], &w[..columns]);
    // normed = (x - mean) rstd  =>  dx = rstd (dnormed - mean(dnormed) - normed · mean(dnormed · normed))
    let average = sum([dy, w], |[dy, w]| dy * w) / columns as f32;
    let along = sum([dy, w, x], |[dy, w, x]| dy * w * ((x - mean) * rstd)) / columns as f32;
    for i in 0..columns {
        let normed = (x[i] - mean) * rstd;
        dw[i] += dy[i] * normed;
        db[i] += dy[i];
        dx[i] += rstd * ((dy[i] * w[i] - average) - normed * along);
    }
}
