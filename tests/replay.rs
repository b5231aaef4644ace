//! Recorded steps: the same numbers to the bit as steps made anew, with what changes from step to step, through evaluations,
//! checkpoints and overflows; and what happens where a step cannot be recorded.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Tensor};
use common::guarded::primitive;
use common::*;
use gpt_wgpu::checkpoint::{self, read};
use gpt_wgpu::config::Config;
use gpt_wgpu::data::{Batch, Dataset};
use gpt_wgpu::metrics::Record;
use gpt_wgpu::model::Gpt;
use gpt_wgpu::ops::verdict::state;
use gpt_wgpu::optim::{self, Optimizer};
use gpt_wgpu::parameters::{self, Visit};
use gpt_wgpu::prepare::{Source, prepare};
use gpt_wgpu::recompute::Recompute;
use gpt_wgpu::replay::Replay;
use gpt_wgpu::step::{self, Step};
use gpt_wgpu::train::{self, Ended, Run, Start};

const VOCABULARY: usize = 37;

/// Tests of this file run one after the other: they look at what the device's pool can give, which all threads share.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A small model with everything in it: dropout, biases, a moving learning rate.
fn config(accumulation: usize, recompute: Recompute) -> Config {
    let mut config = Config::default();
    (config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size) = (2, 2, 32, 19);
    (config.model.dropout, config.model.bias) = (0.1, true);
    (config.data.batch_size, config.data.gradient_accumulation_steps) = (3, accumulation);
    (config.optim.learning_rate, config.optim.warmup_iters, config.optim.lr_decay_iters) = (1e-2, 4, 9);
    config.train.recompute = recompute;
    config
}

/// Random tokens and targets.
fn batch(config: &Config, position: u64) -> Batch {
    let (mut random, count) = (Random(position + 1), config.data.batch_size * config.model.block_size);
    let mut draw = || (0..count).map(|_| random.below(VOCABULARY) as i32).collect();
    Batch { x: draw(), y: draw() }
}

/// Bits of tensors, by name.
#[derive(Debug, Default, PartialEq)]
struct Bits(BTreeMap<String, Vec<u32>>);

impl Bits {
    fn insert<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) {
        self.0.insert(name.into(), read(tensor).unwrap().into_iter().map(f32::to_bits).collect());
    }

    /// The names of those that are not in `other` to the bit.
    fn apart(&self, other: &Self) -> Vec<&String> {
        assert_eq!(self.0.len(), other.0.len());
        self.0.iter().filter(|(name, bits)| other.0.get(*name) != Some(bits)).map(|(name, _)| name).collect()
    }
}

impl Visit for Bits {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        self.insert(name, tensor.clone().inner());
    }
}

/// Something that a test does beside the steps.
type Between<'a> = &'a mut dyn FnMut(usize, &mut Replay, &mut Gpt, &mut Optimizer);

/// Parameters, moments, and what the verdicts remember after each of ten steps: losses, norms, the loss scale. `between` is called
/// before each.
fn ten_steps(inner: &Device, f16: bool, config: &Config, replayed: bool, between: Between) -> Bits {
    let device = inner.clone().autodiff();
    let batch = |position| Ok(batch(config, position));
    let step = Step { config, device: &device, batch: &batch };
    let mut model = Gpt::init(&config.gpt(VOCABULARY), 7, &device);
    model.f16 = f16;
    let (mut optimizer, mut position, mut bits) = (Optimizer::new(f16, inner), 0, Bits::default());
    let mut replay = Replay::new(&step, replayed);
    for i in 0..10 {
        between(i, &mut replay, &mut model, &mut optimizer);
        let lr = optim::learning_rate(&config.optim, i as u64);
        model = replay.advance(model, &mut optimizer, &mut position, lr).unwrap();
        bits.insert(&format!("memory after step {i}"), optimizer.memory.clone());
    }
    assert_eq!(position, 10 * config.data.gradient_accumulation_steps as u64);
    parameters::visit(&model, &mut bits);
    for (name, moments) in &optimizer.moments {
        bits.insert(&format!("m of {name}"), moments.m.clone());
        bits.insert(&format!("v of {name}"), moments.v.clone());
    }
    bits
}

/// The GPU in f32 and, where its shaders have it, in f16.
fn ways() -> Vec<(Device, bool)> {
    let in_f32 = gpu().map(|device| (device, false));
    in_f32.into_iter().chain(gpu_with_f16().map(|device| (device, true))).collect()
}

