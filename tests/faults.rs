//! Faults put into a run on a GPU: a lost device, a refused allocation, a hang, a full disk, a run that is too large. Each ends
//! with one error and exit code 1, and leaves the checkpoint that was there.

#![cfg(unix)] // the limits are set by a shell

mod common;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use burn::tensor::Tensor;
use common::program;
use gpt_wgpu::checkpoint::read;
use gpt_wgpu::{cli, device, failure};
use tempfile::TempDir;

/// A small run that saves a checkpoint at every second iteration.
const TINY: &[&str] = &[
    "train",
    "--n-layer=1",
    "--n-head=1",
    "--n-embd=16",
    "--block-size=8",
    "--batch-size=2",
    "--max-iters=4",
    "--eval-interval=2",
    "--eval-iters=1",
    "--log-interval=1",
    "--dataset=builtin",
    "--out-dir=out",
    "--sample-tokens=0",
];

struct Sandbox(TempDir);

impl Sandbox {
    /// A run of five iterations on the CPU, and its checkpoint.
    fn trained() -> Self {
        let sandbox = Self(tempfile::tempdir().unwrap());
        let output = sandbox.run(&[TINY, &["--device=cpu"]].concat(), &[]);
        assert!(output.status.success(), "{}", stderr(&output));
        sandbox
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, args: &[&str], environment: &[(&str, &str)]) -> Output {
        self.inside(program::gpt_wgpu()).args(args).envs(environment.iter().copied()).output().unwrap()
    }

    /// The command in the sandbox's folder, and with a folder for what Mesa would complain of else.
    fn inside(&self, mut command: Command) -> Command {
        command.current_dir(self.0.path()).env("XDG_RUNTIME_DIR", self.0.path());
        command
    }

    /// `program` with `args` under a shell's `limits`.
    fn limited(&self, limits: &str, program: impl AsRef<OsStr>, args: &[&str]) -> Command {
        let mut command = self.inside(program::limited(limits, program));
        command.args(args);
        command
    }

    /// The weights that were saved last.
    fn saved(&self) -> Vec<u8> {
        std::fs::read(self.path("out/checkpoints/last/model.safetensors")).unwrap()
    }

