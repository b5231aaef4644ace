//! The fused attention kernels on the adapter present, every variant it supports, against the f64 twins: values, gradients,
//! guards around every output, causality to the bit, dropout, large logits, and the same loss curve as the composed version.

mod common;

use burn::tensor::{Device, FloatDType, Tensor};
use common::guarded::{Guarded, primitive};
use common::twins::{self, AttentionShape};
use common::*;
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::ops::attention::causal_attention;
use gpt_wgpu::ops::attention::launches::{heads_kept, launch, launch_delta, launch_gradients};
use gpt_wgpu::ops::attention::tiles::{self, HEAD_DIMS, Pass, Variant, Version};
use gpt_wgpu::ops::dropout::Dropout;

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0xfeed_beef_cafe, step: 3, site: 0x101 };

fn shape(batch: usize, time: usize, heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, time, heads, head_dim }
}

/// For how many heads dS is kept at a time: not at all, and for two, which leaves one over where their number is odd.
const KEPT: [usize; 2] = [0, 2];

/// What the adapter can run for f16 (or f32) tensors: the scalar variant with both kinds of tiles.
fn versions(device: &Device, f16: bool) -> Vec<Version> {
    let probe = primitive(tensor(&[0.0], [1], device));
    let supported = tiles::supported(&kernel::capabilities(&probe), f16);
    let narrow = supported.contains(&Variant::Scalar).then_some((Variant::Scalar, true));
    let versions = supported.into_iter().map(|variant| (variant, false)).chain(narrow);
    versions.map(|(variant, few_registers)| Version { variant, few_registers }).collect()
}

#[track_caller]
fn assert_near(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt().max(1e-9);
    let scale = |v: &[f64]| v.iter().map(|v| v / rms).collect::<Vec<_>>();
    assert_close(what, &scale(got), &scale(want), tolerance);
}

/// Runs the kernels of `version` over guarded outputs and compares each with the twins.
fn check(device: &Device, version: Version, tolerance: f64, s: AttentionShape, dropout: Dropout, scale: f64) {
    let what = |part: &str| format!("{version:?} {s:?} dropout {} {part}", dropout.is_on());
    let mut random = Random((s.time * 131 + s.head_dim) as u64);
    let channels = s.channels();
    let mut qkv = random.vec(s.batch * s.time * 3 * channels);
    for token in qkv.chunks_mut(3 * channels) {
        token[..2 * channels].iter_mut().for_each(|v| *v = f64::from((*v * scale) as f32)); // q and k only
    }
    // A mean over all tokens: what the gradients of training look like. In f16 alone they would vanish.
    let tokens = (s.batch * s.time) as f64;
    let dout: Vec<f64> =
        random.vec(s.batch * s.time * channels).iter().map(|v| f64::from((v / tokens / 100.0) as f32)).collect();
    if version.variant.rounds_f32() {
        // The kernel rounds its inputs to f16; with large logits that alone moves the result.
        qkv.iter_mut().for_each(|v| *v = half::f16::from_f64(*v).to_f64());
    }
    let (want_out, want_lse) = twins::attention(&qkv, s, dropout);
    let want_dqkv = twins::attention_backward(&dout, &qkv, s, dropout);

    let input = primitive(tensor(&qkv, [s.batch, s.time, 3 * channels], device));
    let cotangent = primitive(tensor(&dout, [s.batch, s.time, channels], device));
    let out = Guarded::new([s.batch, s.time, channels], device);
    let lse = Guarded::new([s.batch, s.heads, s.time, 1], device);
    let delta = Guarded::new([s.batch, s.heads, s.time, 1], device);
    launch(Pass::Forward, version, s.heads, dropout, &[&input, &out.inside, &lse.inside]);
    launch_delta(s.heads, &input, &[&cotangent, &out.inside, &delta.inside]);

    for kept in KEPT {
        let dqkv = Guarded::new([s.batch, s.time, 3 * channels], device);
        let tensors = [&input, &cotangent, &lse.inside, &delta.inside, &dqkv.inside];
        launch_gradients(version, s.heads, dropout, kept, tensors);
        assert_near(&what(&format!("dqkv, dS kept of {kept} heads")), &dqkv.values("dqkv"), &want_dqkv, tolerance);
    }
    assert_near(&what("out"), &out.values("out"), &want_out, tolerance);
    assert_close(&what("lse"), &lse.values("lse"), &want_lse, if tolerance > 1e-2 { 5e-3 } else { 1e-5 });
    delta.values("delta");
}

