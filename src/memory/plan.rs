//! Whether a run fits its device, and which settings would make it fit.

use std::fmt;

use crate::config::{Config, MOST_TOKENS};
use crate::device::Chosen;
use crate::kernel::{self, Kernels};
use crate::memory::{Engine, Estimate, LARGEST_BUFFER, Shape, estimate, evaluation, largest};
use crate::model::GptConfig;
use crate::precision::Dtype;
use crate::recompute::Recompute;

/// What a device has.
#[derive(Clone, Debug)]
pub struct Budget {
    /// Bytes that a run may take, where that is known.
    pub bytes: Option<u64>,
    /// What `bytes` are, or why they are not known.
    pub source: &'static str,
    /// How the user gets more of them.
    pub hint: Option<&'static str>,
    /// Bytes of the largest buffer.
    pub largest_buffer: u64,
    /// Whether a pool serves the allocations, as on every GPU.
    pub pooled: bool,
    /// Whether activations will be f16, else f32.
    pub f16: bool,
    /// Whether they can be f16.
    pub has_f16: bool,
    /// What will compute in f32 and in f16.
    pub engines: [Engine; 2],
}

impl Budget {
    /// The budget of an opened device for a run with activations in f16 (or f32).
    pub fn of(chosen: &Chosen, f16: bool) -> Self {
        const WIRED: &str = "`sudo sysctl iogpu.wired_limit_mb=N` lets the GPU have N MiB, until the next start";
        let bytes = chosen.memory_bytes();
        let (source, hint) = match chosen.backend {
            _ if bytes.is_none() => ("not known: this API does not tell", None),
            "metal" => ("recommended by Metal", Some(WIRED)),
            "cpu" => ("all memory of this computer", None),
            _ => ("the device's own memory, in use by others or not", None),
        };
        Self {
            bytes,
            source,
            hint,
            largest_buffer: match &chosen.adapter {
                Some(_) => chosen.capabilities.largest_buffer().min(LARGEST_BUFFER),
                None => u64::MAX,
            },
            pooled: chosen.adapter.is_some(),
            f16,
            has_f16: Dtype::F16.resolve(chosen, kernel::choice()).is_ok(),
            engines: [false, true].map(|f16| match &chosen.adapter {
                Some(_) => kernel::chosen(&chosen.capabilities, f16).map_or(Engine::Composed, Engine::Kernels),
                None if kernel::choice() == Kernels::Composed => Engine::Composed,
                None => Engine::Loops(rayon::current_num_threads()),
            }),
        }
    }
}

/// A run set against a device.
pub struct Plan<'a> {
    config: &'a Config,
    gpt: GptConfig,
    budget: Budget,
    /// Whether the model's shape is given, by a checkpoint or weights.
    fixed: bool,
    /// What it takes.
    pub estimate: Estimate,
}

/// A setting that may make a run fit: its text with the value that does.
type Remedy = fn(&Plan) -> Option<String>;

/// The settings that are offered, the most harmless first, each with whether it changes the model.
const REMEDIES: [(Remedy, bool); 5] =
    [(smaller_batch, false), (less_kept, false), (half_precision, false), (shorter_block, true), (fewer_layers, true)];

/// Remedies that a refusal names at most.
const OFFERED: usize = 3;

/// No batch is sought beyond this.
const MOST_SEQUENCES: usize = 1 << 16;

impl<'a> Plan<'a> {
    /// The plan for a configured run of the model `gpt`; `fixed`: its shape comes from a checkpoint.
    pub fn new(config: &'a Config, gpt: &GptConfig, budget: Budget, fixed: bool) -> Self {
        let estimate = estimate(&shape(config, gpt, &budget));
        Self { config, gpt: *gpt, budget, fixed, estimate }
    }

    fn fits(&self, config: &Config, gpt: &GptConfig) -> bool {
        let is_counted = config.data.batch_size.checked_mul(gpt.block_size).is_some_and(|rows| rows <= MOST_TOKENS);
        is_counted && is_within(&estimate(&shape(config, gpt, &self.budget)), &self.budget)
    }

    /// The largest batch_size that fits, where the device's memory is known and one does.
    pub fn largest_batch(&self) -> Option<usize> {
        self.budget.bytes?;
        largest(MOST_SEQUENCES, |batch_size| {
            let mut config = self.config.clone();
            config.data.batch_size = batch_size;
            self.fits(&config, &self.gpt)
        })
    }

    /// Why not even an evaluation can be; None where it can or the device's memory is not known.
    pub fn evaluation_refusal(&self) -> Option<String> {
        let (needed, (largest, what)) = evaluation(&shape(self.config, &self.gpt, &self.budget));
        let budget = &self.budget;
        let why = match budget.bytes {
            Some(bytes) if needed > bytes => {
                format!("needs about {} and the device has {} ({})", mib(needed), mib(bytes), budget.source)
            }
            _ if budget.pooled && largest > budget.largest_buffer => format!(
                "needs a buffer of {} ({what}) and the device's largest is {}",
                mib(largest),
                mib(budget.largest_buffer)
            ),
            _ => return None,
        };
        Some(format!("an evaluation {why}. A smaller batch_size needs less"))
    }

