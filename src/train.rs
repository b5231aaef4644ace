//! The training loop, written out in execution order, with nanoGPT's semantics.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::checkpoint::{self, Checkpoint, State, read};
use crate::config::Config;
use crate::data::{Dataset, Split};
use crate::device;
use crate::failure;
use crate::metrics::{NANOGPT_PEAK, Record, Reporter};
use crate::model::{Gpt, GptConfig};
use crate::ops::dropout::Dropout;
use crate::ops::verdict;
use crate::optim::{self, LastStep, Optimizer};
use crate::profile;
use crate::replay::Replay;
use crate::startup;
use crate::step::{Step, upload};
use crate::warmup;

/// What a run starts from.
pub enum Start {
    /// New weights.
    Scratch(GptConfig),
    /// The given weights, with a new optimizer and step 0.
    Weights(Box<Gpt>),
    /// Everything of a checkpoint.
    Resume(Box<Checkpoint>),
}

impl Start {
    /// The model's shape.
    pub fn shape(&self) -> GptConfig {
        match self {
            Self::Scratch(gpt) => *gpt,
            Self::Weights(model) => model.config,
            Self::Resume(checkpoint) => checkpoint.state.model,
        }
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All iterations done.
    Finished,
    /// Asked to stop; the step was finished and saved.
    Interrupted,
}

/// What [`run`] needs beside the configuration.
pub struct Run<'a> {
    /// Where to compute, without autodiff.
    pub device: &'a Device,
    /// The tokens.
    pub data: &'a Dataset,
    /// The dataset's meta.json, copied into checkpoints where it exists.
    pub tokenizer: Option<PathBuf>,
    /// What to start from.
    pub start: Start,
    /// Whether activations are f16, else f32.
    pub f16: bool,
    /// Prints nothing but errors.
    pub quiet: bool,
    /// Takes one step apart and prints what its kernels cost.
    pub profile: bool,
    /// Set from outside to end the run after the current step.
    pub stop: &'a AtomicBool,
}

/// With --profile: the iterations, counted from the run's first, that are timed whole and taken apart.
const TIMED: u64 = 9;
const PROFILED: u64 = 10;

