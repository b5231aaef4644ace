//! One measurement of training speed as a report: warm-up, timed iterations, and what they are set against.
//!
//! What is timed is [`replay::Replay::advance`], the step that training repeats, with batches that are made already. Each sample is one
//! iteration by the host's clock, the device waited for, as docs/bench-schema.md wants it.

mod energy;
mod peak;

use std::time::Instant;

use anyhow::{Result, bail};

pub use energy::Meter;
pub use peak::{Peak, bandwidth, matrix, published};

use crate::config::Config;
use crate::data::{Batch, Dataset, Split};
use crate::device::{self, Chosen, wait};
use crate::kernel::{self, Kernels, Variant};
use crate::model::{Gpt, GptConfig};
use crate::ops::linear::Gelu;
use crate::optim::{self, Optimizer};
use crate::profile::{self, Profile};
use crate::replay::Replay;
use crate::report::{Backend, BenchConfig, BenchReport, Device, Dtype, Machine, Mfu, Op, Timer};
use crate::rng;
use crate::startup;
use crate::step::Step;
use crate::warmup;

/// What to measure. The kernels are the process's choice ([`kernel::choose`]).
pub struct Bench<'a> {
    /// Shape of the batch, optimizer, seed.
    pub config: &'a Config,
    /// The model's shape.
    pub gpt: GptConfig,
    /// Where to compute.
    pub chosen: &'a Chosen,
    /// Whether activations are f16, else f32.
    pub f16: bool,
    /// The tokens; random ones without it, which changes the losses and not the times.
    pub data: Option<&'a Dataset>,
    /// Iterations before the first sample.
    pub warmup: usize,
    /// Samples.
    pub iters: usize,
    /// Whether to measure the device's matrix peak too.
    pub peak: bool,
    /// Whether to take one more step apart by kernel.
    pub ops: bool,
    /// When the program started.
    pub started: Instant,
}

/// Micro-batches that are made, and used in turn.
const BATCHES: u64 = 8;

/// Measures. The second is the step that was taken apart, where that was asked for.
///
/// # Errors
/// When the data is bad, the device fails, or a loss is no number: times of wrong work mean nothing.
pub fn run(bench: &Bench) -> Result<(BenchReport, Option<Profile>)> {
    let Bench { config, chosen, .. } = bench;
    let device = chosen.device.clone().autodiff();
    let batches = (0..BATCHES).map(|position| tokens(bench, position)).collect::<Result<Vec<_>>>()?;
    startup::part("batches");
    let batch = |position: u64| Ok(batches[(position % BATCHES) as usize].clone());
    let step = Step { config, device: &device, batch: &batch };
    let mut model = Gpt::init(&bench.gpt, config.train.seed, &device);
    model.f16 = bench.f16;
    startup::part("weights");
    let (mut optimizer, mut position) =
        (Optimizer::for_micro_batches(config.data.gradient_accumulation_steps, bench.f16, &chosen.device), 0);
    let compiled = warmup::compile(&chosen.device, || step.kernels(&model, &optimizer, position))?;
    startup::part("compiling");
    let mut replay = Replay::new(&step, config.train.replay);
    let (mut samples, mut losses) = (Vec::new(), Vec::new());
    let (mut first_step, mut memory) = (None, None);
    let mut meter = Meter::of(chosen);
    for iter in 0..bench.warmup + bench.iters {
        if iter == bench.warmup {
            meter.start();
        }
        let started = Instant::now();
        let lr = optim::learning_rate(&config.optim, iter as u64);
        model = replay.advance(model, &mut optimizer, &mut position, lr)?;
        wait(&chosen.device)?;
        let ms = started.elapsed().as_secs_f64() * 1e3;
        if first_step.is_none() {
            first_step = Some(bench.started.elapsed().as_secs_f64());
            startup::part("first step");
            startup::end();
        }
        if iter >= bench.warmup {
            samples.push(ms);
            losses.push(optimizer.last_step()?.loss);
            memory = memory.max(chosen.device.memory_pool_usage().map(|usage| usage.bytes_reserved));
        }
    }
    drop(compiled);
    let energy = meter.stop(bench.iters, config.tokens_per_iter());
    replay.forget();
    let last = optimizer.last_step()?;
    let bad_loss = losses.iter().find(|loss| !loss.is_finite()).map(|&loss| ("a loss", loss));
    // A step whose gradients are not finite makes no update, and is none whose time counts.
    let bad_norm = Some(("the last gradient norm", last.grad_norm)).filter(|(_, norm)| !norm.is_finite());
    if let Some((what, bad)) = bad_loss.or(bad_norm) {
        bail!(
            "{what} is {bad}, so the times mean nothing; `gpt-wgpu doctor --device {}` looks for what is wrong",
            chosen.backend
        );
    }

    let (dtype, products) = products(bench);
    let shape = shape(config, &bench.gpt);
    let mut report =
        BenchReport::new(machine(), report_device(chosen), dtype, shape, bench.warmup, samples, Timer::Host);
    let flops = bench.gpt.flops_per_token() * report.tokens_per_s;
    let mfu = |peak: Peak| Mfu { fraction: flops / peak.per_second, peak_flops: peak.per_second, how: peak.how };
    report.commit = option_env!("GPT_WGPU_COMMIT").map(String::from);
    report.products = products;
    report.kernels = Some(kernels(bench));
    report.recompute = config.train.recompute.word().map(String::from);
    let peak = if bench.peak { Some(matrix(chosen, bench.f16)?) } else { None };
    let profile = if bench.ops && chosen.adapter.is_some() {
        let peaks = match &peak {
            Some(peak) => Some((peak.per_second, bandwidth(chosen)?.per_second)),
            None => None,
        };
        let lr = optim::learning_rate(&config.optim, 0);
        let (stepped, profile) =
            profile::of(report.median_ms, peaks, || step.run(model, &mut optimizer, &mut position, lr));
        stepped?;
        Some(profile)
    } else {
        None
    };
    report.mfu_measured = peak.map(mfu);
    report.mfu_published = published(&report.device.name, dtype).map(mfu);
    report.time_to_first_step_s = first_step;
    report.peak_memory_bytes = memory;
    match energy {
        Ok(energy) => report.energy = Some(energy),
        Err(reason) => report.energy_reason = Some(reason),
    }
    let dataset = bench.data.map(|_| format!("tokens of {}", config.data.dataset));
    report.data = Some(dataset.unwrap_or_else(|| "random tokens".into()));
    report.losses = Some(losses);
    report.ops = profile.as_ref().map(ops);
    Ok((report, profile))
}

