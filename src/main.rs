//! `gpt-wgpu`: parse the command line, call the library, print one error, set the exit code.

use std::process::ExitCode;

use gpt_wgpu::cli::{self, Interrupted};
use gpt_wgpu::config::ConfigError;

fn main() -> ExitCode {
    cli::catch_panics();
    let result = std::panic::catch_unwind(|| cli::run(std::env::args_os()));
    let error = match result {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => error,
        Err(_) => cli::panic_error(),
    };
    if error.is::<Interrupted>() {
        eprintln!("{error}");
        return ExitCode::from(130);
    }
    eprintln!("error: {error:#}");
    if error.is::<ConfigError>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}
