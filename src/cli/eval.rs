//! `gpt-wgpu eval`: the losses of a checkpoint.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::{best_or_last, refuse_evaluation_that_cannot_fit};
use crate::checkpoint;
use crate::data::Dataset;
use crate::device;
use crate::memory::plan::{Budget, Plan};
use crate::terminal;
use crate::train::evaluate;

#[derive(Args)]
pub struct EvalArgs {
    /// The run's folder
    #[arg(long, default_value = "out-quickstart")]
    out_dir: PathBuf,
    /// Which checkpoint: last or best; without it, best where there is one
    #[arg(long)]
    checkpoint: Option<String>,
    /// Random batches of train and of val each; without it, the run's eval_iters
    #[arg(long)]
    eval_iters: Option<usize>,
    /// auto, cpu, metal, vulkan, dx12 or gl, with :N for the N-th adapter
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    let checkpoint = checkpoint::open(&best_or_last(&args.out_dir, args.checkpoint.as_deref()))?;
    let mut config = checkpoint.state.config.clone();
    if let Some(eval_iters) = args.eval_iters {
        config.train.eval_iters = eval_iters;
    }
    config.validate()?;
    let shape = checkpoint.state.model;
    let data = Dataset::open(&config.data.folder(), Some(shape.vocab_size), shape.block_size)?;
    let chosen = device::choose(args.device.parse()?)?;
    // As in training, where the device can.
    let f16 = config.train.dtype.resolve(&chosen, config.train.kernels).is_ok_and(|precision| precision.f16);
    refuse_evaluation_that_cannot_fit(&Plan::new(&config, &shape, Budget::of(&chosen, f16), true))?;
    let mut model = checkpoint.model(&chosen.device)?;
    model.f16 = f16;
    let step = checkpoint.state.step;
    let (train_loss, val_loss) = evaluate(&model, &config, &data, &chosen.device, step)?;
    if args.json {
        let json = serde_json::json!({ "step": step, "train_loss": train_loss, "val_loss": val_loss });
        terminal::print(format!("{json}\n"))
    } else {
        terminal::print(format!("step {step}: train loss {train_loss:.4}, val loss {val_loss:.4}\n"))
    }
}
