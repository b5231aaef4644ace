//! The loop: it learns, it resumes to the bit, devices and types agree, accumulation is one larger batch, and steps whose
//! numbers are not finite or outliers leave no trace.

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use burn::tensor::{Device, Tensor};
use common::*;
use gpt_wgpu::checkpoint;
use gpt_wgpu::config::Config;
use gpt_wgpu::data::{Batch, Dataset};
use gpt_wgpu::metrics::Record;
use gpt_wgpu::model::Gpt;
use gpt_wgpu::ops::verdict::{self, state};
use gpt_wgpu::optim::Optimizer;
use gpt_wgpu::parameters::{self, Visit};
use gpt_wgpu::prepare::{Source, prepare};
use gpt_wgpu::step::Step;
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

/// Where and in what type of activations a run computes.
struct Way {
    name: &'static str,
    device: Device,
    f16: bool,
}

/// In f32 on every device, and in f16 on the GPU.
fn ways() -> Vec<Way> {
    let f32s = devices().into_iter().map(|(name, device)| Way { name, device, f16: false });
    f32s.chain(gpu_with_f16().map(|device| Way { name: "gpu in f16", device, f16: true })).collect()
}

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
    fn train(&self, config: &Config, way: &Way, resume: bool) {
        let data = Dataset::open(&self.dir.path().join("data"), None, config.model.block_size).unwrap();
        let start = if resume {
            Start::Resume(Box::new(checkpoint::open(&checkpoint::path(&config.train.out_dir, "last")).unwrap()))
        } else {
            Start::Scratch(config.gpt(data.vocab_size()))
        };
        let stop = AtomicBool::new(false);
        let Way { device, f16, .. } = way;
        let (data, f16, tokenizer) = (&data, *f16, None);
        let run = Run { device, data, tokenizer, start, f16, quiet: true, profile: false, stop: &stop };
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
    for way in ways() {
        let name = way.name;
        let bench = Bench::new();
        let mut whole = bench.config.clone();
        whole.train.out_dir = bench.dir.path().join("whole");
        bench.train(&whole, &way, false);

        // Stopped after 10 steps, with a torn record of a step that was not saved, then resumed.
        let mut parts = bench.config.clone();
        parts.train.out_dir = bench.dir.path().join("parts");
        parts.train.max_iters = 9;
        bench.train(&parts, &way, false);
        let metrics = parts.train.out_dir.join("metrics.jsonl");
        let torn = std::fs::read_to_string(&metrics).unwrap() + "{\"step\":10,\"loss\":1.0}\n{\"step\":11,\"lo";
        std::fs::write(&metrics, torn).unwrap();
        parts.train.max_iters = whole.train.max_iters;
        bench.train(&parts, &way, true);

        assert_eq!(timeless(&parts.train.out_dir), timeless(&whole.train.out_dir), "{name}: metrics");
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let read =
                |config: &Config| std::fs::read(checkpoint::path(&config.train.out_dir, "last").join(file)).unwrap();
            assert!(read(&whole) == read(&parts), "{name}: {file} differs");
        }
        let scales: Vec<_> = records(&parts.train.out_dir).into_iter().filter_map(|r| r.loss_scale).collect();
        assert_eq!(scales.len(), if way.f16 { 20 } else { 0 }, "{name}");
    }
}

#[test]
fn the_same_seed_gives_the_same_losses_and_another_seed_does_not() {
    for way in ways() {
        let name = way.name;
        let bench = Bench::new();
        let run = |seed: u64, dir: &str| {
            let mut config = bench.config.clone();
            config.train.seed = seed;
            config.train.out_dir = bench.dir.path().join(dir);
            bench.train(&config, &way, false);
            losses(&config.train.out_dir)
        };
        let first = run(1, "a");
        assert_eq!(first, run(1, "b"), "{name}");
        assert_ne!(first, run(2, "c"), "{name}");
    }
}

