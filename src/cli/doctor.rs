//! `gpt-wgpu doctor`: whether a device can be trusted to train.

use anyhow::{Result, bail};
use clap::Args;

use crate::device;
use crate::doctor::{self, Check, Outcome};
use crate::terminal::{print, say, stream};

#[derive(Args)]
pub struct DoctorArgs {
    /// auto, cpu, metal, vulkan, dx12 or gl, with :N for the N-th adapter
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Names a check that is to see a wrong result: how a test sees that doctor notices one.
const SPOIL: &str = "GPT_WGPU_DOCTOR_SPOIL";

pub fn run(args: &DoctorArgs) -> Result<()> {
    let chosen = device::choose(args.device.parse()?)?;
    let spoil = std::env::var(SPOIL).ok();
    if !args.json {
        let version = env!("CARGO_PKG_VERSION");
        say(format!("gpt-wgpu {version} on {} {}", std::env::consts::OS, std::env::consts::ARCH));
        say(&chosen);
    }
    let mut told = Ok(true); // the checks go on where nobody reads: the exit code tells their outcome
    let checks = doctor::examine(&chosen, spoil.as_deref(), |check| {
        if !args.json && told.is_ok() {
            told = stream(line(check));
        }
    });
    told?;
    let bad: Vec<&str> = checks.iter().filter(|c| c.outcome == Outcome::Bad).map(|c| c.name.as_str()).collect();
    if args.json {
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "device": chosen.backend,
            "name": chosen.name,
            "adapter": chosen.adapter,
            "healthy": bad.is_empty(),
            "checks": checks,
        });
        print(serde_json::to_string_pretty(&json)? + "\n")?;
    }
    if !bad.is_empty() {
        bail!("{} of {} checks failed: {}", bad.len(), checks.len(), bad.join("; "));
    }
    if !args.json {
        say(format!("all {} checks passed", checks.len()));
    }
    Ok(())
}

/// One check for a terminal, with what to do where it is not good.
fn line(check: &Check) -> String {
    let outcome = match check.outcome {
        Outcome::Good => "ok",
        Outcome::Note => "note",
        Outcome::Bad => "FAIL",
    };
    let remedy = check.remedy.map(|remedy| format!("      to do: {remedy}\n")).unwrap_or_default();
    format!("{outcome:<5} {:<24} {}\n{remedy}", check.name, check.detail)
}