/// Runs `test` for everything that the adapter can run for f32 tensors, with the tolerance relative to the root mean square: f16
/// products carry 11 bits into sums of up to T terms; f32 ones 24.
fn on_gpu(test: impl Fn(&Device, Version, f64)) {
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let versions = versions(&device, false);
    assert!(versions.iter().any(|version| version.variant == Variant::Scalar));
    for version in versions {
        let tolerance = if version.variant.rounds_f32() { 3e-2 } else { 2e-4 };
        test(&device, version, tolerance);
    }
}

#[test]
fn every_sequence_length_around_the_tiles() {
    on_gpu(|device, version, tolerance| {
        for time in [1, 2, 31, 32, 33, 64, 65, 127, 257] {
            check(device, version, tolerance, shape(3, time, 5, 64), Dropout::OFF, 1.0);
        }
        check(device, version, tolerance, shape(1, 1024, 1, 64), Dropout::OFF, 1.0);
        check(device, version, tolerance, shape(1, 1009, 1, 64), DROPOUT, 1.0);
    });
}

#[test]
fn every_head_dimension_with_and_without_dropout() {
    on_gpu(|device, version, tolerance| {
        for head_dim in HEAD_DIMS {
            for time in [1, 33, 130] {
                for dropout in [Dropout::OFF, DROPOUT] {
                    check(device, version, tolerance, shape(1, time, 3, head_dim), dropout, 1.0);
                }
            }
        }
    });
}

/// |q · k| of about 1e4 before scaling: the softmax is nearly one-hot, and a maximum taken wrongly overflows.
#[test]
fn large_logits_and_constant_rows() {
    on_gpu(|device, version, tolerance| {
        check(device, version, tolerance.max(2e-3), shape(1, 97, 2, 64), Dropout::OFF, 22.0);
        check(device, version, tolerance, shape(1, 97, 2, 64), Dropout::OFF, 0.0);
    });
}

/// f16 tensors in and out; what is compared is rounded to 11 bits twice. Their gradients come scaled, so they are about 1.
#[test]
fn f16_tensors() {
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let versions = versions(&device, true);
    if versions.is_empty() {
        eprintln!("SKIPPED: the adapter has no f16");
    }
    for version in versions {
        for (s, dropout) in [
            (shape(1, 1, 1, 16), Dropout::OFF),
            (shape(2, 33, 3, 64), DROPOUT),
            (shape(1, 130, 1, 80), Dropout::OFF),
            (shape(1, 65, 2, 128), Dropout::OFF),
        ] {
            let what = |part: &str| format!("{version:?} {s:?} f16 {part}");
            let mut random = Random((s.time + s.head_dim) as u64);
            let mut halves = |width: usize| -> Vec<f64> {
                let values = random.vec(s.batch * s.time * width);
                values.into_iter().map(|v| half::f16::from_f64(v).to_f64()).collect()
            };
            let channels = s.channels();
            let (qkv, dout) = (halves(3 * channels), halves(channels));
            let (want_out, _) = twins::attention(&qkv, s, dropout);
            let want_dqkv = twins::attention_backward(&dout, &qkv, s, dropout);

            let half = |values: &[f64], width: usize| {
                let tensor: Tensor<3> = tensor(values, [s.batch, s.time, width], &device);
                tensor.cast(FloatDType::F16)
            };
            let input = primitive(half(&qkv, 3 * channels));
            let cotangent = primitive(half(&dout, channels));
            let out = half(&vec![f64::NAN; dout.len()], channels);
            let out_inside = primitive(out.clone());
            let rows = [s.batch, s.heads, s.time, 1];
            let (lse, delta) = (Guarded::new(rows, &device), Guarded::new(rows, &device));
            launch(Pass::Forward, version, s.heads, dropout, &[&input, &out_inside, &lse.inside]);
            launch_delta(s.heads, &input, &[&cotangent, &out_inside, &delta.inside]);
            assert_near(&what("out"), &values(out.cast(FloatDType::F32)), &want_out, 1e-2);
            for kept in KEPT {
                let dqkv = half(&vec![f64::NAN; qkv.len()], 3 * channels);
                let inside = primitive(dqkv.clone());
                let tensors = [&input, &cotangent, &lse.inside, &delta.inside, &inside];
                launch_gradients(version, s.heads, dropout, kept, tensors);
                let what = what(&format!("dqkv, dS kept of {kept} heads"));
                assert_near(&what, &values(dqkv.cast(FloatDType::F32)), &want_dqkv, 3e-2);
            }
        }
    }
}

