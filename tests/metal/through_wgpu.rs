//! The cooperative kernels of edge 8 through wgpu itself, where an adapter has such matrices: a Mac, or Mesa's lavapipe from
//! 26.1 on (scripts/mesa-coop). Here a compiler that is not ours turns the kernels into code.

use gpt_wgpu::warmup::pipeline;
use wgpu::CooperativeScalarType::{F16, F32};

use crate::cases::{self, Case};
use crate::lower;

/// An adapter that sums products of 8x8 f16 matrices in f32, and its subgroups' size.
fn adapter() -> Option<(wgpu::Adapter, u32)> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all())).into_iter().find_map(|adapter| {
        let info = adapter.get_info();
        let size = if info.backend == wgpu::Backend::Metal { 32 } else { info.subgroup_max_size };
        let exact = info.backend == wgpu::Backend::Metal || info.subgroup_min_size == size;
        let matrices = adapter.cooperative_matrix_properties();
        let has = matrices.iter().any(|p| (p.m_size, p.n_size, p.k_size, p.ab_type, p.cr_type) == (8, 8, 8, F16, F32));
        (has && exact).then_some((adapter, size))
    })
}

/// A device with everything that the adapter has.
fn open(adapter: &wgpu::Adapter) -> (wgpu::Device, wgpu::Queue) {
    let request = wgpu::DeviceDescriptor {
        required_features: adapter.features() - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS,
        required_limits: adapter.limits(),
        // SAFETY: cooperative matrices are experimental in wgpu; this is the test of our kernels under them.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    pollster::block_on(adapter.request_device(&request)).unwrap()
}

/// What the buffers hold after one launch of `wgsl`.
fn run(device: &wgpu::Device, queue: &wgpu::Queue, case: &Case, wgsl: &str) -> Vec<Vec<u8>> {
    let pipeline = pipeline(device, wgsl);
    let buffer = |bytes: &[u8], usage| {
        let size = (bytes.len() as u64).next_multiple_of(4);
        let usage = usage | wgpu::BufferUsages::COPY_DST;
        let buffer =
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        let mut padded = bytes.to_vec();
        padded.resize(size as usize, 0);
        queue.write_buffer(&buffer, 0, &padded);
        buffer
    };
    let storage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let mut buffers: Vec<_> = case.buffers.iter().map(|b| buffer(&b.bytes(), storage)).collect();
    let params: Vec<u8> = case.params.iter().flat_map(|word| word.to_le_bytes()).collect();
    buffers.push(buffer(&params, wgpu::BufferUsages::UNIFORM));
    let entries: Vec<_> = buffers
        .iter()
        .enumerate()
        .map(|(i, buffer)| wgpu::BindGroupEntry { binding: i as u32, resource: buffer.as_entire_binding() })
        .collect();
    let layout = pipeline.get_bind_group_layout(0);
    let group =
        device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries });

    let mut encoder = device.create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.dispatch_workgroups(case.grid.0, case.grid.1, case.grid.2);
    drop(pass);
    let mut copies = Vec::new();
    for (buffer, content) in buffers.iter().zip(&case.buffers) {
        let (size, usage) = (buffer.size(), wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
        let copy =
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        encoder.copy_buffer_to_buffer(buffer, 0, &copy, 0, size);
        copies.push((copy, content.bytes().len()));
    }
    queue.submit([encoder.finish()]);
    let read = |(copy, bytes): (wgpu::Buffer, usize)| {
        copy.slice(..).map_async(wgpu::MapMode::Read, |result| result.unwrap());
        device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        copy.slice(..).get_mapped_range().unwrap()[..bytes].to_vec()
    };
    copies.into_iter().map(read).collect()
}

/// One head dimension, and products that load eight elements of f16 at once: lavapipe takes ten seconds and more to compile a
/// kernel.
#[test]
fn cooperative_kernels_run_through_wgpu() {
    let Some((adapter, subgroup)) = adapter() else {
        let required = std::env::var("GPT_WGPU_REQUIRE_COOP").is_ok_and(|v| v == "1");
        assert!(!required, "GPT_WGPU_REQUIRE_COOP=1 and no adapter has 8x8 matrices of f16");
        eprintln!("SKIPPED: no adapter has 8x8 matrices of f16 (scripts/mesa-coop brings one)");
        return;
    };
    eprintln!("{}, subgroups of {subgroup}", adapter.get_info().name);
    let (device, queue) = open(&adapter);
    let attention = ["alias mat_elem = f16;", "const DROPOUT: bool = true;", "const HEAD_DIM: u32 = 16u;"];
    let products = ["alias mat_elem = f16;", "const K_RAGGED: bool = true;", "// plain, octs"];
    let mut count = 0;
    for case in cases::all() {
        let header = case.kernel.header();
        if ![attention, products].iter().any(|constants| constants.iter().all(|constant| header.contains(constant))) {
            continue;
        }
        // The kernels are made for 32; lavapipe has 8. The rows of a workgroup do not depend on it.
        let lanes = "const SUBGROUP_SIZE: u32 = 32u;";
        assert_eq!(header.matches(lanes).count(), 1, "{}", lower::label(&case.kernel));
        let wgsl = case.kernel.text().replacen(lanes, &format!("const SUBGROUP_SIZE: u32 = {subgroup}u;"), 1);
        for (buffer, after) in case.buffers.iter().zip(run(&device, &queue, &case, &wgsl)) {
            let what = format!("{} {}", lower::label(&case.kernel), case.what);
            assert_eq!(buffer.difference(&after), None, "{what}");
        }
        eprintln!("{}", lower::label(&case.kernel));
        count += 1;
    }
    assert_eq!(
        count,
        12 + 7,
        "forward, dq, dkv and dkv that keeps dS, of f32 tensors, of f16 and of both; three, three (one of a held gradient) and one of \
         the products' layouts"
    );
}

/// On a Mac, Apple's own compiler takes every kernel that its GPU can be given.
#[test]
fn every_kernel_compiles_with_apples_compiler() {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::METAL));
    let Some(adapter) = adapters.first() else {
        let wanted = std::env::var("GPT_WGPU_DEVICE").is_ok_and(|device| device.starts_with("metal"));
        assert!(!wanted, "GPT_WGPU_DEVICE asks for Metal and there is none");
        eprintln!("SKIPPED: no Metal on this machine");
        return;
    };
    let chosen = gpt_wgpu::device::choose("metal:0".parse().unwrap()).unwrap();
    let (device, _queue) = open(adapter);
    for kernel in gpt_wgpu::ops::kernels(&chosen.capabilities) {
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        pipeline(&device, &kernel.text());
        let error = pollster::block_on(scope.pop());
        assert!(error.is_none(), "{}: {}", lower::label(&kernel), error.unwrap());
    }
}