#[test]
fn devices_and_types_agree_over_twenty_steps() {
    let bench = Bench::new();
    let runs: Vec<_> = ways()
        .into_iter()
        .map(|way| {
            let mut config = bench.config.clone();
            config.train.out_dir = bench.dir.path().join(way.name);
            bench.train(&config, &way, false);
            let numbers = |number: fn(&Record) -> Option<f64>| {
                records(&config.train.out_dir).iter().filter_map(number).collect::<Vec<_>>()
            };
            (way, [numbers(|r| r.loss), numbers(|r| r.grad_norm)])
        })
        .collect();
    let (_, [cpu_losses, cpu_norms]) = &runs[0];
    assert_eq!((cpu_losses.len(), cpu_norms.len()), (20, 20));
    for (way, [losses, norms]) in &runs[1..] {
        let apart = losses.iter().zip(cpu_losses).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        eprintln!("{}: losses at most {apart:.1e} apart from the CPU's", way.name);
        let [loss_tolerance, norm_tolerance] = if way.f16 { [2e-4, 5e-3] } else { [2e-5, 1e-4] };
        assert!(apart < loss_tolerance, "{}: {losses:?}, on the CPU {cpu_losses:?}", way.name);
        assert_close(way.name, norms, cpu_norms, norm_tolerance);
    }
    if let [_, (_, f32s), (_, f16s)] = &runs[..] {
        assert_ne!(f32s, f16s, "f16 was not computed in f16");
    }
}

#[test]
fn one_batch_is_learned_by_heart() {
    for way in ways() {
        let name = way.name;
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
        bench.train(&config, &way, false);
        let losses = losses(&config.train.out_dir);
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(first > 3.0 && last < 0.1, "{name}: {first} -> {last}");
    }
}

#[test]
fn accumulated_micro_batches_are_the_mean_of_their_losses() {
    let way = Way { name: "cpu", device: Device::flex(), f16: false };
    let bench = Bench::new();
    let first_loss = |accumulation: usize, dir: &str| {
        let mut config = bench.config.clone();
        config.model.dropout = 0.0;
        config.data.gradient_accumulation_steps = accumulation;
        config.train.max_iters = 3;
        config.optim.learning_rate = 0.0; // the weights stay, so the losses are of the same model
        config.optim.min_lr = 0.0;
        config.train.out_dir = bench.dir.path().join(dir);
        bench.train(&config, &way, false);
        losses(&config.train.out_dir)
    };
    let (one, two) = (first_loss(1, "one"), first_loss(2, "two"));
    assert_close("mean of two", &[two[0], two[1]], &[(one[0] + one[1]) / 2.0, (one[2] + one[3]) / 2.0], 1e-6);
}

