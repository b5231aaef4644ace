//! The optimizer on every device present: the verdict on a step against its definition, the gradients' norm, and AdamW's update,
//! with guards around every output; on a GPU by our kernels and composed of Burn's primitives.

mod common;

use std::sync::{Mutex, PoisonError};

use burn::tensor::Device;
use common::guarded::{Guarded, primitive};
use common::*;
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::ops::adamw::{self, AdamW};
use gpt_wgpu::ops::verdict::{self, Rules, VERDICT, WINDOW, first_state, judge, state};

/// Runs `test` on the CPU, on the GPU with our kernels and on the GPU without them. The choice of kernels is the process's, so
/// tests that go by it take turns.
fn everywhere(test: impl Fn(&str, &Device)) {
    static CHOICE: Mutex<()> = Mutex::new(());
    let _turn = CHOICE.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, device) in devices() {
        kernel::choose(Kernels::Auto);
        test(name, &device);
        if name == "gpu" {
            kernel::choose(Kernels::Composed);
            test("gpu, composed", &device);
            kernel::choose(Kernels::Auto);
        }
    }
}

fn on_gpu(test: impl Fn(&Device)) {
    match gpu() {
        Some(device) => test(&device),
        None => eprintln!("SKIPPED: no GPU adapter"),
    }
}

fn hyper(weight_decay: f64) -> AdamW {
    AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay }
}

/// A factor on the gradient that is exact in f32.
const FACTOR: f64 = 0.375;

#[test]
fn adamw_steps_in_place() {
    on_gpu(|device| {
        for count in [1, 3, 4, 5, 64, 1023, 1024, 1025, 100_003] {
            let mut random = Random(count as u64);
            let mut p = random.vec(count);
            let (mut m, mut v) = (vec![0.0; count], vec![0.0; count]);
            let [gp, gm, gv] = [&p, &m, &v].map(|content| Guarded::holding(content, [count], device));
            for step in 1..=5 {
                let g = random.vec(count);
                let hyper = hyper(if step % 2 == 0 { 0.1 } else { 0.0 });
                twins::adamw(&mut p, &g, &mut m, &mut v, FACTOR, hyper, step);
                let g = primitive(tensor(&g, [count], device));
                let verdict = primitive(tensor(&twins::verdict(FACTOR, hyper, step), [VERDICT], device));
                adamw::launch_update(&gp.inside, &g, &gm.inside, &gv.inside, &verdict, hyper);
            }
            for (got, want, name) in [(gp, p, "p"), (gm, m, "m"), (gv, v, "v")] {
                let what = format!("{count} {name}");
                assert_close(&what, &got.values(&what), &want, 1e-6);
            }
        }
    });
}

#[test]
fn adamw_does_what_the_verdict_says() {
    everywhere(|name, device| {
        for count in [77, 1028] {
            let mut random = Random(count as u64);
            let [mut p, mut g, mut m] = [(); 3].map(|()| random.vec(count));
            let mut v: Vec<f64> = random.vec(count).iter().map(|v| v.abs()).collect();
            let before = [p.clone(), m.clone(), v.clone()];
            let run = |g: &[f64], verdict: [f64; VERDICT]| {
                let [p, m, v] = before.each_ref().map(|values| tensor::<1>(values, [count], device));
                let (g, verdict) = (tensor(g, [count], device), tensor(&verdict, [VERDICT], device));
                let (p, m, v) = adamw::adamw(p, g, m, v, verdict, hyper(0.1));
                [values(p), values(m), values(v)]
            };
            let made = twins::verdict(FACTOR, hyper(0.1), 3);
            twins::adamw(&mut p, &g, &mut m, &mut v, FACTOR, hyper(0.1), 3);
            for (got, want) in run(&g, made).iter().zip([p, m, v]) {
                assert_close(name, got, &want, 1e-6);
            }
            // Where nothing is applied, nothing changes, whatever the numbers are.
            for (element, bad) in [(0, f64::NAN), (1, f64::INFINITY), (76, -1e30)] {
                g[element] = bad;
            }
            for factor in [FACTOR, f64::NAN, 0.0] {
                assert_eq!(run(&g, [factor, 0.0, made[2], made[3]]), before, "{name} factor {factor}");
            }
        }
    });
}

