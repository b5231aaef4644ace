//! Every setting of a run: one struct is the defaults, the TOML schema and the command line's flags.
//!
//! Names and defaults are nanoGPT's. Precedence: defaults, then the file, then flags.

mod check;
mod text;

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::kernel::Kernels;
use crate::model::GptConfig;
use crate::ops::linear::Gelu;
use crate::precision::Dtype;
use crate::recompute::Recompute;

pub use check::check_model;
pub(crate) use check::{MOST_TOKENS, MOST_VOCABULARY};

/// The configuration that bare `gpt-wgpu train` uses.
pub const QUICKSTART: &str = include_str!("../configs/quickstart.toml");

/// Every setting of a run.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The table `[model]`.
    #[command(flatten)]
    pub model: ModelConfig,
    /// The table `[data]`.
    #[command(flatten)]
    pub data: DataConfig,
    /// The table `[optim]`.
    #[command(flatten)]
    pub optim: OptimConfig,
    /// The table `[train]`.
    #[command(flatten)]
    pub train: TrainConfig,
}

/// The model's shape.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Model")]
pub struct ModelConfig {
    /// Number of blocks
    #[arg(long, default_value_t = Self::default().n_layer, value_parser = whole::<usize>)]
    pub n_layer: usize,
    /// Attention heads in a block; divides n_embd
    #[arg(long, default_value_t = Self::default().n_head, value_parser = whole::<usize>)]
    pub n_head: usize,
    /// Channels
    #[arg(long, default_value_t = Self::default().n_embd, value_parser = whole::<usize>)]
    pub n_embd: usize,
    /// Longest context, in tokens
    #[arg(long, default_value_t = Self::default().block_size, value_parser = whole::<usize>)]
    pub block_size: usize,
    /// Tokens in the vocabulary; 0 takes the dataset's, or 50304 where it names none
    #[arg(long, default_value_t = Self::default().vocab_size, value_parser = whole::<usize>)]
    pub vocab_size: usize,
    /// Chance that an element is dropped, in [0, 1): embeddings, attention, both residual branches
    #[arg(long, default_value_t = Self::default().dropout)]
    pub dropout: f64,
    /// Biases in linear layers and layer norms
    #[arg(long, default_value_t = Self::default().bias, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = parse_bool, action = clap::ArgAction::Set)]
    pub bias: bool,
    /// GELU: the exact one (nanoGPT) or the tanh approximation (OpenAI's GPT-2)
    #[arg(long, value_enum, default_value_t = Self::default().gelu)]
    pub gelu: Gelu,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            n_layer: 12,
            n_head: 12,
            n_embd: 768,
            block_size: 1024,
            vocab_size: 0,
            dropout: 0.0,
            bias: false,
            gelu: Gelu::Erf,
        }
    }
}

/// Where the tokens come from.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Data")]
pub struct DataConfig {
    /// A folder under data_dir (shakespeare_char, shakespeare, builtin, your own), or a path to a folder with train.bin and val.bin
    #[arg(long, default_value_t = Self::default().dataset)]
    pub dataset: String,
    /// Folder that holds the datasets
    #[arg(long, default_value = "data")]
    pub data_dir: PathBuf,
    /// Sequences in a micro-batch
    #[arg(long, default_value_t = Self::default().batch_size, value_parser = whole::<usize>)]
    pub batch_size: usize,
    /// Micro-batches summed before each update
    #[arg(long, default_value_t = Self::default().gradient_accumulation_steps, value_parser = whole::<usize>)]
    pub gradient_accumulation_steps: usize,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { dataset: "openwebtext".into(), data_dir: "data".into(), batch_size: 12, gradient_accumulation_steps: 40 }
    }
}

impl DataConfig {
    /// The dataset's folder: `dataset` where that is a folder with a train.bin, else the one of that name under data_dir.
    pub fn folder(&self) -> PathBuf {
        let named = PathBuf::from(&self.dataset);
        if named.join("train.bin").exists() { named } else { self.data_dir.join(named) }
    }
}

