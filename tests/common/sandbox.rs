//! The built binary in a folder of its own.

#![allow(dead_code)] // each test binary uses its part

#[path = "program.rs"]
pub mod program;

use std::path::PathBuf;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A small run: seconds on the CPU.
pub const TINY: &[&str] = &[
    "--n-layer=1",
    "--n-head=2",
    "--n-embd=16",
    "--block-size=8",
    "--batch-size=2",
    "--max-iters=4",
    "--eval-interval=2",
    "--eval-iters=1",
    "--log-interval=1",
    "--dataset=builtin",
    "--device=cpu",
    "--out-dir=out",
    "--sample-tokens=0",
];

pub struct Sandbox(pub TempDir);

impl Sandbox {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = program::gpt_wgpu();
        // A mirror that refuses at once: no test may depend on the network.
        command.args(args).current_dir(self.0.path()).env("GPT_WGPU_SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt");
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    pub fn train(&self, more: &[&str]) -> Output {
        self.run(&[&["train"], TINY, more].concat())
    }

    /// Runs `train` with the tiny setting, and fails unless it works.
    pub fn trained(&self) -> &Self {
        let output = self.train(&[]);
        assert!(output.status.success(), "{}", text(&output));
        self
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

pub fn tokens(ids: &[u16]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

/// The run failed with `code`, said each of `parts` on standard error, and nothing of it looks like a panic.
#[track_caller]
pub fn refused(output: &Output, code: i32, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{}", text(output));
    for part in parts {
        assert!(stderr.contains(part), "no {part:?} in: {stderr}");
    }
    for word in ["panicked", "RUST_BACKTRACE", "unwrap", "stack backtrace"] {
        assert!(!stderr.contains(word), "{word} in: {stderr}");
    }
}
