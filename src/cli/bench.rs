//! `gpt-wgpu bench`: how fast this machine trains a configuration.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{ArgMatches, Args};

use super::{refuse_what_cannot_be_written, refuse_what_cannot_fit};
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
use crate::terminal::{print, say};
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
    #[arg(long, default_value_t = 5, value_parser = count)]
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

/// More iterations or rounds than anybody waits for.
const MOST: usize = 1_000_000_000;

/// clap's parser of a count.
pub fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 0..=MOST) => Ok(count),
        _ => Err(format!("expected a whole number, at most {MOST}")),
    }
}

/// clap's parser of a count that cannot be 0.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match count(text) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(format!("expected a whole number, at least 1 and at most {MOST}")),
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
    if let Some(path) = &args.json {
        refuse_what_cannot_be_written("--json", path)?;
    }
    let chosen = device::choose(config.train.device.parse()?)?;
    ensure!(!args.ops || chosen.adapter.is_some(), "--ops takes kernels of a GPU apart; the CPU has none of ours");
    kernel::choose(config.train.kernels);
    let precision = config.train.dtype.resolve(&chosen, config.train.kernels)?;
    say(&chosen);
    startup::part("Burn's runtime");
    if chosen.adapter.is_some() {
        say(format!("kernels: {}", kernel::describe(&chosen.capabilities, precision.f16)));
    }
    say(precision);
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
    // Neither is to be lost because the other is.
    let written = args.json.as_ref().map_or(Ok(()), |path| report.write(path));
    print(summary(&report))?;
    if let Some(profile) = profile {
        print(format!("\n{profile}\n"))?;
    }
    Ok(written?)
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