/// The profile as the report's operations.
fn ops(profile: &Profile) -> Vec<Op> {
    let rate = |amount: f64, ms: f64| Some(amount / ms * 1e3).filter(|rate| rate.is_finite() && *rate > 0.0);
    let op = |row: &profile::Row| Op {
        name: row.name.clone(),
        count: row.count,
        ms: row.ms,
        percent: 100.0 * row.ms / profile.step_ms,
        flops_per_s: rate(row.flops, row.ms),
        bytes_per_s: rate(row.bytes, row.ms),
    };
    profile.rows.iter().map(op).collect()
}

/// tokens and targets of one micro-batch.
fn tokens(bench: &Bench, position: u64) -> Result<Batch> {
    let (seed, batch_size, time) = (bench.config.train.seed, bench.config.data.batch_size, bench.gpt.block_size);
    Ok(match bench.data {
        Some(data) => data.batch(Split::Train, seed, position, batch_size, time)?,
        None => {
            let mut stream = rng::Stream::new(seed, rng::site::DATA_TRAIN);
            let vocabulary = bench.gpt.vocab_size as u64;
            let count = batch_size * time;
            stream.seek(position * 4 * count as u64); // two words a token, of x and of y
            let mut draw =
                || (0..count).map(|_| rng::uniform_u64(stream.next_u64(), vocabulary) as i32).collect::<Vec<_>>();
            Batch { x: draw(), y: draw() }
        }
    })
}

/// The element type of the matrix products, and what it leaves out.
fn products(bench: &Bench) -> (Dtype, Option<String>) {
    let words = if bench.f16 {
        "f16 activations; f32 weights, sums, norms and loss"
    } else if kernel::chosen(&bench.chosen.capabilities, false).is_some_and(Variant::rounds_f32) {
        "f16 inputs and f32 sums where there are kernels on matrix units, else f32; f32 weights"
    } else {
        return (Dtype::Fp32, None);
    };
    (Dtype::Fp16, Some(words.into()))
}

fn kernels(bench: &Bench) -> String {
    match bench.chosen.adapter {
        Some(_) if bench.f16 => format!("{}, f16 activations", kernel::describe(&bench.chosen.capabilities, true)),
        Some(_) => kernel::describe(&bench.chosen.capabilities, false),
        None if kernel::choice() == Kernels::Composed => "Burn's Flex backend".into(),
        None => "fused loops on Burn's Flex backend".into(),
    }
}

/// This computer.
pub fn machine() -> Machine {
    use sysinfo::System;
    Machine {
        os: System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.into()),
        arch: System::cpu_arch(),
        cpu: device::cpu_name(),
        threads: std::thread::available_parallelism().map_or(1, |threads| threads.get()),
    }
}

fn report_device(chosen: &Chosen) -> Device {
    let backend = match chosen.backend {
        "metal" => Backend::Metal,
        "vulkan" => Backend::Vulkan,
        "dx12" => Backend::Dx12,
        "gl" => Backend::Gl,
        _ => Backend::Cpu,
    };
    match &chosen.adapter {
        Some(adapter) => Device {
            backend,
            name: adapter.name.clone(),
            driver: Some(adapter.driver.clone()).filter(|driver| !driver.is_empty()),
            memory_bytes: adapter.memory_bytes,
        },
        None => Device { backend, name: device::cpu_name(), driver: None, memory_bytes: None },
    }
}

fn shape(config: &Config, gpt: &GptConfig) -> BenchConfig {
    BenchConfig {
        n_layer: gpt.n_layer,
        n_head: gpt.n_head,
        n_embd: gpt.n_embd,
        block_size: gpt.block_size,
        vocab_size: gpt.vocab_size,
        dropout: config.model.dropout,
        bias: gpt.bias,
        gelu: match gpt.gelu {
            Gelu::Erf => "erf".into(),
            Gelu::Tanh => "tanh".into(),
        },
        batch_size: config.data.batch_size,
        gradient_accumulation_steps: config.data.gradient_accumulation_steps,
    }
}
