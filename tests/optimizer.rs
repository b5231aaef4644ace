//! The optimizer on every device present: the verdict on a step against its definition, the gradients' norm, and AdamW's update,
//! with guards around every output; on a GPU by our kernels and composed of Burn's primitives.

mod common;

use std::sync::{Mutex, PoisonError};

use burn::tensor::Device;
use common::guarded::{Guarded, primitive};
use common::twins::AdamWStep;
use common::*;
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::ops::adamw::{self, AdamW, Parameter};
use gpt_wgpu::ops::verdict::{self, FIRST_SCALE, Rules, VERDICT, WINDOW, first_state, judge, state};
use gpt_wgpu::optim::Optimizer;

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

const HYPER: AdamW = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
const STEP: AdamWStep = AdamWStep { lr: 3e-3, weight_decay: 0.1, hyper: HYPER };

/// A factor on the gradient that is exact in f32.
const FACTOR: f64 = 0.375;

/// Elements of parameters that are updated together: one, no multiples of four, around a workgroup's share of 2048, and more in a
/// row than a launch has slots.
const COUNTS: [usize; 17] = [4, 64, 1, 1024, 2048, 2052, 8, 12, 4, 100_004, 4096, 2044, 3, 1028, 511, 513, 100_003];

/// Slots that a launch may have: one, as where few buffers can be bound, some, and all.
const SLOTS: [usize; 3] = [1, 3, 7];

/// Of every second parameter.
fn decays(i: usize) -> bool {
    i.is_multiple_of(2)
}

#[test]
fn adamw_steps_in_place() {
    on_gpu(|device| {
        let mut runs = Vec::new();
        for most in SLOTS {
            let mut random = Random(7);
            let mut wanted: Vec<[Vec<f64>; 3]> =
                COUNTS.iter().map(|&count| [random.vec(count), vec![0.0; count], vec![0.0; count]]).collect();
            let guarded: Vec<[Guarded; 3]> = wanted
                .iter()
                .map(|state| state.each_ref().map(|values| Guarded::holding(values, [values.len()], device)))
                .collect();
            for step in 1..=5 {
                let mut gradients = Vec::new();
                for (i, [p, m, v]) in wanted.iter_mut().enumerate() {
                    let g = random.vec(p.len());
                    twins::adamw(p, &g, m, v, FACTOR, STEP.of(decays(i)), step);
                    gradients.push(primitive(tensor(&g, [g.len()], device)));
                }
                let mut parameters = Vec::new();
                for (i, ([p, m, v], g)) in guarded.iter().zip(&gradients).enumerate() {
                    parameters.push(([&p.inside, g, &m.inside, &v.inside], decays(i)));
                }
                let verdict = primitive(tensor(&twins::verdict(FACTOR, STEP, step), [VERDICT], device));
                adamw::launch_update(&parameters, &verdict, HYPER, most);
            }
            let mut results = Vec::new();
            for (i, (got, want)) in guarded.into_iter().zip(wanted).enumerate() {
                for ((got, want), name) in got.into_iter().zip(want).zip(["p", "m", "v"]) {
                    let what = format!("{most} slots, parameter {i} of {} elements, {name}", COUNTS[i]);
                    results.push(got.values(&what));
                    assert_close(&what, &results[results.len() - 1], &want, 1e-6);
                }
            }
            runs.push(results);
        }
        assert!(runs.iter().all(|run| *run == runs[0]), "the bits depend on the slots");
    });
}

