//! The loss: how many targets count, a chunk of rows of losses with their gradient, the mean.

use gpt_wgpu::ops::cross_entropy::{Gradient, IGNORED, count_kernel, logits_stride, mean_kernel, rows_kernel};

use super::{Buffer, Case, Elem, two_rows};
use crate::common::{Random, to_half, twins};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for rows in [1, 300] {
        cases.extend([count(rows, false, None), count(rows, true, Some(1024.0)), count(rows, false, Some(1024.0))]);
        cases.push(mean(rows));
    }
    use Gradient::{Held, Unwanted, Whole};
    for (gradient, f16) in [(Unwanted, false), (Whole, false), (Unwanted, true), (Whole, true), (Held, false)] {
        // Fewer quads than threads; a row of padding but for one column; more quads than threads, and more octs
        let mut sizes = vec![(5, 67, 1), (1, 1, 0), (3, 1091, 2)];
        if gradient == Held {
            sizes.push((2, 4115, 0));
        }
        cases.extend(sizes.into_iter().map(|(rows, vocab, first)| chunk(rows, vocab, first, gradient, f16)));
    }
    cases
}

fn targets(values: &[i32]) -> Buffer {
    Buffer::input("targets", Elem::Int, &values.iter().map(|&t| f64::from(t)).collect::<Vec<_>>())
}

/// With a loss scale, in front of a number that is none of this kernel's business, or without.
fn count(rows: usize, all_ignored: bool, scale: Option<f64>) -> Case {
    let values: Vec<i32> = (0..rows).map(|i| if all_ignored || i % 3 == 1 { IGNORED } else { i as i32 }).collect();
    let count = values.iter().filter(|&&t| t >= 0).count().max(1) as f64;
    let weight = scale.unwrap_or(1.0) / count;
    Case {
        kernel: count_kernel(),
        what: format!("{rows} rows, all ignored: {all_ignored}, scale {scale:?}"),
        grid: (1, 1, 1),
        buffers: vec![
            targets(&values),
            Buffer::input("scale", Elem::F32, &[scale.unwrap_or(f64::NAN), f64::NAN]),
            Buffer::output("count", Elem::F32, vec![count, weight], 1e-6),
        ],
        params: [rows, usize::from(scale.is_some())].map(|word| word as u32).to_vec(),
    }
}

fn mean(rows: usize) -> Case {
    let losses = Random(43).vec(rows);
    let mean = losses.iter().sum::<f64>() / 7.0;
    Case {
        kernel: mean_kernel(),
        what: format!("{rows} rows"),
        grid: (1, 1, 1),
        buffers: vec![
            Buffer::input("losses", Elem::F32, &losses),
            Buffer::input("count", Elem::F32, &[7.0, f64::NAN]),
            Buffer::output("loss", Elem::F32, vec![mean], 1e-5),
        ],
        params: vec![rows as u32],
    }
}

/// `rows` rows that follow `first` others, with one more behind.
fn chunk(rows: usize, vocab: usize, first: usize, gradient: Gradient, f16: bool) -> Case {
    const WEIGHT: f64 = 85.25;
    const HELD: f32 = 4.0; // 1 where the gradient is whole, for which the kernel does not care
    let (elem, tolerance) = Elem::activation(f16, 1e-5);
    let stride = logits_stride(vocab);
    let mut random = Random(vocab as u64);
    // Large logits: exponentials without a maximum taken off would overflow.
    let large = |v: &f64| if f16 { to_half(v * 60.0 + 50.0) } else { f64::from((v * 60.0 + 50.0) as f32) };
    let logits: Vec<f64> = random.vec(rows * vocab).iter().map(large).collect();
    let all = first + rows + 1;
    // Of the last columns too; the chunk's second row is ignored
    let mut values: Vec<i32> = (0..all).map(|_| random.below(vocab) as i32).collect();
    values[first] = vocab as i32 - 1;
    if rows > 1 {
        values[first + 1] = IGNORED;
    }
    let (mut losses, mut slopes) = (vec![f64::NAN; all], Vec::new());
    for (row, logits) in logits.chunks(vocab).enumerate() {
        let (loss, slope) = twins::row_of_cross_entropy(logits, values[first + row]);
        losses[first + row] = loss;
        slopes.extend(slope.iter().map(|v| v * WEIGHT * f64::from(HELD)));
        slopes.extend(vec![0.0; stride - vocab]);
    }
    let before: Vec<f64> = logits
        .chunks(vocab)
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(f64::NAN, stride - vocab)))
        .collect();
    let logits = match gradient {
        Gradient::Unwanted => Buffer::input("logits", elem, &before),
        Gradient::Whole => Buffer { before, ..Buffer::output("logits", elem, slopes, tolerance) },
        Gradient::Held => {
            // In f16 they fill half of a row; what is left of it may be anything.
            let want = slopes.chunks(stride).flat_map(|row| [row, &vec![f64::INFINITY; stride]].concat()).collect();
            Buffer { before, ..Buffer::output("logits", Elem::F32ThenF16, want, 1e-3) }
        }
    };
    Case {
        kernel: rows_kernel(gradient, f16),
        what: format!("({rows}, {vocab})"),
        grid: two_rows(rows as u32),
        buffers: vec![
            logits,
            targets(&values),
            Buffer::output("losses", Elem::F32, losses, 1e-5),
            Buffer::input("count", Elem::F32, &[f64::NAN, WEIGHT]),
        ],
        params: [[rows, vocab, stride, first].map(|size| size as u32).as_slice(), &[HELD.to_bits()]].concat(),
    }
}
