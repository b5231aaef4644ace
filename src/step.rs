//! One training step: forward and backward of its micro-batches, clip, AdamW. The loop around it is train.rs.

use anyhow::{Result, bail};
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::config::Config;
use crate::data::Batch;
use crate::kernel::{self, Kernel, clock};
use crate::model::{Gpt, Scale};
use crate::ops::dropout::Dropout;
use crate::ops::{adamw, verdict};
use crate::optim::{GradientSum, Optimizer};
use crate::recompute;

/// One iteration of training: what [`train::run`](crate::train::run) and `bench` repeat, through [`Replay`](crate::replay::Replay).
pub struct Step<'a> {
    /// The run's settings.
    pub config: &'a Config,
    /// The model's device, with autodiff.
    pub device: &'a Device,
    /// The micro-batch at a position of the data, B sequences of T tokens.
    pub batch: &'a dyn Fn(u64) -> Result<Batch>,
}

impl Step<'_> {
    /// The kernels that this step and an evaluation launch. Nothing is computed: the work is done with launches that are noted
    /// only, over tensors that are those of a micro-batch and are gone afterwards.
    ///
    /// # Errors
    /// When there is no batch, or for a fault of this program.
    pub fn kernels(&self, model: &Gpt, optimizer: &Optimizer, position: u64) -> Result<Vec<Kernel>> {
        let (done, noted) = kernel::noted(|| -> Result<()> {
            let (tokens, targets) = self.uploaded(position)?;
            let (x, y) = (tokens.clone().inner(), targets.clone().inner());
            let scale = Scale(optimizer.memory.clone());
            let (dropout, recompute) = (self.dropout(position), self.config.train.recompute);
            let mut sum = GradientSum::default();
            recompute::gradients(&model.rounded(), tokens, targets, dropout, scale, recompute, &mut sum)?;
            drop(sum);
            // After the larger work, in the memory that it left: the pool is to grow as a step makes it grow.
            model.valid().rounded().loss(x, y, Dropout::OFF);
            Ok(())
        });
        done?;
        // The optimizer's by name: what it does to the model is not to be tried on the model.
        Ok([noted, adamw::kernels(), vec![verdict::kernel()]].concat())
    }

    /// tokens and targets, each (B, T), of the micro-batch at a position of the data, on the device.
    ///
    /// # Errors
    /// When there is no batch.
    pub fn uploaded(&self, position: u64) -> Result<(Tensor<2, Int>, Tensor<2, Int>)> {
        Ok(upload(&(self.batch)(position)?, self.config.data.batch_size, self.device))
    }

    /// The dropout of the micro-batch at a position of the data.
    fn dropout(&self, position: u64) -> Dropout {
        let (probability, seed) = (self.config.model.dropout as f32, self.config.train.seed);
        Dropout { probability, seed, step: position as u32, site: 0 }
    }

    /// Forward and backward of every micro-batch from `position` on, which moves behind them; clip; AdamW. Queues the work
    /// and waits for nothing. Returns the model and, still on the device, the sum of the micro-batches' losses in nats, (1).
    ///
    /// # Errors
    /// When there is no batch, or for a fault of this program.
    pub fn run(&self, model: Gpt, optimizer: &mut Optimizer, position: &mut u64, lr: f64) -> Result<(Gpt, Tensor<1>)> {
        kernel::begin_step();
        self.set_clock(*position, lr);
        let done = self.work(model, optimizer, *position, lr, |i| self.uploaded(*position + i))?;
        *position += self.config.data.gradient_accumulation_steps as u64;
        Ok(done)
    }

    /// Writes down what the launches of a step from `position` on, recorded ones too, do not have in their parameters.
    pub fn set_clock(&self, position: u64, lr: f64) {
        clock::set_step(position as u32);
        verdict::set_rates(lr, self.config.optim.weight_decay);
    }

    /// [`Step::run`]'s launches, on the i-th of its micro-batches as `batch` gives it.
    ///
    /// # Errors
    /// As [`Step::run`].
    pub fn work(
        &self,
        model: Gpt,
        optimizer: &mut Optimizer,
        position: u64,
        lr: f64,
        batch: impl Fn(u64) -> Result<(Tensor<2, Int>, Tensor<2, Int>)>,
    ) -> Result<(Gpt, Tensor<1>)> {
        let parts = self.config.data.gradient_accumulation_steps;
        let mut gradients = GradientSum::default();
        let mut loss_sum: Option<Tensor<1>> = None;
        let rounded = model.rounded();
        for i in 0..parts as u64 {
            let (tokens, targets) = batch(i)?;
            let dropout = self.dropout(position + i);
            // The gradients come multiplied by the loss scale, and are a sum over micro-batches: the verdict divides.
            let scale = Scale(optimizer.memory.clone());
            let recompute = self.config.train.recompute;
            let loss = recompute::gradients(&rounded, tokens, targets, dropout, scale, recompute, &mut gradients)?;
            loss_sum = Some(match loss_sum {
                Some(sum) => sum + loss,
                None => loss,
            });
        }
        let Some(loss_sum) = loss_sum else {
            bail!("gradient_accumulation_steps is 0; it must be at least 1");
        };
        drop(rounded); // the parameters are rewritten in place
        let model = optimizer.step(model, gradients, (loss_sum.clone(), parts), &self.config.optim, lr);
        Ok((model, loss_sum))
    }
}

/// tokens and targets, each (B, T), on the device.
pub fn upload(batch: &Batch, batch_size: usize, device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let tensor = |values: &[i32]| {
        let shape = [batch_size, values.len() / batch_size];
        Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
    };
    (tensor(&batch.x), tensor(&batch.y))
}
