//! `gpt-wgpu bench`: how fast this machine trains a configuration.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{ArgMatches, Args};

use super::refuse_what_cannot_fit;
use crate::bench::{self, Bench};
use crate::config::{Config, QUICKSTART};
use crate::corpus;
use crate::data::Dataset;
use crate::device;
use crate::kernel;
use crate::memory::plan::{Budget, Plan};
use crate::prepare::Source;
use crate::report::{BenchReport, Mfu};
use crate::startup;
use crate::tokenizer::{CharTokenizer, GPT2_PADDED_VOCAB};

#[derive(Args)]
pub struct BenchArgs {
    /// A configuration file; without one, configs/quickstart.toml's settings
    config: Option<PathBuf>,
    /// Write the report as JSON (docs/bench-schema.md), for `compare`
    #[arg(long)]
    json: Option<PathBuf>,
    /// Timed iterations
    #[arg(long, default_value_t = 20, value_parser = at_least_one)]
    pub iters: usize,
    /// Iterations before the timed ones
    #[arg(long, default_value_t = 5)]
    pub warmup: usize,
    /// Leave out the device's matrix peak, and so the fraction of it that training reaches
    #[arg(long)]
    no_peak: bool,
    /// Take one more step apart: launches, time and rate of every kernel
    #[arg(long)]
    ops: bool,
    #[command(flatten)]
    flags: Config,
}

/// clap's parser of a count that cannot be 0.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number, at least 1".into()),
        Ok(count) => Ok(count),
    }
}

pub fn run(args: &BenchArgs, matches: &ArgMatches, started: Instant) -> Result<()> {
    let _ = &args.flags; // read through `matches`, which know what was given
    let base = match &args.config {
        Some(path) => Config::load(path)?,
        None => Config::parse(QUICKSTART, "quickstart.toml")?,
    };
    let config = base.with_flags(matches)?;
    config.validate()?;
    // Found out before the measurement, not after it.
    if let Some(folder) = args.json.as_deref().and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty()) {
        ensure!(folder.is_dir(), "--json: there is no folder {}", folder.display());
    }
    let chosen = device::choose(config.train.device.parse()?)?;
    ensure!(!args.ops || chosen.adapter.is_some(), "--ops takes kernels of a GPU apart; the CPU has none of ours");
    kernel::choose(config.train.kernels);
    let precision = config.train.dtype.resolve(&chosen, config.train.kernels)?;
    let mut stdout = std::io::stdout(); // a closed pipe (`| head`) is no error
    let _ = writeln!(stdout, "{chosen}");
    startup::part("Burn's runtime");
    if chosen.adapter.is_some() {
        let _ = writeln!(stdout, "kernels: {}", kernel::describe(&chosen.capabilities, precision.f16));
    }
    let _ = writeln!(stdout, "{precision}");
    let data = dataset(&config)?;
    let gpt = config.gpt(data.as_ref().map_or_else(|| vocabulary(&config), |data| Ok(data.vocab_size()))?);
    refuse_what_cannot_fit(&Plan::new(&config, &gpt, Budget::of(&chosen, precision.f16), false))?;
    startup::part("data");
    let (report, profile) = bench::run(&Bench {
        config: &config,
        gpt,
        chosen: &chosen,
        f16: precision.f16,
        data: data.as_ref(),
        warmup: args.warmup,
        iters: args.iters,
        peak: !args.no_peak,
        ops: args.ops,
        started,
    })?;
    let _ = write!(stdout, "{}", summary(&report));
    if let Some(profile) = profile {
        let _ = writeln!(stdout, "\n{profile}");
    }
    if let Some(path) = &args.json {
        report.write(path)?;
    }
    Ok(())
}

/// The configured dataset, where it is prepared.
fn dataset(config: &Config) -> Result<Option<Dataset>> {
    let folder = config.data.folder();
    if !folder.join("train.bin").exists() {
        return Ok(None);
    }
    let vocab_size = Some(config.model.vocab_size).filter(|&size| size != 0);
    Ok(Some(Dataset::open(&folder, vocab_size, config.model.block_size)?))
}

/// The vocabulary that the configured dataset would have.
fn vocabulary(config: &Config) -> Result<usize> {
    Ok(match (config.model.vocab_size, Source::named(&config.data.dataset)) {
        (0, Some(Source::ShakespeareChar)) => 65,
        (0, Some(Source::Builtin)) => CharTokenizer::from_text(&corpus::builtin())?.chars().chars().count(),
        (0, _) => GPT2_PADDED_VOCAB,
        (given, _) => given,
    })
}

/// The report in lines for a terminal.
fn summary(report: &BenchReport) -> String {
    let BenchReport { median_ms, min_ms, max_ms, tokens_per_s, .. } = report;
    let missing = || "not available".to_string();
    let mfu = |mfu: &Option<Mfu>| {
        mfu.as_ref().map_or_else(missing, |mfu| {
            format!("{:.2} % of {:.4} TFLOP/s ({})", 100.0 * mfu.fraction, mfu.peak_flops / 1e12, mfu.how)
        })
    };
    let energy = match (&report.energy, &report.energy_reason) {
        (Some(energy), _) => format!(
            "{:.1} W, {:.3} J/iter, {:.1} tokens/J ({})",
            energy.watts, energy.joules_per_iter, energy.tokens_per_joule, energy.source
        ),
        (None, reason) => format!("not available: {}", reason.as_deref().unwrap_or("not measured")),
    };
    let samples = report.samples_ms.len();
    let rows = [
        (
            "time",
            format!(
                "{median_ms:.2} ms/iter, median of {samples} ({min_ms:.2} to {max_ms:.2}) after {} of warm-up",
                report.warmup
            ),
        ),
        ("speed", format!("{tokens_per_s:.0} tokens/s on {}", report.data.as_deref().unwrap_or("its tokens"))),
        ("mfu, measured", mfu(&report.mfu_measured)),
        ("mfu, published", mfu(&report.mfu_published)),
        ("first step", report.time_to_first_step_s.map_or_else(missing, |s| format!("{s:.2} s after the start"))),
        ("memory", report.peak_memory_bytes.map_or_else(missing, |bytes| format!("{} MiB at most", bytes >> 20))),
        ("energy", energy),
    ];
    rows.iter().map(|(name, value)| format!("{name:<15} {value}\n")).collect()
}
