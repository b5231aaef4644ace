//! `gpt-wgpu compare`: reports or training runs side by side, or devices of this machine.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::bench::{at_least_one, count};
use super::devices::{self, Rounds};
use super::refuse_what_cannot_be_written;
use crate::compare::{self, Options, Render, compare_reports};
use crate::terminal;

#[derive(Args)]
pub struct CompareArgs {
    /// Two or more reports (JSON), or runs (an out_dir or its metrics.jsonl); the first is what the others are compared with.
    /// With --devices, a configuration file
    #[arg(required_unless_present = "devices")]
    files: Vec<PathBuf>,
    /// Measure these devices now, in turns, with the configuration: metal,vulkan or vulkan:0,vulkan:1,cpu
    #[arg(long, value_delimiter = ',')]
    devices: Vec<String>,
    /// With --devices: how often the devices take turns
    #[arg(long, default_value_t = 4, value_parser = at_least_one, requires = "devices")]
    rounds: usize,
    /// With --devices: timed iterations of a round
    #[arg(long, default_value_t = 10, value_parser = at_least_one, requires = "devices")]
    iters: usize,
    /// With --devices: iterations before the timed ones, in every round
    #[arg(long, default_value_t = 5, value_parser = count, requires = "devices")]
    warmup: usize,
    /// With --devices: write each device's report into this folder
    #[arg(long, requires = "devices")]
    save: Option<PathBuf>,
    /// Write one self-contained page
    #[arg(long)]
    html: Option<PathBuf>,
    /// Write the chart alone
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Print Markdown
    #[arg(long)]
    markdown: bool,
    /// Compare reports of different element types too
    #[arg(long)]
    across_dtypes: bool,
    /// Runs: relative difference of the train loss from which on they count as diverged
    #[arg(long, default_value_t = Options::default().tolerance)]
    tolerance: f64,
}

pub fn run(args: &CompareArgs) -> Result<()> {
    ensure!(
        args.tolerance >= 0.0 && args.tolerance.is_finite(),
        "--tolerance {}: it must be a finite number, not negative",
        args.tolerance
    );
    for (flag, path) in [("--html", &args.html), ("--svg", &args.svg)] {
        if let Some(path) = path {
            refuse_what_cannot_be_written(flag, path)?;
        }
    }
    let options = Options { across_dtypes: args.across_dtypes, tolerance: args.tolerance };
    if args.devices.is_empty() {
        let comparison = compare::compare(&args.files, &options)?;
        return show(&*comparison, args);
    }
    ensure!(
        args.files.len() < 2,
        "--devices takes one configuration file, and got {}; reports are compared without --devices",
        args.files.len()
    );
    let rounds = Rounds {
        devices: &args.devices,
        config: args.files.first().map(PathBuf::as_path),
        rounds: args.rounds,
        iters: args.iters,
        warmup: args.warmup,
    };
    if let Some(folder) = &args.save {
        std::fs::create_dir_all(folder).with_context(|| format!("--save: cannot create {}", folder.display()))?;
    }
    let reports = rounds.measure()?;
    if let Some(folder) = &args.save {
        devices::save(&reports, folder)?;
    }
    show(&compare_reports(&reports, &options)?, args)
}

fn show(comparison: &dyn Render, args: &CompareArgs) -> Result<()> {
    let text = if args.markdown { comparison.markdown() } else { comparison.text() };
    let write = |path: &Option<PathBuf>, content: String| match path {
        Some(path) => std::fs::write(path, content).with_context(|| format!("cannot write {}", path.display())),
        None => Ok(()),
    };
    // None of them is to be lost because another is.
    let written = [write(&args.html, comparison.html()), write(&args.svg, comparison.svg())];
    terminal::print(text)?;
    written.into_iter().collect()
}
