//! What an adapter is and has: for `gpt-wgpu info`, and for the choice of kernels.

use serde::Serialize;

use super::Api;
use crate::kernel::Capabilities;

/// One adapter, as `gpt-wgpu info` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// What `--device` takes to choose it.
    pub device: String,
    /// The adapter's own name.
    pub name: String,
    /// discrete, integrated, virtual, software or other.
    pub kind: &'static str,
    /// Driver and its version.
    pub driver: String,
    /// PCI or vendor identity, `vendor:device` in hexadecimal.
    pub id: String,
    /// Place on the PCI bus, `domain:bus:device.function`, where the API tells.
    pub pci_bus: Option<String>,
    /// Bytes, where the API tells.
    pub memory_bytes: Option<u64>,
    /// What the kernels care about.
    pub limits: Limits,
}

/// The limits and features of an adapter that the choice of kernels depends on.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations in a workgroup.
    pub workgroup_invocations: u32,
    /// Smallest and largest subgroup.
    pub subgroup_size: (u32, u32),
    /// Whether subgroup operations are there.
    pub subgroups: bool,
    /// Whether shaders have f16.
    pub f16: bool,
    /// Cooperative matrices: `M x N x K element -> accumulator`.
    pub cooperative_matrices: Vec<String>,
    /// Whether timestamp queries are there.
    pub timestamps: bool,
    /// Largest storage binding, bytes.
    pub max_binding: u64,
    /// Largest buffer, bytes.
    pub max_buffer: u64,
}

/// The report of the `index`-th adapter of `api`.
pub(super) fn report(api: Api, index: usize, adapter: &wgpu::Adapter) -> AdapterReport {
    let info = adapter.get_info();
    let (limits, features) = (adapter.limits(), adapter.features());
    AdapterReport {
        device: format!("{}:{index}", api.name()),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        id: format!("{:04x}:{:04x}", info.vendor, info.device),
        pci_bus: Some(info.device_pci_bus_id).filter(|place| !place.is_empty()),
        memory_bytes: memory_bytes(adapter),
        name: info.name,
        limits: Limits {
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            workgroup_invocations: limits.max_compute_invocations_per_workgroup,
            subgroup_size: (info.subgroup_min_size, info.subgroup_max_size),
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            f16: features.contains(wgpu::Features::SHADER_F16),
            cooperative_matrices: adapter
                .cooperative_matrix_properties()
                .iter()
                .map(|p| format!("{}x{}x{} {:?} -> {:?}", p.m_size, p.n_size, p.k_size, p.ab_type, p.cr_type))
                .collect(),
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            max_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
        },
    }
}

/// What of an adapter decides which kernels it can run.
pub(super) fn capabilities(adapter: &wgpu::Adapter) -> Capabilities {
    use wgpu::CooperativeScalarType::{F16, F32};
    let (info, limits) = (adapter.get_info(), adapter.limits());
    // Metal reports a range, yet every Apple GPU has 32 (gpuweb#3950).
    let apple = info.backend == wgpu::Backend::Metal;
    let exact = apple || info.subgroup_min_size == info.subgroup_max_size;
    let mut matrices: Vec<_> = adapter
        .cooperative_matrix_properties()
        .into_iter()
        .filter(|p| p.m_size == p.n_size && p.n_size == p.k_size && p.cr_type == F32)
        .filter(|p| matches!(p.ab_type, F16 | F32))
        .map(|p| (p.m_size, p.ab_type == F16))
        .collect();
    matrices.dedup();
    Capabilities {
        subgroup_size: exact.then_some(if apple { 32 } else { info.subgroup_max_size }),
        matrices,
        f16: adapter.features().contains(wgpu::Features::SHADER_F16),
        int64: adapter.features().contains(wgpu::Features::SHADER_INT64),
        few_registers: apple || info.device_type == wgpu::DeviceType::Cpu,
        largest_buffer: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
    }
}

/// Metal's recommendedMaxWorkingSetSize, which is what the GPU may hold before the system starts to evict.
#[cfg(target_vendor = "apple")]
fn memory_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    // SAFETY: the raw device is only read from, and not kept.
    let metal = unsafe { adapter.as_hal::<wgpu::hal::api::Metal>() }?;
    use objc2_metal::MTLDevice;
    Some(metal.raw_device().recommendedMaxWorkingSetSize())
}

/// The size of Vulkan's largest heap on the device itself; the other APIs tell none.
#[cfg(not(target_vendor = "apple"))]
fn memory_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    /// VK_MEMORY_HEAP_DEVICE_LOCAL_BIT
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the raw handles are only read from, and not kept.
    let properties = unsafe {
        let vulkan = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = vulkan.shared_instance().raw_instance();
        instance.get_physical_device_memory_properties(vulkan.raw_physical_device())
    };
    let heaps = properties.memory_heaps.iter().take(properties.memory_heap_count as usize);
    heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
}