/// In place must not mean under somebody's hands: a checkpoint being written holds the tensors too.
#[test]
fn a_shared_tensor_is_left_alone() {
    everywhere(|name, device| {
        let mut random = Random(5);
        let [p, g, m, v] = [(); 4].map(|()| random.vec(77));
        let v: Vec<f64> = v.iter().map(|v| v.abs()).collect();
        let [pt, gt, mt, vt] = [&p, &g, &m, &v].map(|values| tensor::<1>(values, [77], device));
        let held = [pt.clone(), mt.clone(), vt.clone()];
        let verdict = tensor(&twins::verdict(1.0, hyper(0.1), 3), [VERDICT], device);
        let updated = adamw::adamw(pt, gt, mt, vt, verdict, hyper(0.1));
        for (held, before) in held.into_iter().zip([&p, &m, &v]) {
            assert_eq!(&values(held), before, "{name}");
        }
        assert_ne!(values(updated.0), p, "{name}");

        let before: Vec<f64> = first_state(8.0, 3).into_iter().map(f64::from).collect();
        let memory = tensor(&before, [state::SIZE], device);
        let (sums, loss) = (tensor(&[64.0], [1], device), tensor(&[2.0], [1], device));
        let (after, _) = verdict::verdict(sums, loss, memory.clone(), RULES);
        assert_eq!(values(memory), before, "{name}");
        assert_eq!(values(after)[state::UPDATES], 4.0, "{name}");
    });
}

const RULES: Rules =
    Rules { grad_clip: 1.0, lr: 1e-3, beta1: 0.9, beta2: 0.95, dynamic_scale: true, skip_spike_sigma: 4.0, parts: 3 };

/// Equal to a few bits, each number for itself; what is not finite only has to be not finite.
#[track_caller]
fn assert_same(what: &str, got: &[f64], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let want = f64::from(*want);
        let same = if want.is_finite() { (got - want).abs() <= 2e-6 * want.abs() } else { !got.is_finite() };
        assert!(same, "{what}: element {i} is {got}, wanted {want}");
    }
}

/// The partial sums and the loss sum of step `i` of a run with outliers and overflows, before the gradients are scaled.
fn step(i: usize, random: &mut Random) -> (Vec<f64>, f64) {
    let mut sums: Vec<f64> = (0..301).map(|_| 0.01 * (1.2 + random.next())).collect();
    let mut loss = 9.0 + 0.3 * random.next();
    match i {
        150 | 201 => sums.iter_mut().for_each(|sum| *sum *= 400.0),
        170 | 290 => loss += 30.0,
        60 | 130 => sums[i] = f64::INFINITY,
        61 => sums[300] = f64::NAN,
        62 => loss = f64::INFINITY,
        240 => loss = f64::NAN,
        _ => {}
    }
    (sums, loss)
}

#[test]
fn verdicts_are_the_definitions_over_300_steps() {
    everywhere(|name, device| {
        for rules in [RULES, Rules { grad_clip: 0.0, skip_spike_sigma: 0.0, dynamic_scale: false, ..RULES }] {
            let mut random = Random(3);
            let mut want = first_state(65536.0, 5);
            want[state::GOOD_STEPS] = 1960.0;
            let content: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
            let mut memory = tensor(&content, [state::SIZE], device);
            for i in 0..300 {
                let (sums, loss) = step(i, &mut random);
                let scale = f64::from(want[state::LOSS_SCALE]);
                let sums: Vec<f64> = sums.iter().map(|sum| f64::from((sum * scale * scale) as f32)).collect();
                let total = sums.iter().sum::<f64>() as f32;
                let wanted = judge(total, loss as f32, &mut want, &rules);
                let (sums, loss) = (tensor(&sums, [301], device), tensor(&[loss], [1], device));
                let (after, verdict) = verdict::verdict(sums, loss, memory, rules);
                memory = after;
                assert_same(&format!("{name} step {i}, memory"), &values(memory.clone()), &want);
                // Where a number is not finite nobody uses the factor.
                let first = usize::from(!want[state::NORM].is_finite() || !want[state::LOSS].is_finite());
                assert_same(&format!("{name} step {i}, verdict"), &values(verdict)[first..], &wanted[first..]);
            }
            let counted = [state::OVERFLOWS, state::SPIKES, state::UPDATES, state::LOSS_SCALE].map(|i| want[i]);
            let dynamic = [5.0, 4.0, 5.0 + 291.0, 4096.0]; // doubled once, halved five times
            let plain = [5.0, 0.0, 5.0 + 295.0, 65536.0];
            assert_eq!(counted, if rules.dynamic_scale { dynamic } else { plain }, "{name}");
        }
    });
}