#[test]
fn replayed_steps_are_steps_made_anew_to_the_bit() {
    let _alone = alone();
    for (device, f16) in ways() {
        for recompute in [Recompute::None, Recompute::AttentionMlp, Recompute::Block] {
            for accumulation in [1, 2] {
                let config = config(accumulation, recompute);
                let mut recorded = Vec::new();
                let mut look = |i: usize, replay: &mut Replay, model: &mut Gpt, _: &mut Optimizer| {
                    recorded.push(replay.is_recorded());
                    if i == 6 {
                        // As an evaluation does
                        replay.forget();
                        let (x, y) = step::upload(&batch(&config, 99), config.data.batch_size, &device);
                        use burn::module::Module;
                        let dropout = gpt_wgpu::ops::dropout::Dropout::OFF;
                        assert!(values(model.valid().rounded().loss(x, y, dropout))[0].is_finite());
                    }
                };
                let got = ten_steps(&device, f16, &config, true, &mut look);
                let want = ten_steps(&device, f16, &config, false, &mut |_, _, _, _| ());
                let what = format!("{recompute:?}, f16 {f16}, {accumulation} micro-batches");
                assert_eq!(got.apart(&want), Vec::<&String>::new(), "{what}");
                let steps = [false, false, false, true, true, true, true, false, true, true];
                assert_eq!(recorded, steps, "{what}: what was replayed");
            }
        }
    }
}

/// An overflow is skipped in a replay as in a step made anew, and moves the loss scale.
#[test]
fn an_overflow_in_a_replayed_step_halves_the_loss_scale() {
    let _alone = alone();
    let Some(device) = gpu_with_f16() else { return };
    let config = config(2, Recompute::None);
    let run = |replayed| {
        let mut scale_up = |i: usize, _: &mut Replay, _: &mut Gpt, optimizer: &mut Optimizer| {
            if i == 5 {
                let mut bytes = Vec::new();
                let mut memory = read(optimizer.memory.clone()).unwrap();
                memory[state::LOSS_SCALE] = 2f32.powi(33);
                memory.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
                let memory = primitive(optimizer.memory.clone());
                memory.client.write(&memory.handle, cubecl::bytes::Bytes::from_bytes_vec(bytes));
            }
        };
        ten_steps(&device, true, &config, replayed, &mut scale_up)
    };
    let (got, want) = (run(true), run(false));
    assert_eq!(got.apart(&want), Vec::<&String>::new());
    let last = f32::from_bits(got.0["memory after step 9"][state::OVERFLOWS]);
    assert!(last >= 3.0, "{last} overflows");
}

/// Where the pool has not the memory that the recording was to find, it fails, and the step is made anew, as are all others.
#[test]
fn a_failed_recording_loses_nothing() {
    let _alone = alone();
    for (device, f16) in ways() {
        // Whose activations fill pages of their own
        let mut config = config(2, Recompute::None);
        (config.data.batch_size, config.model.block_size) = (16, 64);
        let mut recorded = Vec::new();
        let mut starve = |i: usize, replay: &mut Replay, _: &mut Gpt, _: &mut Optimizer| {
            recorded.push(replay.is_recorded());
            if i == 2 {
                let before = device.memory_pool_usage().unwrap().bytes_reserved;
                device.memory_cleanup();
                eprintln!("{before} bytes, {} now", device.memory_pool_usage().unwrap().bytes_reserved);
            }
        };
        let got = ten_steps(&device, f16, &config, true, &mut starve);
        let want = ten_steps(&device, f16, &config, false, &mut |_, _, _, _| ());
        assert_eq!(got.apart(&want), Vec::<&String>::new(), "f16 {f16}");
        assert_eq!(recorded, [false; 10], "f16 {f16}");
    }
}

/// Another recording on its way is in the way of ours.
#[test]
fn a_recording_that_is_refused_loses_nothing() {
    let _alone = alone();
    let Some(device) = gpu() else { return };
    let config = config(1, Recompute::None);
    let client = primitive(tensor(&[0.0], [1], &device)).client;
    for blocked in [1, 2] {
        let mut block = |i: usize, _: &mut Replay, _: &mut Gpt, _: &mut Optimizer| {
            match i == blocked {
                // Before the preparation; between it and the recording, which was given up by somebody else
                true if blocked == 1 => client.graph_prepare().unwrap(),
                true => drop(client.stop_capture().unwrap_err()),
                false => {}
            }
        };
        let got = ten_steps(&device, false, &config, true, &mut block);
        if blocked == 1 {
            client.stop_capture().unwrap_err();
        }
        let want = ten_steps(&device, false, &config, false, &mut |_, _, _, _| ());
        assert_eq!(got.apart(&want), Vec::<&String>::new());
    }
}

