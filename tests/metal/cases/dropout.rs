//! Dropout on its own.

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
    let dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc, step: 7, site: 0x105 };
    [(1, 1), (7, 67), (33, 128)]
        .into_iter()
        .map(|(rows, columns)| {
            let x = Random(5).vec(rows * columns);
            let factors = dropout.factors(rows, columns);
            let want = x.iter().zip(factors).map(|(x, factor)| x * f64::from(factor)).collect();
            let mut params = vec![rows as u32, columns as u32];
            params.extend(dropout.params());
            Case {
                kernel: dropout::kernel(columns),
                what: format!("({rows}, {columns})"),
                grid: two_rows((rows * columns.div_ceil(4)).div_ceil(256) as u32),
                buffers: vec![Buffer::input("x", Elem::F32, &x), Buffer::output("y", Elem::F32, want, 1e-6)],
                params,
            }
        })
        .collect()
}
