//! The optimizer: the update in place, made or not, and the square sums of one gradient among others'.

use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::ops::adamw::{AdamW, square_sums_kernel, update_kernel};

use super::{Buffer, Case, Elem, two_rows};
use crate::common::{Random, twins};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for count in [1, 4, 259, 4 * 259] {
        cases.extend([true, false].map(|applied| update(count, applied)));
    }
    // A step of the whole grid, and less than one
    for (count, groups) in [(1, 1), (3001, 2), (4, 1), (4 * 2050, 3)] {
        cases.push(square_sums(count, groups));
    }
    cases
}

/// Where it is not `applied`, nothing may be touched, and the gradient may be anything.
fn update(count: usize, applied: bool) -> Case {
    let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut random = Random(count as u64 + 1);
    let [p, mut g, m] = [(); 3].map(|()| random.vec(count));
    let v: Vec<f64> = random.vec(count).iter().map(|v| v.abs()).collect();
    let (mut new_p, mut new_m, mut new_v) = (p.clone(), m.clone(), v.clone());
    let mut verdict = twins::verdict(0.5, hyper, 3);
    if applied {
        twins::adamw(&mut new_p, &g, &mut new_m, &mut new_v, 0.5, hyper, 3);
    } else {
        verdict[1] = 0.0;
        g[count - 1] = f64::NAN;
        [&mut new_p, &mut new_m, &mut new_v].into_iter().for_each(|values| values.fill(f64::NAN));
    }
    let rewritten = |name, before, want| Buffer { before, ..Buffer::output(name, Elem::F32, want, 1e-6) };
    let lanes = Lanes::of(count);
    let mut params = vec![lanes.count as u32];
    params.extend(hyper.factors().map(f32::to_bits));
    Case {
        kernel: update_kernel(lanes),
        what: format!("{count} elements, applied: {applied}"),
        grid: two_rows(lanes.count.div_ceil(256) as u32),
        buffers: vec![
            rewritten("p", p, new_p),
            Buffer::input("g", Elem::F32, &g),
            rewritten("m", m, new_m),
            rewritten("v", v, new_v),
            Buffer::input("verdict", Elem::F32, &verdict),
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
