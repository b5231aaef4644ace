//! The optimizer: the update in place, the square sums of one gradient among others', the norm and the clip.

use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::ops::adamw::{AdamW, norm_kernel, square_sums_kernel, update_kernel};

use super::{Buffer, Case, Elem, two_rows};
use crate::common::{Random, twins};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for count in [1, 4, 259, 4 * 259] {
        cases.push(update(count));
    }
    // A step of the whole grid, and less than one
    for (count, groups) in [(1, 1), (3001, 2), (4, 1), (4 * 2050, 3)] {
        cases.push(square_sums(count, groups));
    }
    for (count, limit) in [(1, 1.0), (2100, 1.0), (300, 0.0), (7, 1e9)] {
        cases.push(norm(count, limit));
    }
    cases
}

fn update(count: usize) -> Case {
    let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3 };
    let mut random = Random(count as u64 + 1);
    let [p, g, m] = [(); 3].map(|()| random.vec(count));
    let v: Vec<f64> = random.vec(count).iter().map(|v| v.abs()).collect();
    let (mut new_p, mut new_m, mut new_v) = (p.clone(), m.clone(), v.clone());
    twins::adamw(&mut new_p, &g, &mut new_m, &mut new_v, 0.5, hyper);
    let rewritten = |name, before, want| Buffer { before, ..Buffer::output(name, Elem::F32, want, 1e-6) };
    let lanes = Lanes::of(count);
    let mut params = vec![lanes.count as u32];
    params.extend(hyper.factors().map(f32::to_bits));
    Case {
        kernel: update_kernel(lanes),
        what: format!("{count} elements"),
        grid: two_rows(lanes.count.div_ceil(256) as u32),
        buffers: vec![
            rewritten("p", p, new_p),
            Buffer::input("g", Elem::F32, &g),
            rewritten("m", m, new_m),
            rewritten("v", v, new_v),
            Buffer::input("scale", Elem::F32, &[0.5]),
        ],
        params,
    }
}

/// Two places of the buffer belong to another gradient before, one to another behind.
fn square_sums(count: usize, groups: usize) -> Case {
    let g = Random(37).vec(count);
    let lanes = Lanes::of(count);
    let width = count / lanes.count;
    // Lane i belongs to the thread i mod (256 * groups), and so to the group of that thread.
    let mut sums = vec![0.0; groups];
    g.iter().enumerate().for_each(|(i, v)| sums[i / width / 256 % groups] += v * v);
    let others = |count| vec![f64::NAN; count];
    Case {
        kernel: square_sums_kernel(lanes),
        what: format!("{count} elements, {groups} groups"),
        grid: (groups as u32, 1, 1),
        buffers: vec![
            Buffer::input("g", Elem::F32, &g),
            Buffer::output("sums", Elem::F32, [others(2), sums, others(1)].concat(), 1e-5),
        ],
        params: vec![lanes.count as u32, 2],
    }
}

fn norm(count: usize, limit: f64) -> Case {
    let sums: Vec<f64> = Random(41).vec(count).iter().map(|v| v.abs()).collect();
    let norm = sums.iter().sum::<f64>().sqrt();
    let scale = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
    Case {
        kernel: norm_kernel(),
        what: format!("{count} sums, limit {limit}"),
        grid: (1, 1, 1),
        buffers: vec![
            Buffer::input("sums", Elem::F32, &sums),
            Buffer::output("norm", Elem::F32, vec![norm], 1e-6),
            Buffer::output("scale", Elem::F32, vec![scale], 1e-6),
        ],
        params: vec![count as u32, (limit as f32).to_bits()],
    }
}
