//! AdamW over all parameters, with nanoGPT's decay groups, global-norm clip and learning-rate schedule.

use std::collections::BTreeMap;

use anyhow::Result;
use burn::module::Module;
use burn::tensor::{Device, Gradients, Tensor, TensorData};

use crate::checkpoint::read;
use crate::config::OptimConfig;
use crate::model::Gpt;
use crate::ops::adamw::{AdamW, Parameter, adamw, square_sums};
use crate::ops::verdict::{self, Rules};
use crate::parameters;

/// A parameter's GPT-2 name, such as `h.0.attn.c_attn.weight`.
pub type Name = String;

/// PyTorch's epsilon.
const EPSILON: f64 = 1e-8;

/// The learning rate of iteration `iter`, counted from 0: linear warmup, cosine decay to `min_lr`, then constant.
pub fn learning_rate(config: &OptimConfig, iter: u64) -> f64 {
    let (lr, min_lr) = (config.learning_rate, config.min_lr);
    if !config.decay_lr {
        return lr;
    }
    if iter < config.warmup_iters {
        return lr * (iter + 1) as f64 / (config.warmup_iters + 1) as f64;
    }
    if iter > config.lr_decay_iters {
        return min_lr;
    }
    let span = config.lr_decay_iters.saturating_sub(config.warmup_iters).max(1);
    let ratio = (iter - config.warmup_iters) as f64 / span as f64;
    min_lr + 0.5 * (1.0 + (std::f64::consts::PI * ratio).cos()) * (lr - min_lr)
}

/// First and second moment of one parameter, flattened.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient (elements).
    pub m: Tensor<1>,
    /// Running mean of its square (elements).
    pub v: Tensor<1>,
}

/// The optimizer's state: what a checkpoint keeps of it.
#[derive(Clone, Debug)]
pub struct Optimizer {
    /// By parameter name.
    pub moments: BTreeMap<Name, Moments>,
    /// What the verdicts on steps remember ([`verdict::state`]), on the device: the loss scale first.
    pub memory: Tensor<1>,
    /// Whether the loss scale moves: with f16.
    dynamic_scale: bool,
}

/// What the last step was, read from the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LastStep {
    /// Mean loss over its tokens, in nats.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Whether the update was made.
    pub applied: bool,
    /// The next step's loss scale.
    pub loss_scale: f64,
    /// Updates made so far.
    pub updates: u64,
    /// Steps skipped so far because a number was not finite.
    pub overflows: u64,
    /// Steps skipped so far as outliers.
    pub spikes: u64,
}

/// Gradients of one step by parameter name, flattened and summed over its micro-steps.
///
/// Each sum is made in place: nothing else holds it, so Burn adds into its memory. What accumulation costs is therefore one set of
/// gradients, 4 bytes a parameter, that stays alive during the next micro-step; a micro-step's own gradients and activations are
/// gone before the next one begins. Where activations are computed again, gradients arrive by the segment, and the second set
/// is never larger than one segment's.
#[derive(Default)]
pub struct GradientSum {
    sum: BTreeMap<Name, Tensor<1>>,
}

impl GradientSum {
    /// Adds one micro-step's gradients.
    pub fn add(&mut self, model: &Gpt, gradients: &mut Gradients) {
        let sum = &mut self.sum;
        parameters::visit(model, &mut Add { sum, gradients });
    }

    /// Adds the gradients of the part of the model that stands at `path`, such as `h.0`.
    pub fn add_part(&mut self, path: &str, part: &impl Module, gradients: &mut Gradients) {
        let sum = &mut self.sum;
        parameters::visit_part(path, part, &mut Add { sum, gradients });
    }

    /// One parameter's gradient.
    pub fn get(&self, name: &str) -> Option<&Tensor<1>> {
        self.sum.get(name)
    }
}

impl Optimizer {
    /// Before the first step on `device` (without autodiff), for activations in f16 (or f32).
    pub fn new(f16: bool, device: &Device) -> Self {
        Self::for_micro_batches(1, f16, device)
    }

    /// The same for steps of several micro-batches, which the first loss scale depends on ([`verdict::first_scale`]).
    pub fn for_micro_batches(count: usize, f16: bool, device: &Device) -> Self {
        Self::with_memory(verdict::first_state(1.0, 0), count, f16, device)
    }

    /// With what the verdicts of earlier steps remember, and no moments yet, for steps of `count` micro-batches. Where those steps
    /// were in the other type, the loss scale begins anew: f32 has none.
    pub fn with_memory(mut memory: Vec<f32>, count: usize, f16: bool, device: &Device) -> Self {
        use verdict::state::{HAS_SCALE, LOSS_SCALE};
        // Checkpoints of earlier versions do not say it; in f32 their scale is 1.
        let had_scale = memory[HAS_SCALE] != 0.0 || memory[LOSS_SCALE] != 1.0;
        if f16 != had_scale {
            memory[LOSS_SCALE] = if f16 { verdict::first_scale(count) } else { 1.0 };
        }
        memory[HAS_SCALE] = f32::from(f16);
        let memory = Tensor::from_data(TensorData::new(memory, [verdict::state::SIZE]), device);
        Self { moments: BTreeMap::new(), memory, dynamic_scale: f16 }
    }