    /// Why the run cannot be, with what can; None where it fits or the device's memory is not known.
    pub fn refusal(&self) -> Option<String> {
        let (needed, budget) = (self.estimate.total(), &self.budget);
        if is_within(&self.estimate, budget) {
            return None;
        }
        let (largest, what) = self.estimate.largest_tensor;
        let why = match budget.bytes {
            Some(bytes) if needed > bytes => {
                format!("this run needs about {} and the device has {} ({})", mib(needed), mib(bytes), budget.source)
            }
            _ => format!(
                "this run needs a buffer of {} ({what}) and the device's largest is {}",
                mib(largest),
                mib(budget.largest_buffer)
            ),
        };
        let offers: Vec<String> = REMEDIES
            .iter()
            .filter(|(_, changes_model)| !(self.fixed && *changes_model))
            .filter_map(|(remedy, _)| remedy(self))
            .take(OFFERED)
            .collect();
        let mut text = match offers.len() {
            0 => format!(
                "{why}. No one setting makes it fit: a smaller model does, or --device cpu where there is more memory"
            ),
            1 => format!("{why}. It fits with\n  {}", offers[0]),
            _ => format!("{why}. It fits with any one of\n  {}", offers.join("\n  ")),
        };
        if let Some(hint) = budget.hint {
            text.push_str(&format!("\n{hint}"));
        }
        Some(text)
    }
}

fn shape(config: &Config, gpt: &GptConfig, budget: &Budget) -> Shape {
    let engine = budget.engines[usize::from(budget.f16)];
    Shape::of(config, gpt, budget.f16, engine, budget.pooled, budget.largest_buffer)
}

fn is_within(estimate: &Estimate, budget: &Budget) -> bool {
    let buffers = !budget.pooled || estimate.largest_tensor.0 <= budget.largest_buffer;
    buffers && budget.bytes.is_none_or(|bytes| estimate.total() <= bytes)
}

/// The same tokens an iteration in smaller micro-batches.
fn smaller_batch(plan: &Plan) -> Option<String> {
    let (batch, steps) = (plan.config.data.batch_size, plan.config.data.gradient_accumulation_steps);
    let fits = |smaller: usize| {
        let mut config = plan.config.clone();
        config.data.batch_size = smaller;
        config.data.gradient_accumulation_steps = (batch * steps / smaller).max(2); // any number but 1 takes the same
        plan.fits(&config, &plan.gpt)
    };
    let most = largest(batch - 1, fits)?;
    let fitting = (1..=most).rev().filter(|&smaller| (batch * steps).is_multiple_of(smaller)).find(|&it| fits(it))?;
    let steps = batch * steps / fitting;
    Some(format!("batch_size = {fitting} and gradient_accumulation_steps = {steps}, the same tokens an iteration"))
}

/// Activations computed again, the fewest that make it fit.
fn less_kept(plan: &Plan) -> Option<String> {
    let mut config = plan.config.clone();
    let more =
        [Recompute::AttentionMlp, Recompute::Block].into_iter().filter(|&mode| mode > plan.config.train.recompute);
    let words = more.filter_map(|mode| {
        config.train.recompute = mode;
        plan.fits(&config, &plan.gpt).then(|| mode.word()).flatten()
    });
    words.take(1).map(|word| format!("recompute = {word}")).next()
}

/// Activations in f16.
fn half_precision(plan: &Plan) -> Option<String> {
    let half = Budget { f16: true, ..plan.budget.clone() };
    let can = plan.budget.has_f16 && !plan.budget.f16;
    let fits = can && is_within(&estimate(&shape(plan.config, &plan.gpt, &half)), &half);
    fits.then(|| "dtype = f16".into())
}

/// A shorter context.
fn shorter_block(plan: &Plan) -> Option<String> {
    /// Lengths that are offered are multiples of this where they are longer.
    const UNIT: usize = 64;
    let shorter = |time: usize| plan.fits(plan.config, &GptConfig { block_size: time, ..plan.gpt });
    let most = plan.gpt.block_size - 1;
    let time = match largest(most / UNIT, |units| shorter(units * UNIT)) {
        Some(units) if most >= UNIT => units * UNIT,
        _ => largest(most.min(UNIT), shorter)?,
    };
    Some(format!("block_size = {time}"))
}

/// A shallower model.
fn fewer_layers(plan: &Plan) -> Option<String> {
    let most = plan.gpt.n_layer - 1;
    let layers = largest(most, |n_layer| plan.fits(plan.config, &GptConfig { n_layer, ..plan.gpt }))?;
    Some(format!("n_layer = {layers}"))
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let estimate = &self.estimate;
        writeln!(f, "device memory that training takes, where most is alive at once:")?;
        let rows = [
            ("parameters", estimate.parameters),
            ("gradients", estimate.gradients),
            ("optimizer", estimate.optimizer),
            ("activations", estimate.activations),
            ("workspace", estimate.workspace),
            ("rests of pages", estimate.unused),
            ("total", estimate.total()),
        ];
        for (name, bytes) in rows {
            writeln!(f, "  {name:<15}{:>14}", mib(bytes))?;
        }
        let (largest, what) = estimate.largest_tensor;
        writeln!(f, "largest tensor: {} ({what})", mib(largest))?;
        match self.budget.bytes {
            Some(bytes) => writeln!(f, "the device has: {} ({})", mib(bytes), self.budget.source)?,
            None => writeln!(f, "the device has: {}", self.budget.source)?,
        }
        match (self.budget.bytes, self.largest_batch()) {
            (None, _) => write!(f, "largest batch_size that fits: not known"),
            (_, Some(batch)) => write!(f, "largest batch_size that fits: {batch}"),
            (_, None) => write!(f, "largest batch_size that fits: none"),
        }
    }
}