/// AdamW and its schedule.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Optimizer")]
pub struct OptimConfig {
    /// Peak learning rate
    #[arg(long, default_value_t = Self::default().learning_rate)]
    pub learning_rate: f64,
    /// Warmup and cosine decay (true) or a constant rate (false)
    #[arg(long, default_value_t = Self::default().decay_lr, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = parse_bool, action = clap::ArgAction::Set)]
    pub decay_lr: bool,
    /// Iterations of linear warmup
    #[arg(long, default_value_t = Self::default().warmup_iters, value_parser = whole::<u64>)]
    pub warmup_iters: u64,
    /// Iteration at which the decay ends
    #[arg(long, default_value_t = Self::default().lr_decay_iters, value_parser = whole::<u64>)]
    pub lr_decay_iters: u64,
    /// Learning rate after the decay
    #[arg(long, default_value_t = Self::default().min_lr)]
    pub min_lr: f64,
    /// Decoupled weight decay of tensors with two or more dimensions
    #[arg(long, default_value_t = Self::default().weight_decay)]
    pub weight_decay: f64,
    /// Decay of AdamW's first moment
    #[arg(long, default_value_t = Self::default().beta1)]
    pub beta1: f64,
    /// Decay of AdamW's second moment
    #[arg(long, default_value_t = Self::default().beta2)]
    pub beta2: f64,
    /// Largest global gradient norm; 0 switches clipping off
    #[arg(long, default_value_t = Self::default().grad_clip)]
    pub grad_clip: f64,
    /// Skip an update whose loss or gradient norm lies this many standard deviations over the last 128; 0 skips none (llm.c's rule)
    #[arg(long, default_value_t = Self::default().skip_spike_sigma)]
    pub skip_spike_sigma: f64,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            learning_rate: 6e-4,
            decay_lr: true,
            warmup_iters: 2000,
            lr_decay_iters: 600_000,
            min_lr: 6e-5,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            grad_clip: 1.0,
            skip_spike_sigma: 0.0,
        }
    }
}

/// The run itself.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Run")]
pub struct TrainConfig {
    /// Folder for checkpoints, config.toml and metrics.jsonl
    #[arg(long, default_value = "out")]
    pub out_dir: PathBuf,
    /// auto, cpu, metal, vulkan, dx12 or gl, with :N for the N-th adapter
    #[arg(long, default_value_t = Self::default().device)]
    pub device: String,
    /// Kernels: auto, composed (Burn primitives), or on a GPU scalar or coop (cooperative matrices)
    #[arg(long, value_enum, default_value_t = Self::default().kernels)]
    pub kernels: Kernels,
    /// Activations and products: f32, f16 (weights, sums and the loss stay f32), or auto (by device)
    #[arg(long, value_enum, default_value_t = Self::default().dtype)]
    pub dtype: Dtype,
    /// Activations that the backward computes again instead of keeping: none, attention_mlp (all but each half block's input) or block (all but each block's input); either costs a second forward of the blocks, up to a third of a step's time, and gives the same numbers to the bit
    #[arg(long, value_enum, default_value_t = Self::default().recompute)]
    pub recompute: Recompute,
    /// Record a step's launches once and replay them (true), which takes a tenth of the host's time, or make them anew in every step (false): the numbers are the same to the bit
    #[arg(long, default_value_t = Self::default().replay, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = parse_bool, action = clap::ArgAction::Set)]
    pub replay: bool,
    /// Start from: scratch, resume (the last checkpoint in out_dir), or a checkpoint's folder
    #[arg(long, default_value_t = Self::default().init_from)]
    pub init_from: String,
    /// Seed of weights, batches and dropout
    #[arg(long, default_value_t = Self::default().seed, value_parser = whole::<u64>)]
    pub seed: u64,
    /// Last iteration, counted from 0
    #[arg(long, default_value_t = Self::default().max_iters, value_parser = whole::<u64>)]
    pub max_iters: u64,
    /// Iterations between evaluations
    #[arg(long, default_value_t = Self::default().eval_interval, value_parser = whole::<u64>)]
    pub eval_interval: u64,
    /// Random batches in an evaluation, of train and of val each
    #[arg(long, default_value_t = Self::default().eval_iters, value_parser = whole::<usize>)]
    pub eval_iters: usize,
    /// Iterations between log lines; only these wait for the device
    #[arg(long, default_value_t = Self::default().log_interval, value_parser = whole::<u64>)]
    pub log_interval: u64,
    /// Evaluate once and stop
    #[arg(long, default_value_t = Self::default().eval_only, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = parse_bool, action = clap::ArgAction::Set)]
    pub eval_only: bool,
    /// Save the last checkpoint at every evaluation, not only where the val loss improved
    #[arg(long, default_value_t = Self::default().always_save_checkpoint, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = parse_bool, action = clap::ArgAction::Set)]
    pub always_save_checkpoint: bool,
    /// Tokens of the sample that is printed at the end; 0 prints none
    #[arg(long, default_value_t = Self::default().sample_tokens, value_parser = whole::<usize>)]
    pub sample_tokens: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            out_dir: "out".into(),
            device: "auto".into(),
            kernels: Kernels::Auto,
            dtype: Dtype::Auto,
            recompute: Recompute::None,
            replay: true,
            init_from: "scratch".into(),
            seed: 1337,
            max_iters: 600_000,
            eval_interval: 2000,
            eval_iters: 200,
            log_interval: 1,
            eval_only: false,
            always_save_checkpoint: true,
            sample_tokens: 0,
        }
    }
}