    #[track_caller]
    fn loads(&self) {
        let output = self.run(&["eval", "--out-dir=out", "--checkpoint=last", "--device=cpu", "--eval-iters=1"], &[]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The run ended with exit code 1 and an error that says each of `parts`, and nothing of it looks like a panic.
#[track_caller]
fn failed(output: &Output, parts: &[&str]) {
    let text = stderr(output);
    eprintln!("{}", text.trim_end());
    assert_eq!(output.status.code(), Some(1), "{:?}: {text}", output.status);
    assert_eq!(text.matches("error: ").count(), 1, "one error: {text}");
    for part in parts {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    for word in ["panicked", "RUST_BACKTRACE", "acktrace", "unwrap", ".rs:"] {
        assert!(!text.contains(word), "{word} in: {text}");
    }
}

/// The adapter to break; none: the tests have nothing to do, which tests/common says or refuses.
fn gpu() -> Option<String> {
    common::gpu()?;
    let name = std::env::var("GPT_WGPU_DEVICE").unwrap_or_else(|_| "vulkan".into());
    Some(format!("--device={name}"))
}

/// Arguments of the whole program, and what to do to its device, for a process of this test binary.
const ARGUMENTS: &str = "GPT_WGPU_FAULT_ARGUMENTS";
const FAULT: &str = "GPT_WGPU_FAULT";

/// Not a test: the process that [`broken`] starts. It breaks its device when there is a checkpoint.
#[test]
#[ignore = "started by other tests"]
fn a_process_that_breaks_its_device() {
    let (Ok(arguments), Ok(fault)) = (std::env::var(ARGUMENTS), std::env::var(FAULT)) else {
        return;
    };
    std::thread::spawn(move || {
        while !Path::new("out/checkpoints/last").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        for device in failure::devices() {
            match fault.as_str() {
                "lose" => device.destroy(),
                _ => exhaust(&device),
            }
        }
    });
    let arguments = ["gpt-wgpu"].into_iter().chain(arguments.split(' ')).map(Into::into);
    std::process::exit(cli::main(arguments).into());
}

/// Takes 16 GiB from the device and gives them back.
fn exhaust(device: &wgpu::Device) {
    let buffer = |_| {
        let usage = wgpu::BufferUsages::STORAGE;
        device.create_buffer(&wgpu::BufferDescriptor { label: None, size: 64 << 20, usage, mapped_at_creation: false })
    };
    drop((0..256).map(buffer).collect::<Vec<_>>());
}

/// A long run whose device is broken in its middle, under a shell's `limits`.
fn broken(sandbox: &Sandbox, fault: &str, limits: &str, device: &str) -> Output {
    let arguments = [TINY, &["--max-iters=3000", "--always-save-checkpoint=false", device]].concat();
    let this = std::env::current_exe().unwrap();
    let process = ["a_process_that_breaks_its_device", "--exact", "--ignored", "--nocapture"];
    let mut command = sandbox.limited(limits, this, &process);
    command.env(ARGUMENTS, arguments.join(" ")).env(FAULT, fault).output().unwrap()
}

#[test]
fn a_lost_device_is_an_error() {
    let Some(device) = gpu() else {
        return;
    };
    let sandbox = Sandbox(tempfile::tempdir().unwrap());
    let output = broken(&sandbox, "lose", "true", &device);
    let parts = ["the device was lost", "at iteration ", "out/checkpoints/last", "--resume --out-dir out", "doctor"];
    failed(&output, &parts);
    sandbox.loads();
}

/// The limit is on address space, which a software rasteriser's memory is.
#[cfg(target_os = "linux")]
#[test]
fn a_refused_allocation_is_an_error() {
    let Some(device) = gpu() else {
        return;
    };
    let name = device.trim_start_matches("--device=").parse().unwrap();
    if device::choose(name).unwrap().adapter.is_none_or(|adapter| adapter.kind != "software") {
        eprintln!("SKIPPED: the memory of a GPU is not this process's");
        return;
    }
    let sandbox = Sandbox(tempfile::tempdir().unwrap());
    let output = broken(&sandbox, "exhaust", "ulimit -v 8388608", &device);
    let parts = ["the device's memory is full", "at iteration ", "out/checkpoints/last", "--dry-run", "batch_size"];
    failed(&output, &parts);
    sandbox.loads();
}

/// CubeCL hands out a tensor that it could not allocate; reading it tells.
#[test]
fn a_buffer_that_is_too_large_is_an_error() {
    let Some(device) = common::gpu() else {
        return;
    };
    // Sixteen times what any API binds at once.
    let error = read(Tensor::<2>::zeros([1 << 20, 1 << 16], &device)).unwrap_err().to_string();
    assert!(error.contains("memory is full") && error.contains("larger than the device allows"), "{error}");
    assert_eq!(read(Tensor::<1>::ones([2], &device)).unwrap(), [1.0, 1.0], "the device goes on");
}

#[test]
fn a_device_that_hangs_ends_the_run() {
    let Some(device) = gpu() else {
        return;
    };
    let sandbox = Sandbox::trained();
    let before = sandbox.saved();
    // A step of seconds under a limit of a tenth of one, which a busy computer's threads keep.
    let run =
        ["train", "--resume", "--out-dir=out", "--max-iters=5", "--eval-interval=1000", "--batch-size=65536", &device];
    let output = sandbox.run(&run, &[("GPT_WGPU_WATCHDOG_S", "0.1")]);
    failed(&output, &["the device hangs", "0.1 s", "at iteration 5", "out/checkpoints/last", "GPT_WGPU_WATCHDOG_S"]);
    assert!(before == sandbox.saved());
    sandbox.loads();
    let output = sandbox.run(&run, &[("GPT_WGPU_WATCHDOG_S", "soon")]);
    failed(&output, &["GPT_WGPU_WATCHDOG_S=soon", "seconds"]);
}

#[test]
fn a_full_disk_keeps_the_checkpoint() {
    let Some(device) = gpu() else {
        return;
    };
    let sandbox = Sandbox::trained();
    let before = sandbox.saved();
    let resume = ["train", "--resume", "--out-dir=out", "--max-iters=6", "--eval-interval=1000", &device];
    let output =
        sandbox.limited("trap '' XFSZ; ulimit -f 8", env!("CARGO_BIN_EXE_gpt-wgpu"), &resume).output().unwrap();
    failed(&output, &["was not saved", "previous checkpoint", "model.safetensors"]);
    assert!(before == sandbox.saved());
    let output = sandbox.run(&resume, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(before != sandbox.saved());
}