/// Trains, and returns the model with how the run ended.
///
/// # Errors
/// When a file cannot be written, the data is bad, the device fails, or the loss is no longer finite.
pub fn run(config: &Config, run: Run) -> Result<(Gpt, Ended)> {
    let device = run.device.clone().autodiff();
    let (mut model, mut optimizer, mut state) = begin(config, run.start, run.f16, &device)?;
    let out_dir = &config.train.out_dir;
    let max_iters = config.train.max_iters;
    let flops_per_iter = model.config.flops_per_token() * config.tokens_per_iter() as f64;
    let mut report = Reporter::new(out_dir, state.step, max_iters, run.quiet)?;
    let tokenizer = run.tokenizer.as_deref();
    let (seed, batch_size) = (config.train.seed, config.data.batch_size);
    let batch = |position| Ok(run.data.batch(Split::Train, seed, position, batch_size, config.model.block_size)?);
    let step = Step { config, device: &device, batch: &batch };
    startup::part("weights");
    let mut compiled = Some(warmup::compile(run.device, || step.kernels(&model, &optimizer, state.position))?);
    startup::part("compiling");
    // Launches that are to be timed one by one are made one by one.
    let mut replay = Replay::new(&step, config.train.replay && !run.profile);
    let (first_iter, mut undisturbed_ms) = (state.step, 0.0);
    let mut timed = Timer::start();

    let ended = loop {
        let iter = state.step;
        failure::begin(iter);
        let lr = optim::learning_rate(&config.optim, iter);

        if iter.is_multiple_of(config.train.eval_interval) || config.train.eval_only {
            device::wait(run.device)?; // what is queued is the iterations' time, not the evaluation's
            timed.pause();
            replay.forget(); // the evaluation takes the memory that the recorded step holds
            let started = Instant::now();
            let (train_loss, val_loss) = evaluate(&model, config, run.data, run.device, iter)?;
            let eval_ms = started.elapsed().as_secs_f64() * 1e3;
            report.line(&format!(
                "step {iter}: train loss {train_loss:.4}, val loss {val_loss:.4} (evaluated in {:.1}s)",
                eval_ms / 1e3
            ));
            report.record(&Record {
                step: iter,
                train_loss: Some(train_loss),
                val_loss: Some(val_loss),
                eval_ms: Some(eval_ms),
                ..Record::default()
            })?;
            finite(val_loss, "val loss", iter, config)?;
            if config.train.eval_only {
                break Ended::Finished;
            }
            let best = state.best_val_loss.is_none_or(|best| val_loss < best);
            if best {
                state.best_val_loss = Some(val_loss);
            }
            if iter > 0 {
                let wanted = [("best", best), ("last", best || config.train.always_save_checkpoint)];
                for (name, _) in wanted.into_iter().filter(|(_, wanted)| *wanted) {
                    save(name, &state, &model, &optimizer, tokenizer, &report)?;
                }
            }
            timed.resume();
            startup::part("evaluation");
        }

        let mut directly = |model| step.run(model, &mut optimizer, &mut state.position, lr);
        model = match iter - first_iter {
            // The step before shows what one takes undisturbed; both wait for the device, and count in no time that is logged.
            TIMED if run.profile => {
                device::wait(run.device)?;
                timed.pause();
                let started = Instant::now();
                let (updated, _) = directly(model)?;
                device::wait(run.device)?;
                undisturbed_ms = started.elapsed().as_secs_f64() * 1e3;
                updated
            }
            PROFILED if run.profile => {
                let (stepped, profile) = profile::of(undisturbed_ms, None, || directly(model));
                report.line(&profile.to_string());
                timed.resume();
                stepped?.0
            }
            _ => replay.advance(model, &mut optimizer, &mut state.position, lr)?,
        };
        if startup::is_on() {
            device::wait(run.device)?;
            startup::part("first step");
            startup::end();
        }
        drop(compiled.take()); // by now CubeCL has its own
        state.step += 1;
        timed.iters += 1;

        let stopping = run.stop.load(Ordering::Relaxed);
        let last = state.step > max_iters;
        if iter.is_multiple_of(config.train.log_interval) || last || stopping {
            // With the evaluation the one place where the host waits for the device.
            let last_step = optimizer.last_step()?;
            let LastStep { loss, grad_norm, .. } = last_step;
            let ms = timed.lap();
            let tokens_per_s = config.tokens_per_iter() as f64 / ms * 1e3;
            let mfu = flops_per_iter / (ms / 1e3) / NANOGPT_PEAK;
            report.line(&format!(
                "iter {iter}: loss {loss:.4}, time {ms:.2}ms, mfu {:.2}%, {tokens_per_s:.0} tok/s{}",
                mfu * 100.0,
                skipped(&last_step)
            ));
            report.progress(state.step, Some(format!("loss {loss:.4}")));
            report.record(&Record {
                step: iter,
                loss: Some(loss),
                lr: Some(lr),
                grad_norm: Some(grad_norm),
                ms: Some(ms),
                tokens_per_s: Some(tokens_per_s),
                mfu: Some(mfu),
                loss_scale: run.f16.then_some(last_step.loss_scale),
                skipped: Some(last_step.overflows + last_step.spikes).filter(|&count| count > 0),
                device_memory_bytes: run.device.memory_pool_usage().map(|usage| usage.bytes_reserved),
                ..Record::default()
            })?;
            finite(loss, "loss", iter, config)?;
            // With a loss scale an overflow of the gradients is its business, down to the smallest scale.
            if !run.f16 || last_step.loss_scale <= f64::from(verdict::SCALES.0) {
                finite(grad_norm, "gradient norm", iter, config)?;
            }
        } else {
            report.progress(state.step, None);
        }
        if last || stopping {
            replay.forget();
            save("last", &state, &model, &optimizer, tokenizer, &report)?;
            break if last { Ended::Finished } else { Ended::Interrupted };
        }
    };
    report.finish();
    Ok((model, ended))
}

