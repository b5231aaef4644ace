//! The verdict on a step, against its definition: good steps, overflows, outliers, and what a loss scale does at its ends.

use gpt_wgpu::ops::verdict::{self, Rules, SCALES, VERDICT, WINDOW, first_state, judge, state};

use super::{Buffer, Case, Elem};
use crate::common::Random;

/// Learning rate and decay are the same in every case: they stand in the clock, which the cases share.
pub const RULES: Rules = Rules {
    grad_clip: 1.0,
    lr: 1e-3,
    weight_decay: 0.1,
    beta1: 0.9,
    beta2: 0.95,
    dynamic_scale: true,
    skip_spike_sigma: 0.0,
    parts: 3,
};
const SIGMA: Rules = Rules { skip_spike_sigma: 5.0, ..RULES };

pub fn cases() -> Vec<Case> {
    let first = || first_state(4.0, 0);
    let with = |places: &[(usize, f32)], mut memory: Vec<f32>| {
        places.iter().for_each(|&(place, value)| memory[place] = value);
        memory
    };
    let calm = Sums { count: 300, bad: None, each: 0.1 };
    let wild = Sums { each: 1e4, ..calm };
    let bad = |value| Sums { bad: Some(value), ..calm };
    let tiny = |value| Sums { each: 1e-12, ..bad(value) };
    vec![
        case("the first step", Sums { count: 1, ..calm }, 6.0, first(), RULES),
        case("no clip, many sums", Sums { count: 2100, ..calm }, 6.0, first(), Rules { grad_clip: 0.0, ..RULES }),
        case("a clip, late", wild, 6.0, first_state(2.0, 60), Rules { dynamic_scale: false, ..RULES }),
        case("infinite sums", bad(f64::INFINITY), 6.0, full(17), RULES),
        case("sums that are none", bad(f64::NAN), 6.0, full(0), RULES),
        case("an infinite loss", calm, f64::INFINITY, first(), Rules { dynamic_scale: false, ..RULES }),
        case("a loss that is none", calm, f64::NAN, full(3), RULES),
        // Norms of about 1, that a wrong scale be seen beside them
        case("the least scale", tiny(f64::NAN), 6.0, with(&[(state::LOSS_SCALE, SCALES.0)], first()), RULES),
        case("one good step too few", calm, 6.0, with(&[(state::GOOD_STEPS, 1998.0)], first()), RULES),
        case("enough good steps", calm, 6.0, with(&[(state::GOOD_STEPS, 1999.0)], first()), RULES),
        case("an outlier of the norm", wild, 6.0, full(WINDOW - 1), SIGMA),
        case("an outlier of the loss", calm, 60.0, full(5), SIGMA),
        case("an outlier within 12 deviations", wild, 60.0, full(5), Rules { skip_spike_sigma: 12.0, ..RULES }),
        case("an outlier that is low", calm, -60.0, full(5), SIGMA),
        case("none is looked for", wild, 60.0, full(5), RULES),
        case("no outlier", calm, 6.0, full(64), SIGMA),
        case("a window without spread", Sums { count: 1, bad: None, each: 16.0 }, 6.0, flat(), SIGMA),
        case("a window not yet full", wild, 6.0, with(&[(state::REMEMBERED, WINDOW as f32 - 2.0)], full(9)), SIGMA),
        case(
            "a window full with this step",
            wild,
            6.0,
            with(&[(state::REMEMBERED, WINDOW as f32 - 1.0)], full(9)),
            SIGMA,
        ),
    ]
}

/// A full window of losses about 2 and norms about 1.4, the next step going to `next`.
fn full(next: usize) -> Vec<f32> {
    let mut memory = first_state(4.0, 200);
    let mut random = Random(53);
    for i in 0..WINDOW {
        memory[state::LOSSES + i] = (2.0 + 0.1 * random.next()) as f32;
        memory[state::NORMS + i] = (1.4 + 0.05 * random.next()) as f32;
    }
    memory[state::REMEMBERED] = WINDOW as f32;
    memory[state::NEXT] = next as f32;
    memory[state::GOOD_STEPS] = 7.0;
    memory
}

/// A full window of the same loss, 2, and the same norm, 1.
fn flat() -> Vec<f32> {
    let mut memory = full(0);
    memory[state::LOSSES..state::NORMS].fill(2.0);
    memory[state::NORMS..].fill(1.0);
    memory
}

/// The partial sums of a step.
#[derive(Clone, Copy)]
struct Sums {
    count: usize,
    /// What the last of them is instead.
    bad: Option<f64>,
    each: f64,
}

fn case(what: &str, sums: Sums, loss: f64, before: Vec<f32>, rules: Rules) -> Case {
    let mut values = vec![f64::from(sums.each as f32); sums.count];
    if let Some(bad) = sums.bad {
        values[sums.count - 1] = bad;
    }
    let mut memory = before.clone();
    let verdict = judge(values.iter().sum::<f64>() as f32, loss as f32, &mut memory, &rules);
    let numbers = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    // What is not finite may be anything else that is not, and so may the factor that was made of it.
    let any =
        |values: &[f32]| numbers(values).into_iter().map(|v| if v.is_finite() { v } else { f64::INFINITY }).collect();
    let finite = memory[state::LOSS].is_finite() && memory[state::NORM].is_finite();
    let mut wanted: Vec<f64> = any(&verdict);
    if !finite {
        wanted[0] = f64::INFINITY;
    }
    assert_eq!(wanted.len(), VERDICT);
    let mut params = vec![sums.count as u32];
    params.extend(rules.params());
    Case {
        kernel: verdict::kernel(),
        what: what.into(),
        grid: (1, 1, 1),
        buffers: vec![
            Buffer::input("sums", Elem::F32, &values),
            Buffer::input("loss", Elem::F32, &[loss]),
            Buffer { before: numbers(&before), ..Buffer::output("memory", Elem::F32, any(&memory), 1e-6) },
            Buffer::output("verdict", Elem::F32, wanted, 1e-5),
        ],
        params,
    }
}
