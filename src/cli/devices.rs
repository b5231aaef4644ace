//! Devices of this machine measured in turns (A B A B), each turn by `bench` in a process of its own: what drifts, such as
//! the machine's temperature, touches them alike, and nothing of one device runs beside another.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};

use crate::compare::Named;
use crate::device;
use crate::report::BenchReport;
use crate::terminal;

/// What to measure.
pub struct Rounds<'a> {
    /// What `--device` takes, the first being what the others are compared with.
    pub devices: &'a [String],
    /// A configuration file; `bench`'s default without one.
    pub config: Option<&'a Path>,
    /// Turns of each device.
    pub rounds: usize,
    /// Timed iterations of a turn.
    pub iters: usize,
    /// Iterations before them.
    pub warmup: usize,
}

impl Rounds<'_> {
    /// One report a device, of all its turns.
    ///
    /// # Errors
    /// When a device is not there, before anything is measured, and when a turn fails.
    pub fn measure(&self) -> Result<Vec<Named<BenchReport>>> {
        ensure!(
            self.devices.len() >= 2,
            "--devices {}: a comparison needs at least two devices, with a comma between them",
            self.devices.join(",")
        );
        for device in self.devices {
            device::check(device.parse()?)?;
        }
        let mut turns: Vec<Vec<BenchReport>> = vec![Vec::new(); self.devices.len()];
        for round in 0..self.rounds {
            for (device, turns) in self.devices.iter().zip(&mut turns) {
                let report =
                    self.turn(device, round).with_context(|| format!("{device}, round {} failed", round + 1))?;
                let ms = report.median_ms;
                terminal::warn(format!("round {} of {}: {device} {ms:.2} ms/iter", round + 1, self.rounds));
                turns.push(report);
            }
        }
        let merged = self
            .devices
            .iter()
            .zip(turns)
            .filter_map(|(name, turns)| Some(Named { name: name.clone(), content: BenchReport::merge(turns)? }));
        Ok(merged.collect())
    }

    /// One turn of one device. Only the first measures the matrix peak, which does not change.
    fn turn(&self, device: &str, round: usize) -> Result<BenchReport> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let file = std::env::temp_dir().join(format!("gpt-wgpu-{}-{round}.json", std::process::id()));
        let mut command = Command::new(program);
        command.arg("bench").args(self.config);
        command.arg(format!("--device={device}")).arg(format!("--json={}", file.display()));
        command.arg(format!("--iters={}", self.iters)).arg(format!("--warmup={}", self.warmup));
        if round > 0 {
            command.arg("--no-peak");
        }
        let output = command.output().context("cannot start bench")?;
        let report = BenchReport::read(&file);
        let _ = std::fs::remove_file(&file); // a failed turn wrote none
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let error = stderr.lines().rev().find_map(|line| line.strip_prefix("error: "));
            return Err(anyhow!("{}", error.unwrap_or(stderr.trim())));
        }
        Ok(report?)
    }
}

/// Writes each report to `folder`, which exists, under its device's name.
///
/// # Errors
/// When that cannot be written.
pub fn save(reports: &[Named<BenchReport>], folder: &Path) -> Result<()> {
    for report in reports {
        report.content.write(&folder.join(format!("{}.json", report.name.replace(':', "-"))))?;
    }
    Ok(())
}
