//! Layer normalisation: every size of team, ragged and whole.

use gpt_wgpu::kernel::fold;
use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::ops::layer_norm::{WIDTHS, backward_kernel, forward_kernel, sums_kernel};

use super::{Buffer, Case, Elem, two_rows};
use crate::common::{Random, to_half, twins};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for f16 in [false, true] {
        for columns in WIDTHS {
            cases.extend([false, true].map(|bias| forward(3, columns, bias, [f16; 2])));
            if !f16 {
                cases.extend([false, true].map(|bias| forward(3, columns, bias, [false, true])));
            }
            cases.extend([false, true].map(|past| backward(7, columns, 3, f16, past)));
        }
        // One row, and more than the groups of a folded grid take in one step
        cases.push(forward(1, 67, true, [f16; 2]));
        cases.extend([backward(1, 67, 1, f16, true), backward(8, 384, 1, f16, false)]);
    }
    cases.extend([(1, 67), (70, 67), (33, 36)].map(|(rows, columns)| sums(rows, columns)));
    cases
}

/// x, w and b of one shape.
fn inputs(rows: usize, columns: usize, f16: bool) -> [Vec<f64>; 3] {
    let mut random = Random((rows * 31 + columns) as u64);
    // An offset: a variance taken as a difference of squares would lose its bits.
    let round = |v: f64| if f16 { to_half(v) } else { f64::from(v as f32) };
    let x = random.vec(rows * columns).iter().map(|v| round(v * 2.0 + 3.0)).collect();
    [x, random.vec(columns), random.vec(columns)]
}

/// `f16`: of x and of y.
fn forward(rows: usize, columns: usize, bias: bool, f16: [bool; 2]) -> Case {
    let [x, w, b] = inputs(rows, columns, f16[0]);
    let [(elem, _), (y_elem, tolerance)] = f16.map(|f16| Elem::activation(f16, 1e-5));
    let (y, mean, rstd) = twins::layer_norm(&x, &w, bias.then_some(&b[..]), columns);
    let (kernel, group_rows) = forward_kernel(columns, f16, bias);
    Case {
        kernel,
        what: format!("({rows}, {columns})"),
        grid: two_rows(rows.div_ceil(group_rows) as u32),
        buffers: vec![
            Buffer::input("x", elem, &x),
            Buffer::input("w", Elem::F32, &w),
            Buffer::input("b", Elem::F32, if bias { &b } else { &w }),
            Buffer::output("y", y_elem, y, tolerance),
            Buffer::output("mean", Elem::F32, mean, 1e-6),
            Buffer::output("rstd", Elem::F32, rstd, 1e-5),
        ],
        params: vec![rows as u32],
    }
}

/// `groups` workgroups walk over the rows in steps of the whole grid; `has_past`: whether something is added to dx.
fn backward(rows: usize, columns: usize, groups: usize, f16: bool, has_past: bool) -> Case {
    let [x, w, _] = inputs(rows, columns, f16);
    let (elem, tolerance) = Elem::activation(f16, 1e-5);
    let dy = Random(17).of(f16, rows * columns);
    let (_, mean, rstd) = twins::layer_norm(&x, &w, None, columns);
    let [mut dx, _, _] = twins::layer_norm_backward(&dy, &x, &w, columns);
    let past = if has_past { Random(23).of(f16, rows * columns) } else { dy.clone() };
    if has_past {
        dx.iter_mut().zip(&past).for_each(|(dx, past)| *dx += past);
    }
    let (kernel, group_rows) = backward_kernel(columns, f16, has_past);
    // Each group's sums are those of the rows that it walks over.
    let mut partials = Vec::new();
    for group in 0..groups {
        let mine = |row: &usize| row / group_rows % groups == group;
        let pick = |values: &[f64]| -> Vec<f64> {
            (0..rows).filter(mine).flat_map(|row| values[row * columns..][..columns].to_vec()).collect()
        };
        let [_, dw, db] = twins::layer_norm_backward(&pick(&dy), &pick(&x), &w, columns);
        partials.extend([dw, db].concat());
    }
    Case {
        kernel,
        what: format!("({rows}, {columns}), {groups} groups, past: {has_past}"),
        grid: (groups as u32, 1, 1),
        buffers: vec![
            Buffer::input("dy", elem, &dy),
            Buffer::input("x", elem, &x),
            Buffer::input("w", Elem::F32, &w),
            Buffer::input("mean", Elem::F32, &mean),
            Buffer::input("rstd", Elem::F32, &rstd),
            Buffer::input("past", elem, &past),
            Buffer::output("dx", elem, dx, tolerance),
            Buffer::output("partials", Elem::F32, partials, 1e-5),
        ],
        params: vec![rows as u32],
    }
}

fn sums(rows: usize, columns: usize) -> Case {
    let partials = Random(19).vec(rows * 2 * columns);
    let sum = |which: usize| {
        let of = |column: usize| (0..rows).map(|row| partials[(2 * row + which) * columns + column]).sum();
        (0..columns).map(of).collect::<Vec<f64>>()
    };
    let lanes = Lanes::of(columns);
    let groups = (2 * lanes.count).div_ceil(8) as u32;
    Case {
        kernel: sums_kernel(lanes),
        what: format!("{rows} partial sums of {columns}"),
        grid: if rows == 70 { two_rows(groups) } else { fold(groups) },
        buffers: vec![
            Buffer::input("partials", Elem::F32, &partials),
            Buffer::output("dw", Elem::F32, sum(0), 1e-5),
            Buffer::output("db", Elem::F32, sum(1), 1e-5),
        ],
        params: vec![rows as u32, lanes.count as u32],
    }
}
