//! The loop: it learns, it resumes to the bit, devices agree, accumulation is one larger batch.

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use common::*;
use gpt_wgpu::checkpoint;
use gpt_wgpu::config::Config;
use gpt_wgpu::data::Dataset;
use gpt_wgpu::metrics::Record;
use gpt_wgpu::prepare::{Source, prepare};
use gpt_wgpu::train::{self, Ended, Run, Start};
use tempfile::TempDir;

const CONFIG: &str = "
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 16
dropout = 0.1
bias = true
[data]
batch_size = 4
gradient_accumulation_steps = 2
[optim]
learning_rate = 1e-3
warmup_iters = 4
lr_decay_iters = 20
min_lr = 1e-4
beta2 = 0.99
[train]
max_iters = 19
eval_interval = 5
eval_iters = 2
log_interval = 1
";

struct Bench {
    dir: TempDir,
    config: Config,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        prepare(&Source::Builtin, &dir.path().join("data"), None, false).unwrap();
        let mut config = Config::parse(CONFIG, "test").unwrap();
        config.train.out_dir = dir.path().join("out");
        Self { dir, config }
    }

    /// Trains to `max_iters`, from scratch or from the last checkpoint.
    fn train(&self, config: &Config, device: &Device, resume: bool) {
        let data = Dataset::open(&self.dir.path().join("data"), None, config.model.block_size).unwrap();
        let start = if resume {
            Start::Resume(Box::new(checkpoint::open(&checkpoint::path(&config.train.out_dir, "last")).unwrap()))
        } else {
            Start::Scratch(config.gpt(data.vocab_size()))
        };
        let stop = AtomicBool::new(false);
        let run = Run { device, data: &data, tokenizer: None, start, quiet: true, profile: false, stop: &stop };
        let (_, ended) = train::run(config, run).unwrap();
        assert_eq!(ended, Ended::Finished);
    }
}

fn records(out_dir: &Path) -> Vec<Record> {
    std::fs::read_to_string(out_dir.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Records without the wall clock and the allocator, which differ between equal runs.
fn timeless(out_dir: &Path) -> Vec<Record> {
    let strip =
        |record| Record { ms: None, tokens_per_s: None, mfu: None, eval_ms: None, device_memory_bytes: None, ..record };
    records(out_dir).into_iter().map(strip).collect()
}

fn losses(out_dir: &Path) -> Vec<f64> {
    records(out_dir).into_iter().filter_map(|r| r.loss).collect()
}

#[test]
fn a_resumed_run_is_the_same_run_to_the_bit() {
    for (name, device) in devices() {
        let bench = Bench::new();
        let mut whole = bench.config.clone();
        whole.train.out_dir = bench.dir.path().join("whole");
        bench.train(&whole, &device, false);

        // Stopped after 10 steps, with a torn record of a step that was not saved, then resumed.
        let mut parts = bench.config.clone();
        parts.train.out_dir = bench.dir.path().join("parts");
        parts.train.max_iters = 9;
        bench.train(&parts, &device, false);
        let metrics = parts.train.out_dir.join("metrics.jsonl");
        let torn = std::fs::read_to_string(&metrics).unwrap() + "{\"step\":10,\"loss\":1.0}\n{\"step\":11,\"lo";
        std::fs::write(&metrics, torn).unwrap();
        parts.train.max_iters = whole.train.max_iters;
        bench.train(&parts, &device, true);

        assert_eq!(timeless(&parts.train.out_dir), timeless(&whole.train.out_dir), "{name}: metrics");
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let read =
                |config: &Config| std::fs::read(checkpoint::path(&config.train.out_dir, "last").join(file)).unwrap();
            assert!(read(&whole) == read(&parts), "{name}: {file} differs");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_losses_and_another_seed_does_not() {
    for (name, device) in devices() {
        let bench = Bench::new();
        let run = |seed: u64, dir: &str| {
            let mut config = bench.config.clone();
            config.train.seed = seed;
            config.train.out_dir = bench.dir.path().join(dir);
            bench.train(&config, &device, false);
            losses(&config.train.out_dir)
        };
        let first = run(1, "a");
        assert_eq!(first, run(1, "b"), "{name}");
        assert_ne!(first, run(2, "c"), "{name}");
    }
}

#[test]
fn the_cpu_and_the_gpu_agree_over_twenty_steps() {
    let Some(gpu) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let bench = Bench::new();
    let run = |device: &Device, dir: &str| {
        let mut config = bench.config.clone();
        config.train.out_dir = bench.dir.path().join(dir);
        bench.train(&config, device, false);
        losses(&config.train.out_dir)
    };
    let (cpu, gpu) = (run(&Device::flex(), "cpu"), run(&gpu, "gpu"));
    assert_eq!(cpu.len(), 20);
    assert_close("losses", &gpu, &cpu, 1e-3);
}

#[test]
fn one_batch_is_learned_by_heart() {
    for (name, device) in devices() {
        let bench = Bench::new();
        let mut config = bench.config.clone();
        // A file of one window: every batch is the same sequence.
        let data = bench.dir.path().join("data");
        for split in ["train.bin", "val.bin"] {
            let bytes = std::fs::read(data.join(split)).unwrap();
            std::fs::write(data.join(split), &bytes[..2 * 17]).unwrap();
        }
        config.model.dropout = 0.0;
        config.data.gradient_accumulation_steps = 1;
        config.optim.learning_rate = 1e-2;
        config.train.max_iters = 60;
        config.optim.lr_decay_iters = 60;
        bench.train(&config, &device, false);
        let losses = losses(&config.train.out_dir);
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(first > 3.0 && last < 0.1, "{name}: {first} -> {last}");
    }
}

#[test]
fn accumulated_micro_batches_are_the_mean_of_their_losses() {
    let device = Device::flex();
    let bench = Bench::new();
    let first_loss = |accumulation: usize, dir: &str| {
        let mut config = bench.config.clone();
        config.model.dropout = 0.0;
        config.data.gradient_accumulation_steps = accumulation;
        config.train.max_iters = 3;
        config.optim.learning_rate = 0.0; // the weights stay, so the losses are of the same model
        config.optim.min_lr = 0.0;
        config.train.out_dir = bench.dir.path().join(dir);
        bench.train(&config, &device, false);
        losses(&config.train.out_dir)
    };
    let (one, two) = (first_loss(1, "one"), first_loss(2, "two"));
    assert_close("mean of two", &[two[0], two[1]], &[(one[0] + one[1]) / 2.0, (one[2] + one[3]) / 2.0], 1e-6);
}
