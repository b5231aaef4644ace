//! `gpt-wgpu info`: the devices of this machine.

use anyhow::Result;
use clap::Args;

use crate::device::{self, AdapterReport};
use crate::terminal;

#[derive(Args)]
pub struct InfoArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(args: &InfoArgs) -> Result<()> {
    let adapters = device::adapters();
    if args.json {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "cpu_threads": threads,
            "adapters": adapters,
            "auto": device::choose(device::DeviceSpec::Auto)?.backend,
        });
        return terminal::print(serde_json::to_string_pretty(&json)? + "\n");
    }
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    let mut text = format!("gpt-wgpu {} on {os} {arch}\n", env!("CARGO_PKG_VERSION"));
    text.extend(adapters.iter().map(table));
    if adapters.is_empty() {
        text += "\nno GPU adapter; the CPU is there\n";
    }
    text += &format!("\n--device auto takes {}\n", device::choose(device::DeviceSpec::Auto)?);
    terminal::print(text)
}

fn table(adapter: &AdapterReport) -> String {
    let limits = &adapter.limits;
    let yes = |is: bool| if is { "yes" } else { "no" };
    let memory = adapter.memory_bytes.map_or("not told by this API".to_string(), mib);
    let matrices = if limits.cooperative_matrices.is_empty() {
        "none".to_string()
    } else {
        limits.cooperative_matrices.join(", ")
    };
    let (min, max) = limits.subgroup_size;
    let rows = [
        ("type", adapter.kind.to_string()),
        ("driver", adapter.driver.clone()),
        ("id", adapter.id.clone()),
        ("memory", memory),
        ("workgroup memory", format!("{} KiB", limits.workgroup_memory / 1024)),
        ("workgroup size", limits.workgroup_invocations.to_string()),
        ("subgroups", format!("{}, {min} to {max}", yes(limits.subgroups))),
        ("f16", yes(limits.f16).to_string()),
        ("matrix units", matrices),
        ("timestamps", yes(limits.timestamps).to_string()),
        ("largest binding", mib(limits.max_binding)),
    ];
    let mut text = format!("\n{}  {}\n", adapter.device, adapter.name);
    for (name, value) in rows {
        text.push_str(&format!("  {name:<17} {value}\n"));
    }
    text
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
