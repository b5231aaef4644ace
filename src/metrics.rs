//! What a run reports: nanoGPT's lines on the terminal, one JSON object a logged step in `metrics.jsonl`, a progress bar.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::terminal;

/// The peak that nanoGPT's `mfu` refers to: an A100's bf16 matrix peak, FLOP/s. Kept, so that the lines can be compared.
pub const NANOGPT_PEAK: f64 = 312e12;

/// One line of `metrics.jsonl`. A field is absent where it was not measured at that step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Iteration, counted from 0.
    pub step: u64,
    /// Loss of the last micro-batch's iteration in nats, mean over its micro-batches.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss: Option<f64>,
    /// Mean loss over eval_iters batches of train.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub train_loss: Option<f64>,
    /// Mean loss over eval_iters batches of val.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub val_loss: Option<f64>,
    /// Learning rate.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub lr: Option<f64>,
    /// Global gradient norm before clipping.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub grad_norm: Option<f64>,
    /// Milliseconds an iteration, mean since the last logged one, without evaluation and saving.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ms: Option<f64>,
    /// Tokens a second over the same iterations.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tokens_per_s: Option<f64>,
    /// Fraction of [`NANOGPT_PEAK`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mfu: Option<f64>,
    /// The next step's loss scale, with f16.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss_scale: Option<f64>,
    /// Steps without an update so far, where there are any: a number that was not finite, or an outlier.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub skipped: Option<u64>,
    /// Bytes that the device's allocator holds, where it tells.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub device_memory_bytes: Option<u64>,
    /// Milliseconds that the evaluation took.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_ms: Option<f64>,
}

/// Where a run's lines go.
pub struct Reporter {
    file: Option<File>,
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Reporter {
    /// A reporter that appends to `out_dir/metrics.jsonl`, dropping records at or after `first_step` (a resumed run writes
    /// them again).
    ///
    /// # Errors
    /// When out_dir cannot be created or written.
    pub fn new(out_dir: &Path, first_step: u64, last_step: u64, quiet: bool) -> Result<Self> {
        fs::create_dir_all(out_dir).with_context(|| format!("cannot create out_dir {}", out_dir.display()))?;
        let path = out_dir.join("metrics.jsonl");
        let describe = || format!("cannot write {}", path.display());
        // Beside it and renamed: a kill or a full disk leaves the old records or the new ones.
        let beside = out_dir.join(".metrics.jsonl.tmp");
        let kept = if first_step > 0 { records_before(first_step, &path)? } else { String::new() };
        fs::write(&beside, kept).and_then(|()| fs::rename(&beside, &path)).with_context(describe)?;
        let file = OpenOptions::new().append(true).open(&path).with_context(describe)?;
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let style = "{bar:30} {pos}/{len} {elapsed} elapsed, {eta} left  {msg}";
            let bar = ProgressBar::new(last_step + 1).with_position(first_step);
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Ok(Self { file: Some(file), bar, quiet })
    }

    /// A reporter that only prints.
    pub fn terminal_only(quiet: bool) -> Self {
        Self { file: None, bar: None, quiet }
    }

    /// Prints one line on standard output, above the progress bar.
    pub fn line(&self, text: &str) {
        if self.quiet {
            return;
        }
        match &self.bar {
            Some(bar) => bar.suspend(|| terminal::say(text)),
            None => terminal::say(text),
        }
    }

    /// Appends one record.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn record(&mut self, record: &Record) -> Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let line = serde_json::to_string(record)? + "\n";
        file.write_all(line.as_bytes()).context("cannot write metrics.jsonl")
    }

    /// Moves the progress bar.
    pub fn progress(&self, step: u64, message: Option<String>) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            if let Some(message) = message {
                bar.set_message(message);
            }
        }
    }

    /// Removes the progress bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The records of earlier steps, as lines; none where there is no file. What is no record is left out: a kill may have torn it.
fn records_before(step: u64, path: &Path) -> Result<String> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
        bytes => bytes.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let is_earlier = |line: &&str| serde_json::from_str::<Record>(line).is_ok_and(|record| record.step < step);
    Ok(String::from_utf8_lossy(&bytes).lines().filter(is_earlier).map(|line| format!("{line}\n")).collect())
}