/// dS is kept for all heads where 512 MiB hold them, else in rounds of one size, and not at all where one head is too large or too long.
#[test]
fn score_gradients_are_kept_in_equal_rounds() {
    let f32 = |heads, time, largest_buffer| heads_kept(Variant::Scalar, heads, time, largest_buffer);
    let any = u64::MAX;
    assert_eq!(f32(96, 1024, any), 96);
    assert_eq!(heads_kept(Variant::Coop { edge: 16, f16: true }, 192, 1024, any), 192);
    assert_eq!(heads_kept(Variant::Coop { edge: 8, f16: false }, 192, 1024, any), 96);
    assert_eq!(f32(129, 1024, any), 65);
    assert_eq!(f32(1, 1, any), 1);
    assert_eq!(f32(0, 64, any), 0);
    assert_eq!(f32(0, 0, any), 0);
    assert_eq!(f32(12, 4096, any), 6);
    assert_eq!(f32(12, 4097, any), 0);
    assert_eq!(f32(96, 1024, 128 << 20), 32);
    assert_eq!(f32(96, 1024, 4 << 20), 1);
    assert_eq!(f32(96, 1024, (4 << 20) - 1), 0);
}

/// Without a gradient asked for, nothing is recorded; with one, it is the same whatever else wants gradients.
#[test]
fn gradients_are_made_where_they_are_wanted() {
    for (name, device) in devices() {
        let s = shape(2, 17, 2, 16);
        let channels = s.channels();
        let qkv = Random(3).vec(s.batch * s.time * 3 * channels);
        let want = twins::attention(&qkv, s, Dropout::OFF).0;
        let autodiff = device.clone().autodiff();
        let plain: Tensor<3> = tensor(&qkv, [s.batch, s.time, 3 * channels], &autodiff);
        let out = causal_attention(plain, s.heads, Dropout::OFF);
        assert_close_tensor(name, out.clone().inner(), &want, 2e-5);
        // The attention has no parent that wants a gradient; only what is added to it does.
        let added = tensor::<3>(&want, [s.batch, s.time, channels], &autodiff).require_grad();
        let gradients = (out + added.clone()).sum().backward();
        assert_close_tensor(name, added.grad(&gradients).unwrap(), &vec![1.0; want.len()], 1e-6);
        // Off the tape, on the device without autodiff.
        let off = causal_attention(tensor(&qkv, [s.batch, s.time, 3 * channels], &device), s.heads, Dropout::OFF);
        assert_close_tensor(name, off, &want, 2e-5);
    }
}

#[test]
fn a_wrong_scale_is_noticed() {
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let s = shape(1, 33, 1, 64);
    let qkv = Random(1).vec(s.time * 3 * 64);
    let (want, _) = twins::attention(&qkv, s, Dropout::OFF);
    let wrong: Vec<f64> = qkv.iter().enumerate().map(|(i, v)| if i % 192 < 64 { v * 1.1 } else { *v }).collect();
    let got = values(causal_attention(tensor(&wrong, [1, s.time, 192], &device), 1, Dropout::OFF));
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
    let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs() / rms).fold(0.0, f64::max);
    assert!(worst > 1e-3, "a tenth more on every query changed only {worst}");
}

