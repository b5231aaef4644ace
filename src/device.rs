//! Which device computes, and why: a GPU adapter through wgpu, or the CPU.

mod adapter;

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_wgpu::WgpuSetup;
use serde::Serialize;

pub use self::adapter::{AdapterReport, Limits};
use self::adapter::{capabilities, report};
use crate::kernel::{self, Capabilities};
use crate::{failure, startup};

/// What `--device` says: `auto`, `cpu`, or an API with an optional adapter index (`vulkan:1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// The best real GPU, else the CPU.
    Auto,
    /// Burn's Flex backend.
    Cpu,
    /// One graphics API; the index counts its adapters as `gpt-wgpu info` lists them.
    Gpu(Api, Option<usize>),
}

/// The graphics APIs that wgpu reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// macOS, iOS.
    Metal,
    /// Linux, Windows, Android; MoltenVK on macOS.
    Vulkan,
    /// Windows.
    Dx12,
    /// OpenGL or OpenGL ES.
    Gl,
}

impl Api {
    /// In the order of preference.
    const ALL: [Self; 4] = [Self::Metal, Self::Vulkan, Self::Dx12, Self::Gl];

    fn backends(self) -> wgpu::Backends {
        match self {
            Self::Metal => wgpu::Backends::METAL,
            Self::Vulkan => wgpu::Backends::VULKAN,
            Self::Dx12 => wgpu::Backends::DX12,
            Self::Gl => wgpu::Backends::GL,
        }
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Metal => "metal",
            Self::Vulkan => "vulkan",
            Self::Dx12 => "dx12",
            Self::Gl => "gl",
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, index) = match text.split_once(':') {
            Some((name, index)) => {
                let index = index.parse().map_err(|_| {
                    anyhow!("--device {text}: `{index}` is not an adapter's number; `gpt-wgpu info` lists them")
                })?;
                (name, Some(index))
            }
            None => (text, None),
        };
        if let Some(api) = Api::ALL.into_iter().find(|api| api.name() == name) {
            return Ok(Self::Gpu(api, index));
        }
        match (name, index) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            _ => bail!(
                "--device {text}: expected auto, cpu, metal, vulkan, dx12 or gl, the last four with an optional :N"
            ),
        }
    }
}

/// A device that is ready for tensors.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// Burn's handle, without autodiff.
    pub device: Device,
    /// `cpu`, or the adapter's name.
    pub name: String,
    /// `cpu`, `metal`, `vulkan`, `dx12` or `gl`.
    pub backend: &'static str,
    /// Why this one, in a few words.
    pub reason: String,
    /// The adapter, unless it is the CPU.
    pub adapter: Option<AdapterReport>,
    /// What decides which kernels it can run.
    pub capabilities: Capabilities,
}

impl Chosen {
    /// Bytes of memory: the adapter's where its API tells, this computer's for the CPU.
    pub fn memory_bytes(&self) -> Option<u64> {
        use sysinfo::{MemoryRefreshKind, RefreshKind, System};
        match &self.adapter {
            Some(adapter) => adapter.memory_bytes,
            None => {
                let what = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
                let bytes = System::new_with_specifics(what).ok()?.total_memory();
                Some(bytes).filter(|&bytes| bytes > 0)
            }
        }
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device: {} ({}): {}", self.name, self.backend, self.reason)
    }
}