/// Replaces one number of what a checkpoint's verdicts remember; returns all that there was.
fn rewrite_memory(dir: &Path, place: usize, value: f32) -> Vec<f32> {
    let path = dir.join("optimizer.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let memory = tensors.tensor("memory").unwrap().data();
    let first = memory.as_ptr() as usize - bytes.as_ptr() as usize;
    let old = memory.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    bytes[first + 4 * place..][..4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    old
}

#[test]
fn a_loss_scale_that_is_too_large_is_halved_until_updates_are_made() {
    let Some(device) = gpu_with_f16() else { return };
    let way = Way { name: "gpu in f16", device, f16: true };
    let bench = Bench::new();
    let mut config = bench.config.clone();
    config.train.max_iters = 3;
    bench.train(&config, &way, false);
    let last = checkpoint::path(&config.train.out_dir, "last");
    let too_large = 2f32.powi(33);
    let before = rewrite_memory(&last, state::LOSS_SCALE, too_large);
    let first = verdict::first_scale(config.data.gradient_accumulation_steps);
    assert_eq!((before[state::LOSS_SCALE], before[state::UPDATES]), (first, 4.0));

    config.train.max_iters = 19;
    bench.train(&config, &way, true);
    let records: Vec<_> = records(&config.train.out_dir).into_iter().filter(|r| r.loss.is_some()).collect();
    assert_eq!(records.len(), 20);
    let skipped: Vec<_> = records.iter().map(|r| r.skipped.unwrap_or(0)).collect();
    let all = skipped[19];
    assert!((5..15).contains(&all), "{skipped:?}");
    let mut scale = f64::from(too_large);
    for (i, record) in records.iter().enumerate().skip(4) {
        // Those that are too large come first, one step each; the loss itself is never scaled.
        assert_eq!(skipped[i], all.min(i as u64 - 3), "{skipped:?}");
        scale *= if skipped[i] > skipped[i - 1] { 0.5 } else { 1.0 };
        assert_eq!(record.loss_scale, Some(scale), "step {i}");
        assert!(record.loss.is_some_and(|loss| loss > 1.0 && loss < 5.0), "step {i}: {:?}", record.loss);
    }
    let after = rewrite_memory(&last, state::LOSS_SCALE, 1.0);
    assert_eq!((after[state::UPDATES], after[state::OVERFLOWS]), (20.0 - all as f32, all as f32));
    let bytes = std::fs::read(last.join("model.safetensors")).unwrap();
    for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let mut values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        assert!(values.all(f32::is_finite), "{name}");
    }
}

/// Every parameter's values, one after the other.
struct All(Vec<f64>);

impl Visit for All {
    fn parameter<const D: usize>(&mut self, _: &str, tensor: &Tensor<D>) {
        self.0.extend(values(tensor.clone().inner()));
    }
}

fn all_parameters(model: &Gpt) -> Vec<f64> {
    let mut all = All(Vec::new());
    parameters::visit(model, &mut all);
    all.0
}

/// A batch of targets that are no continuation, once the model has learned what is: its update is left out.
#[test]
fn a_poisoned_batch_is_skipped_where_that_is_asked_for() {
    const GOOD: u64 = 200;
    const VOCABULARY: usize = 37;
    for way in ways() {
        for sigma in [6.0, 0.0] {
            let mut config = Config::parse(CONFIG, "test").unwrap();
            config.model.n_layer = 1;
            config.model.dropout = 0.0;
            config.data.gradient_accumulation_steps = 1;
            config.optim.skip_spike_sigma = sigma;
            let count = config.data.batch_size * config.model.block_size;
            let device = way.device.clone().autodiff();
            let batch = |position: u64| {
                let x: Vec<_> = (0..count).map(|i| ((i * 7 + position as usize) % VOCABULARY) as i32).collect();
                let next = if position == GOOD { 2 } else { 1 };
                let y = x.iter().map(|token| (token * 3 + next) % VOCABULARY as i32).collect();
                Ok(Batch { x, y })
            };
            let step = Step { config: &config, device: &device, batch: &batch };
            let mut model = Gpt::init(&config.gpt(VOCABULARY), 7, &device);
            model.f16 = way.f16;
            let (mut optimizer, mut position) = (Optimizer::new(way.f16, &way.device), 0);
            let mut advance = |model, optimizer: &mut Optimizer| {
                let (model, _) = step.run(model, optimizer, &mut position, 1e-2).unwrap();
                let last = optimizer.last_step().unwrap();
                (model, last)
            };
            let what = format!("{} sigma {sigma}", way.name);
            for i in 0..GOOD {
                let (updated, last) = advance(model, &mut optimizer);
                model = updated;
                assert!(last.applied, "{what}: step {i} was skipped: {last:?}");
            }
            let before = all_parameters(&model);
            let (model, poisoned) = advance(model, &mut optimizer);
            let after = all_parameters(&model);
            let (model, last) = advance(model, &mut optimizer);
            let skips = sigma > 0.0;
            assert_eq!((poisoned.applied, poisoned.spikes), (!skips, u64::from(skips)), "{what}: {poisoned:?}");
            assert!(poisoned.loss > 1.0, "{what}: {poisoned:?}");
            assert_eq!(before == after, skips, "{what}");
            assert!(last.applied && last.updates == GOOD + if skips { 1 } else { 2 }, "{what}: {last:?}");
            assert_ne!(all_parameters(&model), after, "{what}");
        }
    }
}
