//! `gpt-wgpu`: calls the library and sets the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(gpt_wgpu::cli::main(std::env::args_os()))
}