#[test]
fn the_verdict_stays_inside_its_outputs() {
    on_gpu(|device| {
        let mut want = first_state(4.0, 0);
        want[state::NEXT] = (WINDOW - 1) as f32;
        let content: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
        let run = |count: usize| {
            let memory = Guarded::holding(&content, [state::SIZE], device);
            let verdict = Guarded::new([VERDICT], device);
            let sums = primitive(tensor(&vec![2.0; count], [count], device));
            let loss = primitive(tensor(&[6.0], [1], device));
            verdict::launch(&sums, &loss, &memory.inside, &verdict.inside, &RULES);
            (memory.values("memory"), verdict.values("verdict"))
        };
        for count in [1, 255, 257, 2049, 10_000] {
            let (memory, verdict) = run(count);
            let mut after = want.clone();
            let wanted = judge(2.0 * count as f32, 6.0, &mut after, &RULES);
            assert_same(&format!("{count} sums: memory"), &memory, &after);
            assert_same(&format!("{count} sums: verdict"), &verdict, &wanted);
            assert_eq!(run(count), (memory, verdict), "{count} sums: differs from run to run");
        }
    });
}

#[test]
fn the_norm_and_the_clip_of_all_gradients() {
    everywhere(|name, device| {
        // Around a workgroup's share, and one gradient with more than the most workgroups.
        let counts = [1, 3, 4, 8191, 8192, 8193, 40_000, if name == "gpu" { 8_400_001 } else { 100_000 }];
        let mut random = Random(11);
        let gradients: Vec<_> = counts.iter().map(|&count| random.vec(count)).collect();
        // Of the mean over the micro-batches
        let parts = RULES.parts as f64;
        let want = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt() / parts;
        let tensors: Vec<_> = gradients.iter().map(|g| tensor::<1>(g, [g.len()], device)).collect();
        let memory: Vec<f64> = first_state(1.0, 0).into_iter().map(f64::from).collect();
        for limit in [0.0, 1.0, 1e6] {
            let run = || {
                let sums = adamw::square_sums(tensors.iter()).unwrap();
                let rules = Rules { grad_clip: limit, dynamic_scale: false, ..RULES };
                let (memory, loss) = (tensor(&memory, [state::SIZE], device), tensor(&[1.0], [1], device));
                let (memory, verdict) = verdict::verdict(sums, loss, memory, rules);
                (values(memory)[state::NORM], values(verdict)[0])
            };
            let (norm, factor) = run();
            let what = format!("{name} limit {limit}");
            assert_close(&format!("{what}: norm"), &[norm], &[want], 1e-6);
            let clip = if limit == 0.0 { 1.0 } else { (limit / (want + 1e-6)).min(1.0) };
            assert_close(&format!("{what}: factor"), &[factor / clip * parts], &[1.0], 1e-6);
            assert_eq!(run(), (norm, factor), "{what}: differs from run to run");
        }
        assert!(adamw::square_sums([].iter()).is_none());
    });
}

#[test]
fn the_square_sums_stay_inside_their_places() {
    on_gpu(|device| {
        let g = Random(2).vec(20_000);
        let gradient = primitive(tensor(&g, [20_000], device));
        let sums = Guarded::holding(&[0.0; 5], [5], device);
        adamw::launch_square_sums(&gradient, &sums.inside, 1);
        let want = g.iter().map(|g| g * g).sum::<f64>();
        let sums = sums.values("sums");
        assert_eq!((sums[0], sums[4]), (0.0, 0.0), "the places of other gradients");
        assert_close("sums", &[sums.iter().sum::<f64>() / want], &[1.0], 1e-6);
    });
}
