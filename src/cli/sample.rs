//! `gpt-wgpu sample`, with nanoGPT's flags.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;

use super::best_or_last;
use crate::checkpoint;
use crate::device;
use crate::sample::{Sampling, generate};
use crate::terminal::stream;
use crate::tokenizer::{Meta, Tokenizer};

#[derive(Args)]
pub struct SampleArgs {
    /// The run's folder
    #[arg(long, default_value = "out-quickstart")]
    out_dir: PathBuf,
    /// Which checkpoint: last or best; without it, best where there is one
    #[arg(long)]
    checkpoint: Option<String>,
    /// Prompt: text, or FILE:path
    #[arg(long, default_value = "\n", hide_default_value = true)]
    start: String,
    /// Samples to write
    #[arg(long, default_value_t = 10)]
    num_samples: u64,
    /// Tokens in a sample
    #[arg(long, default_value_t = 500)]
    max_new_tokens: usize,
    /// Divides the logits: below 1 safer, above 1 wilder, 0 the most likely token always
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw only from this many of the most likely tokens; 0 is all
    #[arg(long, default_value_t = 200)]
    top_k: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// auto, cpu, metal, vulkan, dx12 or gl, with :N for the N-th adapter
    #[arg(long, default_value = "auto")]
    device: String,
}

pub fn run(args: &SampleArgs) -> Result<()> {
    ensure!(
        args.temperature >= 0.0 && args.temperature.is_finite(),
        "--temperature {}: it must be a finite number, not negative",
        args.temperature
    );
    let prompt = match args.start.strip_prefix("FILE:") {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read the prompt {path}"))?,
        None => args.start.clone(),
    };
    let checkpoint = checkpoint::open(&best_or_last(&args.out_dir, args.checkpoint.as_deref()))?;
    let meta = Meta::load(&checkpoint.dir)?.ok_or_else(|| {
        anyhow!(
            "{} has no {}: the dataset it was trained on came without a tokenizer, so text cannot be made",
            checkpoint.dir.display(),
            checkpoint::META
        )
    })?;
    let tokenizer = Tokenizer::from_meta(&meta)?;
    let prompt = tokenizer.encode(&prompt)?;
    let chosen = device::choose(args.device.parse()?)?;
    let model = checkpoint.model(&chosen.device)?;
    for sample in 0..args.num_samples {
        let mut decoder = tokenizer.decoder();
        let seed = args.seed.wrapping_add(sample);
        let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, seed };
        // A closed pipe (`| head`) ends the samples.
        let mut read = stream(tokenizer.decode(&prompt));
        if matches!(read, Ok(true)) {
            generate(&model, &prompt, args.max_new_tokens, sampling, &chosen.device, |token| {
                read = stream(decoder.push(token));
                matches!(read, Ok(true))
            })?;
        }
        if !read? || !stream(format!("{}\n---------------\n", decoder.finish()))? {
            break;
        }
    }
    Ok(())
}
