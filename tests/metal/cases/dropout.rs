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
    [false, true].into_iter().flat_map(|f16| sizes.map(|(rows, columns)| case(rows, columns, f16))).collect()
}

fn case(rows: usize, columns: usize, f16: bool) -> Case {
    let dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc, step: 7, site: 0x105 };
    let (elem, tolerance) = Elem::activation(f16, 1e-6);
    let x = Random(5).of(f16, rows * columns);
    let factors = dropout.factors(rows, columns);
    let want = x.iter().zip(factors).map(|(x, factor)| x * f64::from(factor)).collect();
    let lanes = Lanes::of(columns).count;
    let mut params = vec![rows as u32, lanes as u32];
    params.extend(dropout.params());
    Case {
        kernel: dropout::kernel(columns, f16),
        what: format!("({rows}, {columns})"),
        grid: two_rows((rows * lanes).div_ceil(256) as u32),
        buffers: vec![Buffer::input("x", elem, &x), Buffer::output("y", elem, want, tolerance)],
        params,
    }
}
