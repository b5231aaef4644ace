//! Compiles the kernels of a step before they are asked for, all at once.
//!
//! CubeCL makes a kernel's pipeline at its first launch, one after the other on one thread. NVIDIA's driver takes 0.2 s for each of
//! the large ones, but only 3 ms for one that it has made before: on an H200 131 kernels took 48 s one after the other, 3.2 s on
//! 16 threads, and 0.4 s when they were made again. So they are made here on all threads and thrown away at the end, and CubeCL
//! finds them in the driver's cache.
//!
//! Mesa's lavapipe does not gain: it compiles as long the second time. Other drivers were not measured, and are left alone.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::Result;
use burn::tensor::Device;

use crate::failure;
use crate::kernel::{self, Kernel, Kernels};

/// PCI's number of NVIDIA.
const NVIDIA: u32 = 0x10de;

/// Compiles `kernels` on `device`, where that is known to pay. The pipelines are for the driver's cache, and nobody runs them: keep
/// them until CubeCL has made its own. What is wrong with a kernel is told when it is launched.
///
/// # Errors
/// What `kernels` fails with.
pub fn compile(device: &Device, kernels: impl FnOnce() -> Result<Vec<Kernel>>) -> Result<Vec<wgpu::ComputePipeline>> {
    let composed = kernel::choice() == Kernels::Composed;
    let Some(device) = failure::wgpu_device(device).filter(|device| !composed && keeps_pipelines(device)) else {
        return Ok(Vec::new());
    };
    let texts: HashSet<String> = kernels()?.iter().map(Kernel::text).collect();
    let mut texts: Vec<String> = texts.into_iter().collect();
    // The longest first, so that none of them is the last to begin.
    texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
    let threads = thread::available_parallelism().map_or(1, |threads| threads.get());
    let next = AtomicUsize::new(0);
    let worker = || {
        let own = std::iter::from_fn(|| texts.get(next.fetch_add(1, Ordering::Relaxed)));
        let made = own.map(|text| {
            let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let pipeline = pipeline(&device, text);
            // CubeCL's own creation fails in the same way, and is heard.
            drop(pollster::block_on(scope.pop()));
            pipeline
        });
        made.collect::<Vec<_>>()
    };
    Ok(thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    }))
}

/// Whether a second creation of a pipeline costs little on this device.
fn keeps_pipelines(device: &wgpu::Device) -> bool {
    let adapter = device.adapter_info();
    adapter.backend == wgpu::Backend::Vulkan && adapter.vendor == NVIDIA
}

/// The pipeline of a kernel's text as CubeCL makes it. What is wrong with the text is told to the device's error scope.
pub fn pipeline(device: &wgpu::Device, text: &str) -> wgpu::ComputePipeline {
    let source = wgpu::ShaderSource::Wgsl(text.into());
    let module = wgpu::ShaderModuleDescriptor { label: None, source };
    // SAFETY: what CubeCL asks for too; our kernels stay in bounds by themselves, which tests/metal holds them to.
    let module = unsafe { device.create_shader_module_trusted(module, wgpu::ShaderRuntimeChecks::unchecked()) };
    device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..Default::default()
        },
        cache: None,
    })
}
