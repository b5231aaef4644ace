//! The cast to f16: to nearest even, to infinity, and to subnormal numbers; of several tensors at once.

use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::kernel::slots::MOST;
use gpt_wgpu::ops::cast;
use half::f16;

use super::{Buffer, Case, Elem, two_rows};
use crate::common::Random;

pub fn cases() -> Vec<Case> {
    let quads = [8, 4 * 1030, 4, 12, 4 * 300, 4 * 512, 4 * 513];
    let lists = [vec![1], vec![1030], vec![4], vec![4 * 1030]];
    let more = (2..=MOST).map(|slots| quads[..slots].to_vec());
    lists.into_iter().chain(more).map(|counts| case(&counts)).collect()
}

fn case(counts: &[usize]) -> Case {
    let (ulp, least) = (f64::from(f16::EPSILON), 2f64.powi(-24));
    let edges = [1.0 + 0.5 * ulp, -1.0 - 1.5 * ulp, 65519.0, -1e-8, 0.0, 1.5 * least, -1023.5 * least, 0.1];
    let mut random = Random(47);
    let mut buffers = Vec::new();
    for &count in counts {
        let mut value =
            |i: usize| edges.get(i).copied().unwrap_or_else(|| random.next() * 2f64.powi((i % 38) as i32 - 22));
        let x: Vec<f64> = (0..count).map(|i| f64::from(value(i) as f32)).collect();
        // A number that rounds to infinity is what fast mathematics may assume not to exist, so none is asked for here.
        let y = x.iter().map(|v| f64::from(f16::from_f32(*v as f32))).collect();
        buffers.extend([Buffer::input("x", Elem::F32, &x), Buffer::exact("y", Elem::F16, y)]);
    }
    let (params, groups) = cast::kernel().params(counts.iter().map(|&count| (count, 0.0)), 0, &[]);
    Case {
        kernel: cast::kernel().kernel(Lanes::of(counts[0]), counts.len()),
        what: format!("{counts:?} elements"),
        grid: two_rows(groups),
        buffers,
        params,
    }
}