/// Why a configuration was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file is not this schema.
    #[error("{place}: {message}")]
    Schema {
        /// File and line, or the flag.
        place: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A value that no model or run can have.
    #[error("{key} = {value}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// The refused value.
        value: String,
        /// Why, and what would be right.
        reason: String,
    },
}

/// nanoGPT writes True and False, TOML and clap true and false.
fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "true" | "True" | "1" => Ok(true),
        "false" | "False" | "0" => Ok(false),
        _ => Err("expected true or false".into()),
    }
}

/// clap's parser of a whole number: what TOML, in which the configuration is kept, has room for.
fn whole<N: TryFrom<i64>>(text: &str) -> Result<N, String> {
    let number = text.parse::<i64>().ok().and_then(|number| N::try_from(number).ok());
    number.ok_or_else(|| format!("expected a whole number, 0 to {}", i64::MAX))
}

impl Config {
    /// The model of this configuration for a vocabulary of `vocab_size` tokens.
    pub fn gpt(&self, vocab_size: usize) -> GptConfig {
        let model = &self.model;
        GptConfig {
            n_layer: model.n_layer,
            n_head: model.n_head,
            n_embd: model.n_embd,
            block_size: model.block_size,
            vocab_size,
            bias: model.bias,
            gelu: model.gelu,
        }
    }

    /// Tokens in one iteration.
    pub fn tokens_per_iter(&self) -> usize {
        self.data.gradient_accumulation_steps * self.data.batch_size * self.model.block_size
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn unknown_keys_name_file_line_and_the_nearest_key() {
        let error = Config::parse("[model]\nn_layer = 2\nn_heads = 4\n", "x.toml").unwrap_err();
        assert_eq!(error.to_string(), "x.toml:3: unknown key `n_heads`; the nearest valid key is `n_head`");
    }

    #[test]
    fn a_wrong_type_names_file_and_line() {
        let error = Config::parse("[model]\nn_layer = \"two\"\n", "x.toml").unwrap_err();
        assert!(error.to_string().starts_with("x.toml:2: invalid type"), "{error}");
    }

    #[test]
    fn printed_configuration_reads_back_equal() {
        let mut config = Config::default();
        config.model.n_layer = 3;
        config.optim.learning_rate = 1e-3;
        assert_eq!(Config::parse(&config.to_toml(), "printed").unwrap(), config);
    }

    #[test]
    fn every_shipped_configuration_parses_and_is_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            Config::load(&path).unwrap().validate().unwrap();
            seen += 1;
        }
        assert!(seen >= 6, "only {seen} configurations");
    }

    #[test]
    fn heads_must_divide_the_channels() {
        let mut config = Config::default();
        config.model.n_head = 7;
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains("multiple of n_head = 7") && error.contains("763"), "{error}");
    }
}
