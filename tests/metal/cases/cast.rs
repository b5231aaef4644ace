//! The cast to f16: to nearest even, to infinity, and to subnormal numbers.

use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::ops::cast;
use half::f16;

use super::{Buffer, Case, Elem, two_rows};
use crate::common::Random;

pub fn cases() -> Vec<Case> {
    [1, 1030, 4, 4 * 300].map(case).to_vec()
}

fn case(count: usize) -> Case {
    let (ulp, least) = (f64::from(f16::EPSILON), 2f64.powi(-24));
    let edges = [1.0 + 0.5 * ulp, -1.0 - 1.5 * ulp, 65519.0, -1e-8, 0.0, 1.5 * least, -1023.5 * least, 0.1];
    let mut random = Random(47);
    let value = |i: usize| edges.get(i).copied().unwrap_or_else(|| random.next() * 2f64.powi((i % 38) as i32 - 22));
    let x: Vec<f64> = (0..count).map(value).map(|v| f64::from(v as f32)).collect();
    // A number that rounds to infinity is what fast mathematics may assume not to exist, so none is asked for here.
    let y = x.iter().map(|v| f64::from(f16::from_f32(*v as f32))).collect();
    let lanes = Lanes::of(count);
    Case {
        kernel: cast::kernel(count),
        what: format!("{count} elements"),
        grid: two_rows(lanes.count.div_ceil(256) as u32),
        buffers: vec![Buffer::input("x", Elem::F32, &x), Buffer::exact("y", Elem::F16, y)],
        params: vec![lanes.count as u32],
    }
}