/// A parameter that somebody else holds is not rewritten in place: the step that finds this out is still right.
#[test]
fn a_moment_that_is_held_is_not_recorded() {
    let _alone = alone();
    let Some(device) = gpu() else { return };
    let config = config(2, Recompute::None);
    let want = ten_steps(&device, false, &config, false, &mut |_, _, _, _| ());
    // At the step that warms up, and at the one that is recorded
    for held_at in [1, 2] {
        let (mut held, mut recorded) = (None, Vec::new());
        let mut hold = |i: usize, replay: &mut Replay, _: &mut Gpt, optimizer: &mut Optimizer| {
            held = if i == held_at { optimizer.moments.values().next().cloned() } else { None };
            recorded.push(replay.is_recorded());
        };
        let got = ten_steps(&device, false, &config, true, &mut hold);
        assert_eq!(got.apart(&want), Vec::<&String>::new(), "held at step {held_at}");
        assert_eq!(recorded, [false; 10], "held at step {held_at}");
        drop(held);
    }
}

const RUN: &str = "
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 16
dropout = 0.1
[data]
batch_size = 4
gradient_accumulation_steps = 2
[optim]
learning_rate = 1e-3
warmup_iters = 4
lr_decay_iters = 20
min_lr = 1e-4
[train]
max_iters = 19
eval_interval = 7
eval_iters = 2
log_interval = 1
";

/// Trains into `out_dir` to `max_iters`, from scratch or from the checkpoint that is there.
fn train_to(max_iters: u64, dir: &Path, out_dir: &str, (device, f16): (&Device, bool), replay: bool, resume: bool) {
    let mut config = Config::parse(RUN, "test").unwrap();
    config.train.out_dir = dir.join(out_dir);
    (config.train.max_iters, config.train.replay) = (max_iters, replay);
    let data = Dataset::open(&dir.join("data"), None, config.model.block_size).unwrap();
    let start = if resume {
        Start::Resume(Box::new(checkpoint::open(&checkpoint::path(&config.train.out_dir, "last")).unwrap()))
    } else {
        Start::Scratch(config.gpt(data.vocab_size()))
    };
    let (data, stop) = (&data, AtomicBool::new(false));
    let run = Run { device, data, tokenizer: None, start, f16, quiet: true, profile: false, stop: &stop };
    let (_, ended) = train::run(&config, run).unwrap();
    assert_eq!(ended, Ended::Finished);
}

/// What a run logged, without the wall clock and the allocator, and the files of its last checkpoint.
fn left(dir: &Path, out_dir: &str) -> (Vec<Record>, [Vec<u8>; 2]) {
    let out_dir = dir.join(out_dir);
    let text = std::fs::read_to_string(out_dir.join("metrics.jsonl")).unwrap();
    let strip =
        |record| Record { ms: None, tokens_per_s: None, mfu: None, eval_ms: None, device_memory_bytes: None, ..record };
    let records = text.lines().map(|line| strip(serde_json::from_str(line).unwrap())).collect();
    let last = checkpoint::path(&out_dir, "last");
    (records, ["model.safetensors", "optimizer.safetensors"].map(|file| std::fs::read(last.join(file)).unwrap()))
}

#[test]
fn a_run_with_replays_is_the_run_without_them_and_so_is_its_resumption() {
    let _alone = alone();
    for (device, f16) in ways() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        prepare(&Source::Builtin, &dir.join("data"), None, false).unwrap();
        let way = (&device, f16);
        train_to(19, dir, "anew", way, false, false);
        train_to(19, dir, "replayed", way, true, false);
        train_to(11, dir, "parts", way, true, false);
        train_to(19, dir, "parts", way, true, true);
        let want = left(dir, "anew");
        assert_eq!(want.0.iter().filter(|record| record.loss.is_some()).count(), 20);
        for out_dir in ["replayed", "parts"] {
            let got = left(dir, out_dir);
            assert_eq!(got.0, want.0, "{out_dir}, f16 {f16}: metrics");
            assert!(got.1 == want.1, "{out_dir}, f16 {f16}: the checkpoint differs");
        }
    }
}
