//! Values that no run can have.

use super::{Config, ConfigError, ModelConfig, OptimConfig};

impl Config {
    /// Refuses what no run can have.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |key, value: usize| check(key, value, value > 0, "it must be at least 1".into());
        let ModelConfig { n_layer, n_head, n_embd, block_size, dropout, .. } = self.model;
        positive("n_layer", n_layer)?;
        positive("n_head", n_head)?;
        positive("n_embd", n_embd)?;
        positive("block_size", block_size)?;
        positive("batch_size", self.data.batch_size)?;
        positive("gradient_accumulation_steps", self.data.gradient_accumulation_steps)?;
        positive("eval_iters", self.train.eval_iters)?;
        positive("log_interval", self.train.log_interval as usize)?;
        positive("eval_interval", self.train.eval_interval as usize)?;
        check(
            "n_embd",
            n_embd,
            n_embd.is_multiple_of(n_head),
            format!("it must be a multiple of n_head = {n_head}; the nearest is {}", (n_embd / n_head).max(1) * n_head),
        )?;
        let fraction = "it must be at least 0 and less than 1".to_string();
        check("dropout", dropout, (0.0..1.0).contains(&dropout), fraction.clone())?;
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
