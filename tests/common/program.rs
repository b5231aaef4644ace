//! The built program, without what the tests' own environment may set for it.

#![allow(dead_code)] // each test binary uses its part

use std::ffi::OsStr;
use std::process::Command;

/// The program in the current folder.
pub fn gpt_wgpu() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpt-wgpu"));
    forget_settings(&mut command);
    command
}

/// `program` under a shell's `limits`; its arguments are added to the command.
pub fn limited(limits: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("bash");
    command.arg("-c").arg(format!(r#"{limits}; exec "$0" "$@""#)).arg(program);
    forget_settings(&mut command);
    command
}

/// Takes out what would change what the program prints or does.
fn forget_settings(command: &mut Command) {
    for name in ["GPT_WGPU_LOG", "GPT_WGPU_DOCTOR_SPOIL", "GPT_WGPU_WATCHDOG_S"] {
        command.env_remove(name);
    }
}
