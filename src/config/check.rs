//! Values that no run can have.

use super::{Config, ConfigError, ModelConfig, OptimConfig};
use crate::model::GptConfig;

/// Beyond these a size is a mistake, and what is counted from it (parameters, bytes, operations) would leave 64 bits.
const MOST_LAYERS: usize = 1 << 10;
const MOST_CHANNELS: usize = 1 << 16;
pub(crate) const MOST_VOCABULARY: usize = 1 << 24;
const MOST_MICRO_BATCHES: usize = 1 << 20;
/// Tokens in a micro-batch: kernels count them in 32 bits.
pub(crate) const MOST_TOKENS: usize = 1 << 31;
/// Batches of an evaluation, whose losses wait on the device.
const MOST_EVALUATED: usize = 1_000_000;

impl Config {
    /// Refuses what no run can have.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |key, value: usize| check(key, value, value > 0, "it must be at least 1".into());
        let ModelConfig { dropout, vocab_size, block_size, .. } = self.model;
        check_model(&self.gpt(if vocab_size == 0 { 1 } else { vocab_size }))?; // 0: the dataset's
        positive("batch_size", self.data.batch_size)?;
        at_most("batch_size", self.data.batch_size, MOST_TOKENS / block_size)?;
        positive("gradient_accumulation_steps", self.data.gradient_accumulation_steps)?;
        at_most("gradient_accumulation_steps", self.data.gradient_accumulation_steps, MOST_MICRO_BATCHES)?;
        positive("eval_iters", self.train.eval_iters)?;
        at_most("eval_iters", self.train.eval_iters, MOST_EVALUATED)?;
        positive("log_interval", self.train.log_interval as usize)?;
        positive("eval_interval", self.train.eval_interval as usize)?;
        let fraction = "it must be at least 0 and less than 1".to_string();
        // in f32, as it is used
        check("dropout", dropout, (0.0..1.0).contains(&(dropout as f32)), fraction.clone())?;
        let OptimConfig { beta1, beta2, learning_rate, grad_clip, weight_decay, min_lr, skip_spike_sigma, .. } =
            self.optim;
        check("beta1", beta1, (0.0..1.0).contains(&beta1), fraction.clone())?;
        check("beta2", beta2, (0.0..1.0).contains(&beta2), fraction)?;
        for (key, value) in [
            ("learning_rate", learning_rate),
            ("min_lr", min_lr),
            ("grad_clip", grad_clip),
            ("weight_decay", weight_decay),
            ("skip_spike_sigma", skip_spike_sigma),
        ] {
            let reason = "it must be a finite number, not negative".into();
            check(key, value, value >= 0.0 && value.is_finite(), reason)?;
        }
        Ok(())
    }
}

fn check(key: &'static str, value: impl std::fmt::Display, good: bool, reason: String) -> Result<(), ConfigError> {
    if good {
        return Ok(());
    }
    let value = value.to_string();
    Err(ConfigError::Value { key, value, reason })
}

fn at_most(key: &'static str, value: usize, most: usize) -> Result<(), ConfigError> {
    check(key, value, value <= most, format!("it must be at most {most}"))
}

/// Refuses sizes that no model can have.
pub fn check_model(gpt: &GptConfig) -> Result<(), ConfigError> {
    let &GptConfig { n_layer, n_head, n_embd, block_size, vocab_size, .. } = gpt;
    for (key, value, most) in [
        ("n_layer", n_layer, MOST_LAYERS),
        ("n_head", n_head, MOST_CHANNELS),
        ("n_embd", n_embd, MOST_CHANNELS),
        ("block_size", block_size, MOST_TOKENS),
        ("vocab_size", vocab_size, MOST_VOCABULARY),
    ] {
        check(key, value, value > 0, "it must be at least 1".into())?;
        at_most(key, value, most)?;
    }
    check(
        "n_embd",
        n_embd,
        n_embd.is_multiple_of(n_head),
        format!("it must be a multiple of n_head = {n_head}; the nearest is {}", (n_embd / n_head).max(1) * n_head),
    )
}
