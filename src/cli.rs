//! The command line: one file a command, this file only routes.

mod bench;
mod compare;
mod devices;
mod doctor;
mod eval;
mod info;
mod prepare;
mod sample;
mod train;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use burn::tensor::Device;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use thiserror::Error;

use crate::checkpoint;
use crate::config::ConfigError;
use crate::failure::{self, DeviceError};
use crate::memory::plan::Plan;
use crate::startup;

#[derive(Parser)]
#[command(
    name = "gpt-wgpu",
    version,
    about = "Trains GPTs on Metal, Vulkan, DX12 and the CPU, with the same kernels everywhere.",
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model; without arguments, a small one on tiny Shakespeare
    #[command(args_override_self = true)] // the last of two equal flags wins, as in nanoGPT
    Train(Box<train::TrainArgs>),
    /// Write text with a trained model
    Sample(sample::SampleArgs),
    /// Train and val loss of a checkpoint
    Eval(eval::EvalArgs),
    /// Turn text into train.bin and val.bin
    Prepare(prepare::PrepareArgs),
    /// Measure the speed of training
    #[command(args_override_self = true)]
    Bench(Box<bench::BenchArgs>),
    /// Lay reports of `bench`, training runs or devices side by side
    Compare(compare::CompareArgs),
    /// Check whether a device can be trusted to train; a minute
    Doctor(doctor::DoctorArgs),
    /// List the devices and what the kernels can use of them
    Info(info::InfoArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

/// The run was stopped by Ctrl-C after it saved.
#[derive(Debug, Error)]
#[error("interrupted; saved to {}. Go on with: gpt-wgpu train --resume --out-dir {}", .0.display(), .1.display())]
pub struct Interrupted(PathBuf, PathBuf);

/// The whole program: runs the command, prints its error if there is one, and returns the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    catch_panics();
    let error = match catch_unwind(AssertUnwindSafe(|| run(args))) {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => error,
        Err(_) => panic_error(),
    };
    if error.is::<Interrupted>() {
        eprintln!("{error}");
        return 130;
    }
    eprintln!("error: {error:#}");
    if error.is::<ConfigError>() { 2 } else { 1 }
}

/// Parses `args` and runs the command.
///
/// # Errors
/// Whatever the command reports; [`Interrupted`] after Ctrl-C.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let started = Instant::now();
    let matches = Cli::command().get_matches_from(args.into_iter().map(dashes));
    let warnings = tracing_subscriber::EnvFilter::try_from_env("GPT_WGPU_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("gpt_wgpu=warn"));
    tracing_subscriber::fmt().with_env_filter(warnings).with_writer(std::io::stderr).without_time().init();
    startup::begin(started);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match cli.command {
        Command::Train(args) => train::run(&args, submatches(&matches)),
        Command::Sample(args) => sample::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Prepare(args) => prepare::run(&args),
        Command::Bench(args) => bench::run(&args, submatches(&matches), started),
        Command::Compare(args) => compare::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "gpt-wgpu", &mut std::io::stdout());
            Ok(())
        }
        Command::Man => Ok(clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?),
    }
}

fn submatches(matches: &clap::ArgMatches) -> &clap::ArgMatches {
    matches.subcommand().map_or(matches, |(_, matches)| matches)
}

/// nanoGPT's `--max_iters=200` is our `--max-iters=200`.
fn dashes(arg: OsString) -> OsString {
    let Some(text) = arg.to_str().filter(|text| text.starts_with("--")) else {
        return arg;
    };
    match text.split_once('=') {
        Some((key, value)) => format!("{}={value}", key.replace('_', "-")).into(),
        None => text.replace('_', "-").into(),
    }
}

/// What the first panic of the process said.
static PANIC: OnceLock<String> = OnceLock::new();

/// A panic in a library (a lost device, a full GPU memory) is an error like any other to the user: kept, not printed.
///
/// The first one counts, on whichever thread: a device's own thread fails first and the caller only sees that it is gone.
fn catch_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.payload_as_str().unwrap_or("unknown failure");
        let place = panic.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
        let _ = PANIC.set(format!("{}{place}", text.lines().next().unwrap_or_default()));
    }));
}

/// The panic that ended [`run`], as an error.
fn panic_error() -> anyhow::Error {
    anyhow!("{}. Checkpoints that were saved are intact; {PANIC_ADVICE}", panic_text())
}

const PANIC_ADVICE: &str =
    "try a smaller batch_size or --device cpu, and please report it with the output of `gpt-wgpu info`";

fn panic_text() -> String {
    format!("the device or a library failed: {}", PANIC.get().map_or("unknown failure", String::as_str))
}

/// What `run` returns; where the device failed or a library panicked, an error that says when, what is left and what to do.
fn explained<T>(device: &Device, out_dir: &Path, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let failed = |error: &DeviceError| (error.to_string(), error.advice());
    let (what, advice) = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => match error.chain().find_map(|cause| cause.downcast_ref::<DeviceError>()) {
            Some(cause) => failed(cause),
            None => return Err(error),
        },
        Err(_) => match failure::told(device) {
            Some(cause) => failed(&cause),
            None => (panic_text(), PANIC_ADVICE),
        },
    };
    Err(anyhow!(failure::story(&what, out_dir, advice)))
}

/// Set once by Ctrl-C; a second Ctrl-C ends the program at once.
fn stop_flag() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("finishing the step and saving; Ctrl-C again quits at once");
    })?;
    Ok(&STOP)
}

/// The checkpoint that a command should read: `best` where there is one, else `last`.
fn best_or_last(out_dir: &Path, name: Option<&str>) -> PathBuf {
    match name {
        Some(name) => checkpoint::path(out_dir, name),
        None => {
            let best = checkpoint::path(out_dir, "best");
            if best.exists() { best } else { checkpoint::path(out_dir, "last") }
        }
    }
}

/// Refuses what is too large before it begins.
fn refuse_what_cannot_fit(plan: &Plan) -> Result<()> {
    match plan.refusal() {
        Some(refusal) => bail!(refusal),
        None => Ok(()),
    }
}
