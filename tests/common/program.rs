//! The built program, without what the tests' own environment may set for it.

#![allow(dead_code)] // each test binary uses its part

use std::process::Command;

/// The program in the current folder.
pub fn gpt_wgpu() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpt-wgpu"));
    forget_settings(&mut command);
    command
}

/// Takes out what would change what the program prints or does.
pub fn forget_settings(command: &mut Command) {
    for name in ["GPT_WGPU_LOG", "GPT_WGPU_DOCTOR_SPOIL", "GPT_WGPU_WATCHDOG_S"] {
        command.env_remove(name);
    }
}