#[test]
fn no_output_sees_a_later_token_to_the_bit() {
    on_gpu(|device, version, _| {
        let s = shape(1, 101, 2, 64);
        let width = 3 * s.channels();
        let qkv = Random(3).vec(s.time * width);
        let run = |qkv: &[f64]| {
            let input = primitive(tensor(qkv, [1, s.time, width], device));
            let out = Guarded::new([1, s.time, s.channels()], device);
            let lse = Guarded::new([1, s.heads, s.time, 1], device);
            launch(Pass::Forward, version, s.heads, Dropout::OFF, &[&input, &out.inside, &lse.inside]);
            out.values("out")
        };
        let before = run(&qkv);
        for token in [1, 31, 32, 63, 64, 100] {
            let mut changed = qkv.clone();
            changed[token * width..].iter_mut().for_each(|v| *v = 3.0 - *v);
            let after = run(&changed);
            let first = token * s.channels();
            assert_eq!(before[..first], after[..first], "{version:?}: token {token} leaked backwards");
            assert_ne!(before[first..], after[first..], "{version:?}: token {token} changed nothing");
        }
    });
}

#[test]
fn equal_runs_are_equal_to_the_bit() {
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let qkv = Random(8).vec(2 * 77 * 3 * 128);
    let run = || {
        let leaf = tensor(&qkv, [2, 77, 384], &device.clone().autodiff()).require_grad();
        let out = causal_attention(leaf.clone(), 2, DROPOUT);
        let grads = (out.clone() * out.clone()).sum().backward();
        (values(out.inner()), values(leaf.grad(&grads).unwrap()))
    };
    assert_eq!(run(), run());
}

/// Head dimension 24 has no kernel: the composed version answers, forward and backward.
#[test]
fn other_head_dimensions_fall_back_on_the_composed_version() {
    for (name, device) in devices() {
        let s = shape(2, 9, 2, 24);
        let qkv = Random(4).vec(2 * 9 * 3 * 48);
        let leaf = tensor(&qkv, [2, 9, 144], &device.clone().autodiff()).require_grad();
        let out = causal_attention(leaf.clone(), 2, Dropout::OFF);
        assert_close_tensor(name, out.clone().inner(), &twins::attention(&qkv, s, Dropout::OFF).0, 2e-5);
        let dout = Random(5).vec(2 * 9 * 48);
        let grads = (out * tensor(&dout, [2, 9, 48], &device.clone().autodiff())).sum().backward();
        let want = twins::attention_backward(&dout, &qkv, s, Dropout::OFF);
        assert_close_tensor(name, leaf.grad(&grads).unwrap(), &want, 2e-5);
    }
}

/// The choice is global, so this test alone changes it, in a process of its own.
#[test]
fn fused_and_composed_training_give_the_same_losses() {
    let dir = tempfile::tempdir().unwrap();
    let run = |kernels: &str| {
        let output = program::gpt_wgpu()
            .current_dir(dir.path())
            .args(["train", "--dataset=builtin", "--n-layer=2", "--n-head=2", "--n-embd=64", "--block-size=48"])
            .args(["--batch-size=3", "--max-iters=20", "--eval-interval=100", "--eval-iters=1", "--log-interval=1"])
            .args(["--dropout=0.1", "--sample-tokens=0", "--warmup-iters=2", "--learning-rate=1e-3"])
            .arg(format!("--device={}", std::env::var("GPT_WGPU_DEVICE").unwrap_or_else(|_| "vulkan".into())))
            .args([&format!("--kernels={kernels}"), &format!("--out-dir={kernels}")])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        assert_eq!(text.contains("kernels: Burn's own"), kernels == "composed", "{text}");
        let metrics = std::fs::read_to_string(dir.path().join(kernels).join("metrics.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
        metrics.lines().filter_map(loss).collect::<Vec<_>>()
    };
    if gpu().is_none() {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    }
    let composed = run("composed");
    assert_eq!(composed.len(), 21);
    assert_close("scalar", &run("scalar"), &composed, 1e-3);
    assert_close("coop or what the device has", &run("coop"), &composed, 5e-3);
    assert_eq!(Kernels::default(), Kernels::Auto);
}
