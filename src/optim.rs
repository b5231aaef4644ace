//! AdamW over all parameters, with nanoGPT's decay groups, global-norm clip and learning-rate schedule.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Gradients, Tensor};

use crate::config::OptimConfig;
use crate::model::Gpt;
use crate::ops::adamw::{AdamW, adamw, global_norm};
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
#[derive(Clone, Debug, Default)]
pub struct Optimizer {
    /// Updates made so far.
    pub step: u64,
    /// By parameter name.
    pub moments: BTreeMap<Name, Moments>,
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
    /// Applies one update and returns the model and the gradient's norm before clipping, (1), still on the device.
    ///
    /// The gradients are scaled by min(1, grad_clip / (norm + 1e-6)) as PyTorch does; `grad_clip` 0 switches that off.
    pub fn step(
        &mut self,
        model: Gpt,
        gradients: GradientSum,
        config: &OptimConfig,
        lr: f64,
    ) -> (Gpt, Option<Tensor<1>>) {
        let Some((norm, scale)) = global_norm(gradients.sum.values(), config.grad_clip) else {
            return (model, None);
        };
        self.step += 1;
        let mut update = Update { optimizer: self, gradients, config, lr, scale };
        (parameters::map(model, &mut update), Some(norm))
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

/// Replaces each parameter by its updated value.
struct Update<'a> {
    optimizer: &'a mut Optimizer,
    gradients: GradientSum,
    config: &'a OptimConfig,
    lr: f64,
    scale: Tensor<1>,
}

impl parameters::Map for Update<'_> {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) -> Tensor<D> {
        let Some(gradient) = self.gradients.sum.remove(name) else {
            return tensor;
        };
        let hyper = AdamW {
            lr: self.lr,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: EPSILON,
            weight_decay: if decays(D) { self.config.weight_decay } else { 0.0 },
            step: self.optimizer.step,
        };
        let shape = tensor.shape();
        let p = tensor.inner().flatten::<1>(0, D - 1);
        let moments = self.optimizer.moments.remove(name);
        let Moments { m, v } = moments.unwrap_or_else(|| Moments { m: p.zeros_like(), v: p.zeros_like() });
        let (p, m, v) = adamw(p, gradient, m, v, self.scale.clone(), hyper);
        self.optimizer.moments.insert(name.to_string(), Moments { m, v });
        Tensor::<D>::from_inner(p.reshape(shape)).require_grad()
    }
}

/// Matrices and embeddings decay; biases and norms do not.
pub fn decays(rank: usize) -> bool {
    rank >= 2
}
