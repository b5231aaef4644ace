//! `bench`, `compare --devices` and `doctor` on the devices of this machine.

mod common;

use std::process::{Command, Output};

use common::adapter;
use gpt_wgpu::report::{Backend, BenchReport};
use tempfile::TempDir;

/// A model that the CPU trains in milliseconds.
const TINY: &[&str] = &[
    "--n-layer=1",
    "--n-head=2",
    "--n-embd=16",
    "--block-size=8",
    "--batch-size=2",
    "--gradient-accumulation-steps=1",
    "--dataset=builtin",
    "--device=cpu",
];

struct Sandbox(TempDir);

impl Sandbox {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = common::program::gpt_wgpu();
        command.args(args).current_dir(self.0.path());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn report(&self, name: &str) -> BenchReport {
        BenchReport::read(&self.0.path().join(name)).unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[track_caller]
fn worked(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

/// The run failed with `code` and said each of `parts`.
#[track_caller]
fn refused(output: &Output, code: i32, parts: &[&str]) {
    assert_eq!(output.status.code(), Some(code), "{}", text(output));
    for part in parts {
        assert!(text(output).contains(part), "no {part:?} in: {}", text(output));
    }
    assert!(!text(output).contains("panicked"), "{}", text(output));
}

#[test]
fn bench_prints_its_numbers_and_writes_a_report() {
    let sandbox = Sandbox::new();
    let flags = ["--iters=6", "--warmup=2", "--json=report.json", "--max-iters=7"];
    let printed = worked(sandbox.run(&[&["bench"], TINY, &flags].concat()));
    for line in ["device: CPU", "ms/iter, median of 6", "tokens/s on random tokens", "mfu, measured", "energy"] {
        assert!(printed.contains(line), "no {line:?} in {printed}");
    }
    let report = sandbox.report("report.json");
    assert_eq!((report.samples_ms.len(), report.warmup, report.device.backend), (6, 2, Backend::Cpu));
    assert_eq!((report.config.n_embd, report.config.vocab_size, report.config.tokens_per_iter()), (16, 60, 16));
    assert_eq!(report.data.as_deref(), Some("random tokens"));
    let losses = report.losses.unwrap();
    assert!(losses.len() == 6 && losses.iter().all(|loss| (loss - 60f64.ln()).abs() < 0.5), "{losses:?}");
    let mfu = report.mfu_measured.unwrap();
    assert!(mfu.peak_flops > 1e6 && mfu.fraction > 0.0 && mfu.fraction < 1.0, "{mfu:?}");
    assert!(report.time_to_first_step_s.unwrap() > 0.0);
    assert_ne!(report.energy.is_some(), report.energy_reason.is_some(), "a number, or why there is none");
}

/// What is timed is what training does.
#[test]
fn benchs_losses_are_those_of_training_to_the_bit() {
    let sandbox = Sandbox::new();
    let train = ["--max-iters=4", "--eval-interval=100", "--eval-iters=1", "--log-interval=1", "--out-dir=out"];
    worked(sandbox.run(&[&["train", "--quiet"], TINY, &train].concat()));
    let flags = ["--iters=5", "--warmup=0", "--no-peak", "--json=report.json", "--max-iters=4"];
    let printed = worked(sandbox.run(&[&["bench"], TINY, &flags].concat()));
    assert!(printed.contains("on tokens of builtin"), "{printed}");
    let report = sandbox.report("report.json");
    assert_eq!(report.mfu_measured, None);
    let metrics = std::fs::read_to_string(sandbox.0.path().join("out/metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
    assert_eq!(report.losses.unwrap(), metrics.lines().filter_map(loss).collect::<Vec<_>>());
}

#[test]
fn bench_refuses_what_it_cannot_measure() {
    let sandbox = Sandbox::new();
    refused(&sandbox.run(&["bench", "--iters=0"]), 2, &["--iters", "at least 1"]);
    refused(&sandbox.run(&["bench", "none.toml"]), 2, &["none.toml"]);
    refused(&sandbox.run(&["bench", "--json=none/report.json"]), 1, &["--json", "no folder none"]);
    refused(&sandbox.run(&["bench", "--device=cpu", "--ops"]), 1, &["--ops", "the CPU has none"]);
    refused(&sandbox.run(&["bench", "--device=cuda"]), 1, &["--device cuda"]);
    refused(&sandbox.run(&["bench", "--n-head=0"]), 2, &["n_head = 0"]);
    let large =
        ["--device=cpu", "--dataset=builtin", "--batch-size=1048576", "--block-size=2048", "--n-embd=64", "--n-head=2"];
    refused(&sandbox.run(&[&["bench"], &large[..]].concat()), 1, &["this run needs about", "batch_size = "]);
    let flags = ["--learning-rate=1e30", "--warmup-iters=0", "--grad-clip=0", "--no-peak"];
    let words = ["so the times mean nothing", "gpt-wgpu doctor --device cpu"];
    refused(&sandbox.run(&[&["bench"], TINY, &flags].concat()), 1, &words);
}

#[test]
fn a_step_is_taken_apart_by_kernel_into_the_report() {
    let Some(adapter) = adapter() else { return };
    let sandbox = Sandbox::new();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/ci.toml");
    let flags = ["--iters=2", "--warmup=1", "--no-peak", "--ops", "--json=report.json"];
    let output = sandbox.run(&[&["bench", config, &format!("--device={adapter}")], &flags[..]].concat());
    assert!(worked(output).contains("| kernel | launches |"));
    let ops = sandbox.report("report.json").ops.unwrap();
    let count = |name: &str| ops.iter().filter(|op| op.name.starts_with(name)).map(|op| op.count).sum::<usize>();
    assert_eq!(count("attention_scalar_forward"), 2, "one a layer: {ops:?}");
    assert!(ops.iter().all(|op| op.ms >= 0.0 && op.percent >= 0.0), "{ops:?}");
}

#[test]
fn devices_are_compared_in_turns() {
    let Some(adapter) = adapter() else { return };
    let sandbox = Sandbox::new();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/ci.toml");
    let devices = format!("--devices={adapter},cpu");
    let flags = ["--rounds=2", "--iters=3", "--warmup=1", "--save=reports", "--html=page.html"];
    let output = sandbox.run(&[&["compare", &devices, config], &flags[..]].concat());
    let printed = worked(output);
    let turns: Vec<&str> = printed.lines().filter(|line| line.starts_with("round ")).collect();
    let order: Vec<bool> = turns.iter().map(|line| line.contains(": cpu ")).collect();
    assert_eq!(order, [false, true, false, true], "{printed}");
    let name = adapter.replace(':', "-");
    let (first, second) = (sandbox.report(&format!("reports/{name}.json")), sandbox.report("reports/cpu.json"));
    assert_eq!((first.samples_ms.len(), second.samples_ms.len()), (6, 6));
    assert!(first.device.backend != Backend::Cpu && second.device.backend == Backend::Cpu);
    assert!(first.mfu_measured.is_some() && second.mfu_measured.is_some());
    assert_eq!(first.config, second.config);
    // The same weights and tokens on both: the losses are the same up to f32.
    let (a, b) = (first.losses.unwrap(), second.losses.unwrap());
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3), "{a:?} {b:?}");
    assert!(printed.contains("B (gpt-wgpu cpu)") && printed.contains(&format!("A {adapter}: ")), "{printed}");
    let page = std::fs::read_to_string(sandbox.0.path().join("page.html")).unwrap();
    assert!(page.contains("gpt-wgpu cpu"), "{page}");
}

#[test]
fn devices_that_are_not_there_are_refused_before_anything_is_measured() {
    let sandbox = Sandbox::new();
    refused(&sandbox.run(&["compare", "--devices=cpu"]), 1, &["at least two devices"]);
    refused(&sandbox.run(&["compare", "--devices=cpu,cuda"]), 1, &["--device cuda"]);
    refused(&sandbox.run(&["compare", "--devices=cpu,vulkan:99"]), 1, &["vulkan"]);
    refused(&sandbox.run(&["compare", "--devices=cpu,cpu", "a.toml", "b.toml"]), 1, &["one configuration file"]);
    let output = sandbox.run(&["compare", "--devices=cpu,cpu", "none.toml", "--rounds=1"]);
    refused(&output, 1, &["cpu, round 1 failed", "cannot read the configuration none.toml"]);
    refused(&sandbox.run(&["compare"]), 2, &["<FILES>"]);
    refused(&sandbox.run(&["compare", "a.json", "b.json", "--rounds=2"]), 2, &["--devices"]);
    if !cfg!(windows) {
        refused(&sandbox.run(&["compare", "--devices=cpu,dx12"]), 1, &["no dx12 adapter", "gpt-wgpu info"]);
    }
}

#[test]
fn doctor_finds_the_adapter_healthy() {
    let Some(adapter) = adapter() else { return };
    let sandbox = Sandbox::new();
    let output = sandbox.run(&["doctor", "--json", &format!("--device={adapter}")]);
    let json: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    assert!(output.status.success() && json["healthy"] == true, "{json:#}");
    let checks = json["checks"].as_array().unwrap();
    let names: Vec<&str> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in ["adapter", "attention, scalar", "attention, composed", "causality, scalar", "20 steps, scalar"] {
        assert!(names.contains(&name), "no {name} in {names:?}");
    }
    assert!(json["adapter"]["limits"]["workgroup_memory"].as_u64().unwrap() >= 16 << 10);
}

#[test]
fn doctor_fails_where_a_result_is_wrong() {
    let sandbox = Sandbox::new();
    let doctor = |spoil: &str| {
        let mut command = sandbox.command(&["doctor", "--device=cpu"]);
        command.env("GPT_WGPU_DOCTOR_SPOIL", spoil).output().unwrap()
    };
    refused(
        &doctor("attention, cpu"),
        1,
        &[
            "FAIL  attention, cpu",
            "to do: ",
            "ok    linear layers, cpu",
            "error: 1 of 13 checks failed: attention, cpu",
        ],
    );
    let all = doctor("all");
    refused(&all, 1, &["error: 9 of 13 checks failed"]);
    for name in
        ["linear layers", "layer norm", "embedding", "cross-entropy", "dropout", "adamw", "causality", "20 steps"]
    {
        assert!(text(&all).contains(&format!("FAIL  {name}, cpu")), "{name}: {}", text(&all));
    }
}
