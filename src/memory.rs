//! How much device memory a run needs, before it asks for any: pure functions of the run's shape.
//!
//! `estimate` replays the allocations of a few training steps (memory/step.rs) over a model of the pool that serves them
//! (memory/pool.rs). `plan` sets the outcome against what the device has.

pub mod plan;
mod pool;
mod step;

use crate::config::Config;
use crate::kernel::Variant;
use crate::model::GptConfig;
use crate::recompute::Recompute;

/// Largest buffer of any shape, on any device: 2 GiB - 1. wgpu's own limit is higher on some, and drivers fail beyond it.
pub const LARGEST_BUFFER: u64 = (2 << 30) - 1;

/// What CubeCL takes beside the pool, for the parameters of launches (1.6 MiB when it keeps its 512) and for values read back.
const AUXILIARY: u64 = 2 << 20;

/// What computes the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Burn's own operations, of which ours are composed.
    Composed,
    /// The CPU's loops, with so many threads.
    Loops(usize),
    /// Kernels.
    Kernels(Variant),
}

/// All that a run's memory depends on.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The model.
    pub gpt: GptConfig,
    /// Sequences B in a micro-batch.
    pub batch_size: usize,
    /// Whether gradients of several micro-batches are summed: a second set of them.
    pub accumulates: bool,
    /// Whether elements are dropped in training.
    pub dropout: bool,
    /// Whether activations are f16, else f32. Weights, their gradients and moments are f32 always.
    pub f16: bool,
    /// What is computed again instead of kept for the backward.
    pub recompute: Recompute,
    /// What computes.
    pub engine: Engine,
    /// Whether a pool serves the allocations, as it does on every GPU.
    pub pooled: bool,
    /// Bytes of the device's largest buffer.
    pub largest_buffer: u64,
}

impl Shape {
    /// The shape of a configured run of the model `gpt` with activations in f16 (or f32).
    pub fn of(config: &Config, gpt: &GptConfig, f16: bool, engine: Engine, pooled: bool, largest_buffer: u64) -> Self {
        Self {
            gpt: *gpt,
            batch_size: config.data.batch_size,
            accumulates: config.data.gradient_accumulation_steps > 1,
            dropout: config.model.dropout > 0.0,
            f16,
            recompute: config.train.recompute,
            engine,
            pooled,
            largest_buffer: largest_buffer.min(LARGEST_BUFFER),
        }
    }
}

/// Bytes of device memory. The first five are what is alive at the moment at which most is: gradients come while activations
/// go, so their largest amounts do not meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Weights.
    pub parameters: u64,
    /// Gradients of the weights.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward.
    pub activations: u64,
    /// Temporary tensors: logits, cotangents, parts of split products.
    pub workspace: u64,
    /// Reserved and unused then: rests of pages.
    pub unused: u64,
    /// Bytes of the largest tensor, and what it is.
    pub largest_tensor: (u64, &'static str),
    /// What stays reserved between steps. The total is more where larger pages take over from smaller ones within the first step, and both
    /// are there for a while.
    pub settled: u64,
}

impl Estimate {
    /// All of it: what the device has to hold.
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.activations + self.workspace + self.unused
    }
}

/// The memory that training of this shape takes.
pub fn estimate(shape: &Shape) -> Estimate {
    let replay = step::replay(shape);
    let [parameters, gradients, optimizer, activations, workspace] = replay.peak;
    let alive = replay.peak.iter().sum();
    let reserved = if shape.pooled { replay.reserved + AUXILIARY } else { alive };
    Estimate {
        parameters,
        gradients,
        optimizer,
        activations,
        workspace,
        unused: reserved.saturating_sub(alive),
        largest_tensor: replay.largest,
        settled: if shape.pooled { replay.settled + AUXILIARY } else { alive },
    }
}

/// Bytes that the loss of one batch of this shape takes, of which nothing is kept for a backward, and its largest tensor.
pub fn evaluation(shape: &Shape) -> (u64, (u64, &'static str)) {
    let replay = step::replay_evaluation(shape);
    let bytes = if shape.pooled { replay.reserved + AUXILIARY } else { replay.peak.iter().sum() };
    (bytes, replay.largest)
}

/// The largest value in 1..=`most` that `fits`, which holds for a value where it holds for a larger one.
pub fn largest(most: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    if most == 0 || !fits(1) {
        return None;
    }
    let (mut good, mut bad) = (1, 2);
    while bad <= most && fits(bad) {
        (good, bad) = (bad, 2 * bad);
    }
    bad = bad.min(most + 1);
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        if fits(middle) { good = middle } else { bad = middle }
    }
    Some(good)
}
