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

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::Device;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use thiserror::Error;
use tracing_subscriber::EnvFilter;

use crate::checkpoint;
use crate::config::ConfigError;
use crate::failure::{self, DeviceError};
use crate::memory::plan::Plan;
use crate::startup;
use crate::terminal;

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
        terminal::warn(error);
        return 130;
    }
    terminal::warn(format!("error: {error:#}"));
    if error.is::<ConfigError>() { 2 } else { 1 }
}

/// Parses `args` and runs the command.
///
/// # Errors
/// Whatever the command reports; [`Interrupted`] after Ctrl-C.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let started = Instant::now();
    let matches = Cli::command().get_matches_from(args.into_iter().map(dashes));
    tracing_subscriber::fmt().with_env_filter(log_filter()?).with_writer(std::io::stderr).without_time().init();
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
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "gpt-wgpu", &mut script);
            terminal::print(String::from_utf8_lossy(&script))
        }
        Command::Man => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            terminal::print(String::from_utf8_lossy(&page))
        }
    }
}

/// What is logged: warnings, or what the environment asks for.
fn log_filter() -> Result<EnvFilter> {
    const VARIABLE: &str = "GPT_WGPU_LOG";
    match std::env::var(VARIABLE) {
        Ok(text) => EnvFilter::try_new(&text)
            .with_context(|| format!("{VARIABLE}={text}: expected a filter such as gpt_wgpu=debug")),
        Err(_) => Ok(EnvFilter::new("gpt_wgpu=warn")),
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
        Err(_) => match failure::cause(device) {
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
        terminal::warn("finishing the step and saving; Ctrl-C again quits at once");
    })?;
    Ok(&STOP)
}

/// Lets Ctrl-C end what has nothing to save, also where the shell has told the program not to mind it.
fn end_at_ctrl_c() -> Result<()> {
    ctrlc::set_handler(|| std::process::exit(130))?;
    Ok(())
}

/// The checkpoint that a command should read: `best` where there is one, else `last`.
fn best_or_last(out_dir: &Path, name: Option<&str>) -> PathBuf {
    match name {
        Some(name) => checkpoint::path(out_dir, name),
        None => {
            let best = checkpoint::path(out_dir, "best");
            if checkpoint::exists(&best) { best } else { checkpoint::path(out_dir, "last") }
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

/// The same for an evaluation alone, which takes a fraction of what training does.
fn refuse_evaluation_that_cannot_fit(plan: &Plan) -> Result<()> {
    match plan.evaluation_refusal() {
        Some(refusal) => bail!(refusal),
        None => Ok(()),
    }
}

/// Refuses a file that cannot be written before the work that makes its content.
fn refuse_what_cannot_be_written(flag: &str, path: &Path) -> Result<()> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        ensure!(folder.is_dir(), "{flag}: there is no folder {}", folder.display());
    }
    let is_new = !path.exists();
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("{flag}: cannot write {}", path.display()))?;
    if is_new {
        std::fs::remove_file(path).with_context(|| format!("{flag}: cannot remove {}", path.display()))?;
    }
    Ok(())
}