    /// Queues one update from the gradients and the `loss_sum` (1) of `parts` micro-batches, and returns the model.
    ///
    /// The gradients are divided by the loss scale and multiplied by min(1, grad_clip / (norm + 1e-6)) as PyTorch does;
    /// `grad_clip` 0 switches that off. Where the loss or the norm is not finite, or an outlier by `skip_spike_sigma`, nothing
    /// changes but the loss scale; the device decides, and nobody waits.
    pub fn step(
        &mut self,
        model: Gpt,
        gradients: GradientSum,
        (loss_sum, parts): (Tensor<1>, usize),
        config: &OptimConfig,
        lr: f64,
    ) -> Gpt {
        let Some(sums) = square_sums(gradients.sum.values()) else {
            return model;
        };
        let rules = Rules {
            grad_clip: config.grad_clip,
            lr,
            weight_decay: config.weight_decay,
            beta1: config.beta1,
            beta2: config.beta2,
            dynamic_scale: self.dynamic_scale,
            skip_spike_sigma: config.skip_spike_sigma,
            parts,
        };
        // Moved out, so that nobody else holds it and it is rewritten in place.
        let memory = std::mem::replace(&mut self.memory, loss_sum.clone());
        let (memory, verdict) = verdict::verdict(sums, loss_sum, memory, rules);
        self.memory = memory;
        let hyper = AdamW { beta1: config.beta1, beta2: config.beta2, eps: EPSILON };
        // Out of the model, so that nobody else holds them and they are rewritten in place.
        let mut take =
            Take { moments: &mut self.moments, gradients: gradients.sum, names: Vec::new(), taken: Vec::new() };
        let model = parameters::map(model, &mut take);
        let Take { names, taken, .. } = take;
        let mut put = Put { updated: BTreeMap::new() };
        for (name, [p, m, v]) in names.into_iter().zip(adamw(taken, verdict, hyper)) {
            self.moments.insert(name.clone(), Moments { m, v });
            put.updated.insert(name, p);
        }
        parameters::map(model, &mut put)
    }

    /// What the last step was. Waits for the device.
    ///
    /// # Errors
    /// When the device failed.
    pub fn last_step(&self) -> Result<LastStep> {
        use verdict::state::{APPLIED, LOSS, LOSS_SCALE, NORM, OVERFLOWS, SPIKES, UPDATES};
        let memory = read(self.memory.clone())?;
        let number = |place: usize| f64::from(memory[place]);
        Ok(LastStep {
            loss: number(LOSS),
            grad_norm: number(NORM),
            applied: number(APPLIED) != 0.0,
            loss_scale: number(LOSS_SCALE),
            updates: number(UPDATES) as u64,
            overflows: number(OVERFLOWS) as u64,
            spikes: number(SPIKES) as u64,
        })
    }
}

/// Adds each parameter's gradient to the sum.
struct Add<'a> {
    sum: &'a mut BTreeMap<Name, Tensor<1>>,
    gradients: &'a mut Gradients,
}

impl parameters::Visit for Add<'_> {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        let Some(gradient) = tensor.grad_remove(self.gradients) else {
            return;
        };
        let gradient = gradient.flatten::<1>(0, D - 1);
        let sum = match self.sum.remove(name) {
            Some(sum) => sum + gradient,
            None => gradient,
        };
        self.sum.insert(name.to_string(), sum);
    }
}

/// Takes every parameter that has a gradient out of the model, with its moments.
struct Take<'a> {
    moments: &'a mut BTreeMap<Name, Moments>,
    gradients: BTreeMap<Name, Tensor<1>>,
    names: Vec<Name>,
    taken: Vec<Parameter>,
}

impl parameters::Map for Take<'_> {
    /// The gradient stands in its place meanwhile: it has the same shape and is there anyway.
    fn parameter<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) -> Tensor<D> {
        let Some(g) = self.gradients.remove(name) else {
            return tensor;
        };
        let instead = Tensor::from_inner(g.clone().reshape(tensor.shape()));
        let p = tensor.inner().flatten::<1>(0, D - 1);
        let moments = self.moments.remove(name);
        let Moments { m, v } = moments.unwrap_or_else(|| Moments { m: p.zeros_like(), v: p.zeros_like() });
        self.names.push(name.to_string());
        self.taken.push(Parameter { p, g, m, v, decays: decays(D) });
        instead
    }
}

/// Puts the updated parameters into the model.
struct Put {
    updated: BTreeMap<Name, Tensor<1>>,
}

impl parameters::Map for Put {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) -> Tensor<D> {
        match self.updated.remove(name) {
            Some(p) => Tensor::from_inner(p.reshape(tensor.shape())).require_grad(),
            None => tensor,
        }
    }
}

/// Matrices and embeddings decay; biases and norms do not.
pub fn decays(rank: usize) -> bool {
    rank >= 2
}