/// Model, optimizer and state before the first iteration.
fn begin(config: &Config, start: Start, f16: bool, device: &Device) -> Result<(Gpt, Optimizer, State)> {
    let inner = device.clone().without_autodiff();
    let micro_batches = config.data.gradient_accumulation_steps;
    let new_optimizer = || Optimizer::for_micro_batches(micro_batches, f16, &inner);
    let new_state = |model: GptConfig| State {
        version: checkpoint::VERSION,
        step: 0,
        position: 0,
        optimizer_step: None,
        best_val_loss: None,
        model,
        config: config.clone(),
    };
    let (mut model, optimizer, state) = match start {
        Start::Scratch(gpt) => {
            let model = Gpt::init(&gpt, config.train.seed, device);
            (model, new_optimizer(), new_state(gpt))
        }
        Start::Weights(model) => {
            let gpt = model.config;
            (*model, new_optimizer(), new_state(gpt))
        }
        Start::Resume(checkpoint) => {
            let model = checkpoint.model(device)?;
            let optimizer = checkpoint.optimizer(&model, micro_batches, f16, &inner)?;
            let state = State { config: config.clone(), ..checkpoint.state };
            ensure!(
                state.step <= config.train.max_iters,
                "{} is at step {}, and max_iters = {} is done; raise max_iters to go on",
                checkpoint.dir.display(),
                state.step,
                config.train.max_iters
            );
            (model, optimizer, state)
        }
    };
    model.f16 = f16;
    Ok((model, optimizer, state))
}

/// What the log line says of steps without an update.
fn skipped(last_step: &LastStep) -> String {
    let LastStep { overflows, spikes, loss_scale, applied, .. } = *last_step;
    let mut words = String::new();
    if overflows > 0 {
        words += &format!(", {overflows} skipped as not finite (loss scale {loss_scale})");
    }
    if spikes > 0 {
        words += &format!(", {spikes} skipped as outliers");
    }
    if !applied && !words.is_empty() {
        words += ", this one too";
    }
    words
}

/// Mean loss in nats over eval_iters random batches of train and of val, without dropout.
///
/// The batches are a function of the seed and `iter`: a resumed run evaluates on the same ones.
///
/// # Errors
/// When the data is bad or the device fails.
pub fn evaluate(model: &Gpt, config: &Config, data: &Dataset, device: &Device, iter: u64) -> Result<(f64, f64)> {
    /// Keeps the evaluation's batches of train apart from the training's.
    const EVALUATION: u64 = 1 << 63;
    let model = model.valid().rounded(); // the same weights without autodiff
    let (batch_size, block_size) = (config.data.batch_size, config.model.block_size);
    let count = config.train.eval_iters;
    let mean = |split| -> Result<f64> {
        let mut losses = Vec::with_capacity(count);
        for i in 0..count as u64 {
            let position = EVALUATION | (iter * count as u64 + i);
            let batch = data.batch(split, config.train.seed, position, batch_size, block_size)?;
            let (tokens, targets) = upload(&batch, batch_size, device);
            losses.push(model.loss(tokens, targets, Dropout::OFF));
        }
        let sum: f64 = read(Tensor::cat(losses, 0))?.into_iter().map(f64::from).sum();
        Ok(sum / count as f64)
    };
    Ok((mean(Split::Train)?, mean(Split::Val)?))
}

/// Stops a run whose numbers are no longer numbers.
fn finite(value: f64, what: &str, iter: u64, config: &Config) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let kept = failure::kept(&config.train.out_dir);
    bail!("the {what} at iteration {iter} is {value}; {kept}. A lower learning_rate or a grad_clip of 1.0 often helps")
}

fn save(
    name: &str,
    state: &State,
    model: &Gpt,
    optimizer: &Optimizer,
    tokenizer: Option<&std::path::Path>,
    report: &Reporter,
) -> Result<()> {
    let dir = checkpoint::path(&state.config.train.out_dir, name);
    let started = Instant::now();
    checkpoint::save(&dir, state, model, optimizer, tokenizer)?;
    let seconds = started.elapsed().as_secs_f64();
    report.line(&format!("saving checkpoint to {} ({seconds:.1}s)", dir.display()));
    Ok(())
}

/// Wall time of iterations, with evaluation and saving left out.
struct Timer {
    started: Instant,
    paused: Option<Instant>,
    iters: u32,
}

impl Timer {
    fn start() -> Self {
        Self { started: Instant::now(), paused: None, iters: 0 }
    }

    fn pause(&mut self) {
        self.paused = Some(Instant::now());
    }

    fn resume(&mut self) {
        if let Some(paused) = self.paused.take() {
            self.started += paused.elapsed();
        }
    }

    /// Milliseconds an iteration since the last lap.
    fn lap(&mut self) -> f64 {
        let ms = self.started.elapsed().as_secs_f64() * 1e3 / f64::from(self.iters.max(1));
        *self = Self::start();
        ms
    }
}
