//! Twenty steps of a small model on the device and on the CPU.

use anyhow::Result;
use burn::tensor::{Device, Tensor};

use super::{Bed, Outcome, Seen};
use crate::checkpoint::read;
use crate::config::Config;
use crate::data::Batch;
use crate::model::Gpt;
use crate::optim::{self, Optimizer};
use crate::step::Step;

const STEPS: u64 = 20;
const VOCABULARY: usize = 29;

/// The losses, with activations in f16 (or f32), must follow those of the CPU, and fall. On the CPU itself, a second run must be
/// the same to the bit.
pub(super) fn twenty_steps(bed: &Bed, f16: bool) -> Result<Seen> {
    let mut losses = run(&bed.chosen.device, f16)?;
    let want = run(&Device::flex(), false)?;
    if bed.spoil {
        losses[7] *= 1.1;
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    let apart = losses.iter().zip(&want).map(|(a, b)| (a - b).abs() / b);
    let worst = apart.fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { d.max(worst) });
    let allowed = if bed.chosen.adapter.is_none() { 0.0 } else { bed.tolerance };
    let detail =
        format!("loss from {first:.4} to {last:.4}, at most {worst:.1e} from the CPU's, allowed {allowed:.0e}");
    let good = worst <= allowed && last < 0.9 * first;
    Ok(Seen { outcome: if good { Outcome::Good } else { Outcome::Bad }, detail })
}

/// The losses of a model that learns that a token follows from the one before.
fn run(device: &Device, f16: bool) -> Result<Vec<f64>> {
    let mut config = Config::default();
    config.model.n_layer = 2;
    config.model.n_head = 2;
    config.model.n_embd = 64;
    config.model.block_size = 33;
    config.model.dropout = 0.1;
    config.data.batch_size = 3;
    config.data.gradient_accumulation_steps = 2;
    config.optim.learning_rate = 3e-3;
    config.optim.decay_lr = false;
    let (inner, device) = (device, device.clone().autodiff());
    let (batch_size, time) = (config.data.batch_size, config.model.block_size);
    let batch = |position: u64| -> Result<_> {
        let x: Vec<i32> = (0..batch_size * time).map(|i| ((i * 7 + position as usize) % VOCABULARY) as i32).collect();
        let y = x.iter().map(|token| (3 * token + 1) % VOCABULARY as i32).collect();
        Ok(Batch { x, y })
    };
    let step = Step { config: &config, device: &device, batch: &batch };
    let mut model = Gpt::init(&config.gpt(VOCABULARY), config.train.seed, &device);
    model.f16 = f16;
    let (mut optimizer, mut position, mut losses) = (Optimizer::new(f16, inner), 0, Vec::new());
    for iter in 0..STEPS {
        let lr = optim::learning_rate(&config.optim, iter);
        let (updated, loss_sum) = step.run(model, &mut optimizer, &mut position, lr)?;
        model = updated;
        losses.push(loss_sum);
    }
    let mean = |sum| f64::from(sum) / config.data.gradient_accumulation_steps as f64;
    Ok(read(Tensor::cat(losses, 0))?.into_iter().map(mean).collect())
}
