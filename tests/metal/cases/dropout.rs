//! Dropout on its own.

use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::ops::dropout::{self, Dropout};

use super::{Buffer, Case, Elem, two_rows};
use crate::common::Random;

pub fn cases() -> Vec<Case> {
    let mut cases = shapes();
    let others: Vec<_> = cases.iter().skip(1).cloned().map(Case::with_int64).collect();
    cases.extend(others);
    cases
}

fn shapes() -> Vec<Case> {
    let sizes = [(1, 1), (7, 67), (33, 128)];
    let types = [([false; 2], true), ([true; 2], true), ([false, true], true), ([false, true], false)];
    let cases = |(f16, drops)| sizes.map(|(rows, columns)| case(rows, columns, f16, drops));
    types.into_iter().flat_map(cases).collect()
}

/// `f16`: of x and of y, which is held where they differ.
fn case(rows: usize, columns: usize, f16: [bool; 2], drops: bool) -> Case {
    let dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc, step: 7, site: 0x105 };
    let dropout = if drops { dropout } else { Dropout::OFF };
    let [(elem, _), (y_elem, tolerance)] = f16.map(|f16| Elem::activation(f16, 1e-6));
    let x = Random(5).of(f16[0], rows * columns);
    let held = if f16[0] == f16[1] { 1.0f32 } else { 64.0 };
    let factors = dropout.factors(rows, columns);
    let want = x.iter().zip(factors).map(|(x, factor)| x * f64::from(factor * held)).collect();
    let lanes = Lanes::of(columns).count;
    let mut params = vec![rows as u32, lanes as u32];
    params.extend(dropout.params());
    params.push(held.to_bits());
    Case {
        kernel: dropout::kernel(columns, f16, drops),
        what: format!("({rows}, {columns}), held {held}"),
        grid: two_rows((rows * lanes).div_ceil(256) as u32),
        buffers: vec![Buffer::input("x", elem, &x), Buffer::output("y", y_elem, want, tolerance)],
        params,
    }
}
