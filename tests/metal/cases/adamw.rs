//! The optimizer: updates in place, made or not, and the square sums of gradients among those of other launches; several at once.

use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::kernel::slots::MOST;
use gpt_wgpu::ops::adamw::{AdamW, square_sums_kernel, update_kernel};

use super::{Buffer, Case, Elem, two_rows};
use crate::common::twins::AdamWStep;
use crate::common::{Random, twins};

pub fn cases() -> Vec<Case> {
    // One element, less than a workgroup's share of lanes, and more
    let mut lists: Vec<Vec<usize>> = [1, 515, 4, 4 * 515].map(|count| vec![count]).into();
    let quads = [8, 4 * 515, 4, 4 * 257, 4 * 1030, 12, 4 * 512];
    lists.extend((2..=MOST).map(|slots| quads[..slots].to_vec()));
    let cases = |counts: &Vec<usize>| [update(counts, true), update(counts, false), square_sums(counts)];
    lists.iter().flat_map(cases).collect()
}

/// Every second parameter decays. Where it is not `applied`, nothing may be touched, and the gradients may be anything.
fn update(counts: &[usize], applied: bool) -> Case {
    let hyper = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
    let step = AdamWStep { lr: 1e-2, weight_decay: 0.1, hyper };
    let mut verdict = twins::verdict(0.5, step, 3);
    if !applied {
        verdict[1] = 0.0;
    }
    let decays = |i: usize| i % 2 == 1;
    let mut buffers = Vec::new();
    for (i, &count) in counts.iter().enumerate() {
        let mut random = Random((count + i) as u64 + 1);
        let [p, mut g, m] = [(); 3].map(|()| random.vec(count));
        let v: Vec<f64> = random.vec(count).iter().map(|v| v.abs()).collect();
        let (mut new_p, mut new_m, mut new_v) = (p.clone(), m.clone(), v.clone());
        if applied {
            twins::adamw(&mut new_p, &g, &mut new_m, &mut new_v, 0.5, step.of(decays(i)), 3);
        } else {
            g[count - 1] = f64::NAN;
            [&mut new_p, &mut new_m, &mut new_v].into_iter().for_each(|values| values.fill(f64::NAN));
        }
        let rewritten = |name, before, want| Buffer { before, ..Buffer::output(name, Elem::F32, want, 1e-6) };
        let g = Buffer::input("g", Elem::F32, &g);
        buffers.extend([rewritten("p", p, new_p), g, rewritten("m", m, new_m), rewritten("v", v, new_v)]);
    }
    buffers.push(Buffer::input("verdict", Elem::F32, &verdict));
    let slots = counts.iter().enumerate().map(|(i, &count)| (count, f32::from(decays(i))));
    let (params, groups) = update_kernel().params(slots, 5, &hyper.factors().map(f32::to_bits));
    Case {
        kernel: update_kernel().kernel(Lanes::of(counts[0]), counts.len()),
        what: format!("{counts:?} elements, applied: {applied}"),
        grid: two_rows(groups),
        buffers,
        params,
    }
}

/// Two places of the buffer belong to another launch before, one to another behind.
fn square_sums(counts: &[usize]) -> Case {
    let (mut buffers, mut sums) = (Vec::new(), vec![f64::NAN; 2]);
    for (i, &count) in counts.iter().enumerate() {
        let g = Random(37 + i as u64).vec(count);
        let share = count.div_ceil(Lanes::of(count).count) * 1024;
        sums.extend(g.chunks(share).map(|part| part.iter().map(|g| g * g).sum::<f64>()));
        buffers.push(Buffer::input("g", Elem::F32, &g));
    }
    sums.push(f64::NAN);
    buffers.push(Buffer::output("sums", Elem::F32, sums, 1e-5));
    let (params, groups) = square_sums_kernel().params(counts.iter().map(|&count| (count, 0.0)), 2, &[]);
    Case {
        kernel: square_sums_kernel().kernel(Lanes::of(counts[0]), counts.len()),
        what: format!("{counts:?} elements"),
        grid: two_rows(groups),
        buffers,
        params,
    }
}