#[test]
fn adamw_does_what_the_verdict_says() {
    everywhere(|name, device| {
        let mut random = Random(77);
        let before: Vec<[Vec<f64>; 3]> = [77, 1028, 5]
            .iter()
            .map(|&count| [random.vec(count), random.vec(count), random.vec(count).iter().map(|v| v.abs()).collect()])
            .collect();
        let mut gradients: Vec<Vec<f64>> = before.iter().map(|[p, ..]| random.vec(p.len())).collect();
        let run = |gradients: &[Vec<f64>], verdict: [f64; VERDICT]| -> Vec<[Vec<f64>; 3]> {
            let flat = |values: &Vec<f64>| tensor::<1>(values, [values.len()], device);
            let parameter = |(i, ([p, m, v], g)): (usize, (&[Vec<f64>; 3], _))| Parameter {
                p: flat(p),
                g: flat(g),
                m: flat(m),
                v: flat(v),
                decays: decays(i),
            };
            let parameters = before.iter().zip(gradients).enumerate().map(parameter).collect();
            let updated = adamw::adamw(parameters, tensor(&verdict, [VERDICT], device), HYPER);
            updated.into_iter().map(|updated| updated.map(values)).collect()
        };
        let made = twins::verdict(FACTOR, STEP, 3);
        let mut wanted = before.clone();
        for (i, ([p, m, v], g)) in wanted.iter_mut().zip(&gradients).enumerate() {
            twins::adamw(p, g, m, v, FACTOR, STEP.of(decays(i)), 3);
        }
        let updated = run(&gradients, made);
        assert_eq!(updated.len(), 3);
        for (got, want) in updated.iter().flatten().zip(wanted.iter().flatten()) {
            assert_close(name, got, want, 1e-6);
        }
        // Where nothing is applied, nothing changes, whatever the numbers are.
        for (parameter, element, bad) in [(0, 0, f64::NAN), (1, 1, f64::INFINITY), (0, 76, -1e30), (2, 4, f64::NAN)] {
            gradients[parameter][element] = bad;
        }
        for factor in [FACTOR, f64::NAN, 0.0] {
            assert_eq!(run(&gradients, [factor, 0.0, made[2], made[3], made[4]]), before, "{name} factor {factor}");
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
        let parameter = |elements: usize| {
            let [p, g, m, v] = [&p, &g, &m, &v].map(|values| tensor::<1>(&values[..elements], [elements], device));
            Parameter { p, g, m, v, decays: true }
        };
        let shared = [parameter(77), parameter(64)];
        let verdict = tensor(&twins::verdict(1.0, STEP, 3), [VERDICT], device);
        let updated = adamw::adamw(shared.to_vec(), verdict, HYPER);
        for (held, [new_p, ..]) in shared.into_iter().zip(updated) {
            let elements = held.p.dims()[0];
            for (held, before) in [held.p, held.m, held.v].into_iter().zip([&p, &m, &v]) {
                assert_eq!(values(held), before[..elements], "{name}");
            }
            assert_ne!(values(new_p), p[..elements], "{name}");
        }

        let before: Vec<f64> = first_state(8.0, 3).into_iter().map(f64::from).collect();
        let memory = tensor(&before, [state::SIZE], device);
        let (sums, loss) = (tensor(&[64.0], [1], device), tensor(&[2.0], [1], device));
        let (after, _) = verdict::verdict(sums, loss, memory.clone(), RULES);
        assert_eq!(values(memory), before, "{name}");
        assert_eq!(values(after)[state::UPDATES], 4.0, "{name}");
    });
}

const RULES: Rules = Rules {
    grad_clip: 1.0,
    lr: 1e-3,
    weight_decay: 0.1,
    beta1: 0.9,
    beta2: 0.95,
    dynamic_scale: true,
    skip_spike_sigma: 4.0,
    parts: 3,
};

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
        // Around a workgroup's share of 4096 elements, or 1024 where they are no multiple of four, and more than a launch has slots.
        let large = if name == "gpu" { 8_400_000 } else { 100_000 };
        let counts = [1, 3, 4, 4092, 4096, 4100, 8192, 40_000, 8, 12, large, 1023, 1024, 1025, 100_001];
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
        let mut random = Random(2);
        let gradients: Vec<_> = COUNTS.iter().map(|&count| random.vec(count)).collect();
        let square_sum = |part: &[f64]| part.iter().map(|g| g * g).sum::<f64>();
        let share = |g: &[f64]| if g.len().is_multiple_of(4) { 4096 } else { 1024 };
        let wanted: Vec<f64> = gradients.iter().flat_map(|g| g.chunks(share(g)).map(square_sum)).collect();
        assert_eq!(adamw::places(COUNTS), wanted.len());
        let tensors: Vec<_> = gradients.iter().map(|g| primitive(tensor(g, [g.len()], device))).collect();
        let tensors: Vec<_> = tensors.iter().collect();
        let runs = SLOTS.map(|most| {
            let sums = Guarded::new([wanted.len()], device);
            adamw::launch_square_sums(&tensors, &sums.inside, most);
            sums.values("sums")
        });
        for sums in &runs {
            assert_close("sums", sums, &wanted, 1e-6);
            assert_eq!(sums, &runs[0], "the bits depend on the slots");
        }
    });
}

/// Whether the loss scale is one is what the memory says, not what it is: in f16 it may come down to 1.
#[test]
fn a_loss_scale_is_taken_up_again_unless_the_type_changes() {
    let device = Device::flex();
    let scale = |optimizer: &Optimizer| values(optimizer.memory.clone())[state::LOSS_SCALE];
    let taken_up = |memory: &[f32], f16: bool| {
        let optimizer = Optimizer::with_memory(memory.to_vec(), 1, f16, &device);
        let stored: Vec<f32> = values(optimizer.memory.clone()).iter().map(|v| *v as f32).collect();
        (scale(&optimizer), stored)
    };
    let [(in_f16, f16), (in_f32, f32)] = [true, false].map(|f16| taken_up(&first_state(1.0, 0), f16));
    assert_eq!((in_f16, in_f32), (f64::from(FIRST_SCALE), 1.0));
    for fallen in [1.0, 0.25, 4096.0] {
        let mut memory = f16.clone();
        memory[state::LOSS_SCALE] = fallen;
        assert_eq!(taken_up(&memory, true).0, f64::from(fallen));
        assert_eq!(taken_up(&memory, false).0, 1.0);
        // Written before it was said
        memory[state::HAS_SCALE] = 0.0;
        let want = if fallen == 1.0 { FIRST_SCALE } else { fallen };
        assert_eq!(taken_up(&memory, true).0, f64::from(want));
    }
    assert_eq!((taken_up(&f32, true).0, taken_up(&f32, false).0), (f64::from(FIRST_SCALE), 1.0));
    let first = |count, f16| scale(&Optimizer::for_micro_batches(count, f16, &device));
    // A run in f32 goes on in f16 as a new one begins.
    let changed = |count| scale(&Optimizer::with_memory(f32.clone(), count, true, &device));
    assert_eq!([1, 40, 60].map(changed), [1, 40, 60].map(|count| first(count, true)));
    assert_eq!([first(1, true), first(40, true), first(60, true), first(60, false)], [65536.0, 1024.0, 1024.0, 1.0]);
}