/// Every adapter of one API, with its report, in wgpu's order.
async fn adapters_of(api: Api) -> (wgpu::Instance, Vec<(wgpu::Adapter, AdapterReport)>) {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: api.backends(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = instance.enumerate_adapters(api.backends()).await;
    let reports = adapters
        .into_iter()
        .enumerate()
        .map(|(index, adapter)| {
            let report = report(api, index, &adapter);
            (adapter, report)
        })
        .collect();
    (instance, reports)
}

/// Every adapter of this machine, API by API.
pub fn adapters() -> Vec<AdapterReport> {
    Api::ALL.into_iter().flat_map(|api| pollster::block_on(adapters_of(api)).1).map(|(_, report)| report).collect()
}

/// Lower is better: real GPUs first, the strongest kind of them first.
fn rank(kind: &str) -> usize {
    ["discrete", "integrated", "virtual", "other", "software"].iter().position(|&k| k == kind).unwrap_or(usize::MAX)
}

/// The device that `spec` asks for, ready for tensors.
///
/// # Errors
/// When there is no such adapter, or it refuses to make a device.
pub fn choose(spec: DeviceSpec) -> Result<Chosen> {
    match spec {
        DeviceSpec::Cpu => Ok(cpu("asked for")),
        DeviceSpec::Gpu(api, index) => gpu(api, index),
        DeviceSpec::Auto => auto(),
    }
}

fn cpu(reason: &str) -> Chosen {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    Chosen {
        device: Device::flex(),
        name: format!("CPU {}, {threads} threads", cpu_name()),
        backend: "cpu",
        reason: reason.into(),
        adapter: None,
        capabilities: Capabilities::default(),
    }
}

/// The processor's own name.
pub fn cpu_name() -> String {
    use sysinfo::{CpuRefreshKind, RefreshKind, System};
    let what = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(what).ok();
    let name = system.and_then(|system| system.cpus().first().map(|cpu| cpu.brand().trim().to_string()));
    name.unwrap_or_else(|| "(unnamed)".into())
}

fn auto() -> Result<Chosen> {
    let mut software = None;
    for api in Api::ALL {
        let (instance, mut adapters) = pollster::block_on(adapters_of(api));
        adapters.sort_by_key(|(_, report)| rank(report.kind)); // stable: the driver's order within a kind
        let Some((adapter, report)) = adapters.into_iter().next() else {
            continue;
        };
        if report.kind == "software" {
            software.get_or_insert(report.name);
            continue;
        }
        let reason = format!("auto: the first {} GPU", report.kind);
        return open(api, instance, adapter, report, reason);
    }
    let mut reason = match software {
        Some(name) => format!("auto: no GPU; {name} is a software rasteriser, used only when asked for by name"),
        None => "auto: no GPU adapter found".to_string(),
    };
    if cfg!(target_os = "macos") {
        reason.push_str("; containers and most virtual machines on macOS have no Metal: run gpt-wgpu on macOS itself");
    }
    Ok(cpu(&reason))
}

/// Waits until `device` has done everything that was queued.
///
/// # Errors
/// When the device failed.
pub fn wait(device: &Device) -> Result<()> {
    Ok(failure::checked(device, device.sync())?)
}

/// Whether the device that `spec` asks for is there, without opening it.
///
/// # Errors
/// When there is no such adapter: what to do about it.
pub fn check(spec: DeviceSpec) -> Result<()> {
    match spec {
        DeviceSpec::Auto | DeviceSpec::Cpu => Ok(()),
        DeviceSpec::Gpu(api, index) => find(api, index).map(|_| ()),
    }
}

fn gpu(api: Api, index: Option<usize>) -> Result<Chosen> {
    let (instance, adapter, report, reason) = find(api, index)?;
    open(api, instance, adapter, report, reason)
}

/// The adapter that was asked for, and why it is this one.
fn find(api: Api, index: Option<usize>) -> Result<(wgpu::Instance, wgpu::Adapter, AdapterReport, String)> {
    let (instance, mut adapters) = pollster::block_on(adapters_of(api));
    if adapters.is_empty() {
        let hint = match api {
            Api::Metal if cfg!(target_os = "macos") => {
                "; containers and most virtual machines on macOS have no Metal: run gpt-wgpu on macOS itself"
            }
            Api::Metal => "; Metal exists on macOS only",
            Api::Dx12 if !cfg!(windows) => "; DX12 exists on Windows only",
            Api::Vulkan if cfg!(target_os = "macos") => {
                "; on macOS it comes with `brew install molten-vk vulkan-loader`, and is found with DYLD_FALLBACK_LIBRARY_PATH \
                 at $(brew --prefix)/lib and VK_DRIVER_FILES at $(brew --prefix)/etc/vulkan/icd.d/MoltenVK_icd.json"
            }
            Api::Vulkan => "; it needs a driver and the Vulkan loader (Debian: libvulkan1 mesa-vulkan-drivers)",
            _ => "",
        };
        bail!("no {} adapter on this machine{hint}. `gpt-wgpu info` lists what there is", api.name());
    }
    let count = adapters.len();
    let (position, reason) = match index {
        Some(index) if index < count => (index, "asked for".to_string()),
        Some(index) => bail!(
            "--device {}:{index}: there are {count} {} adapters, numbered from 0; `gpt-wgpu info` lists them",
            api.name(),
            api.name()
        ),
        None => {
            let best = (0..count).min_by_key(|&i| rank(adapters[i].1.kind)).unwrap_or(0);
            (best, format!("asked for; the best of {count} {} adapter(s)", api.name()))
        }
    };
    let (adapter, report) = adapters.swap_remove(position);
    Ok((instance, adapter, report, reason))
}

/// Launches that CubeCL submits at once, twice its own number: a submit costs the host as much as ten launches.
/// [`kernel::submit_limit`] submits earlier where launches are large.
pub const TASKS_MAX: usize = 64;

/// Burn on a device of wgpu's that was made elsewhere.
///
/// # Errors
/// When Burn cannot run there.
pub fn import(setup: WgpuSetup) -> Result<Device> {
    Ok(Device::wgpu_options().setup(setup).tasks_max(TASKS_MAX).init()?)
}

/// Makes wgpu's device with everything the adapter has, and hands it to Burn.
fn open(
    api: Api,
    instance: wgpu::Instance,
    adapter: wgpu::Adapter,
    report: AdapterReport,
    reason: String,
) -> Result<Chosen> {
    startup::part("adapters");
    let request = wgpu::DeviceDescriptor {
        label: Some("gpt-wgpu"),
        // Mappable primary buffers make wgpu keep device memory host-visible, which is slow on discrete GPUs.
        required_features: adapter.features() - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS,
        required_limits: adapter.limits(),
        memory_hints: wgpu::MemoryHints::MemoryUsage, // CubeCL pools memory itself
        trace: wgpu::Trace::Off,
        // SAFETY: cooperative matrices are experimental in wgpu; our kernels are tested under them.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&request))
        .with_context(|| format!("{} ({}) refused to make a device", report.name, report.device))?;
    startup::part("device");
    let capabilities = capabilities(&adapter);
    let wgpu_device = device.clone();
    let setup = WgpuSetup { backend: adapter.get_info().backend, instance, adapter, device, queue };
    let device = import(setup).with_context(|| format!("{} ({}) cannot run Burn", report.name, report.device))?;
    if let DispatchDevice::Cube(cube) = device.as_dispatch() {
        kernel::register(cube.clone(), capabilities.clone(), kernel::submit_limit(report.kind));
        failure::watch(cube.clone(), wgpu_device);
    }
    Ok(Chosen { capabilities, device, name: report.name.clone(), backend: api.name(), reason, adapter: Some(report) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_parse() {
        let parse = |text: &str| text.parse::<DeviceSpec>().map_err(|e| e.to_string());
        assert_eq!(parse("auto"), Ok(DeviceSpec::Auto));
        assert_eq!(parse("vulkan:1"), Ok(DeviceSpec::Gpu(Api::Vulkan, Some(1))));
        assert_eq!(parse("metal"), Ok(DeviceSpec::Gpu(Api::Metal, None)));
        assert!(parse("cuda").unwrap_err().contains("expected auto, cpu, metal"));
        assert!(parse("cpu:1").is_err());
        assert!(parse("vulkan:x").unwrap_err().contains("`x` is not an adapter's number"));
    }
}
