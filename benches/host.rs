//! What a training step costs the host: whole steps on wgpu's no-op backend, whose device does nothing and takes no time.
//!
//! `cargo bench --bench host -- [CONFIG [STEPS]]`; without one, configs/shakespeare_char.toml. A GPU is kept waiting where it needs less
//! than this for a step.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_wgpu::WgpuSetup;
use gpt_wgpu::config::Config;
use gpt_wgpu::data::Batch;
use gpt_wgpu::kernel::{self, Capabilities, Kernels, SUBGROUP_SIZE};
use gpt_wgpu::model::Gpt;
use gpt_wgpu::optim::Optimizer;
use gpt_wgpu::precision::Dtype;
use gpt_wgpu::replay::Replay;
use gpt_wgpu::step::Step;

const WARMUP: usize = 5;
/// Steps that are timed, where nobody asks for another number.
const STEPS: usize = 300;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let path = args.next();
    let steps = args.next().map_or(Ok(STEPS), |steps| steps.parse()).context("STEPS is not a number")?;
    let path = path.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/configs/shakespeare_char.toml").into());
    let config = Config::load(Path::new(&path))?;
    kernel::choose(Kernels::Coop);
    let inner = noop()?;
    let device = inner.clone().autodiff();
    let vocabulary = if config.model.vocab_size == 0 { 65 } else { config.model.vocab_size };
    let f16 = config.train.dtype != Dtype::F32;
    let mut model = Gpt::init(&config.gpt(vocabulary), config.train.seed, &device);
    model.f16 = f16;
    let tokens = vec![0; config.data.batch_size * config.model.block_size];
    let batch = |_| Ok(Batch { x: tokens.clone(), y: tokens.clone() });
    let step = Step { config: &config, device: &device, batch: &batch };
    let (mut optimizer, mut position) = (Optimizer::new(f16, &inner), 0);
    for (what, replayed) in [("made anew", false), ("replayed", true)] {
        let (mut replay, mut samples) = (Replay::new(&step, replayed), Vec::new());
        for i in 0..WARMUP + steps {
            let started = Instant::now();
            model = replay.advance(model, &mut optimizer, &mut position, 1e-3)?;
            gpt_wgpu::device::wait(&inner)?;
            if i >= WARMUP {
                samples.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
        samples.sort_by(f64::total_cmp);
        println!(
            "{path}: {:.2} ms of host time a step, {what}, median of {steps} ({:.2} to {:.2})",
            samples[steps / 2],
            samples[0],
            samples[steps - 1]
        );
    }
    Ok(())
}

/// wgpu's no-op device, with what an H200 can do: the same kernels are chosen and their text is checked.
fn noop() -> Result<Device> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::NOOP,
        backend_options: wgpu::BackendOptions {
            noop: wgpu::NoopBackendOptions { enable: true, ..Default::default() },
            ..Default::default()
        },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::NOOP));
    let adapter = adapters.into_iter().next().context("wgpu was built without its no-op backend")?;
    let request = wgpu::DeviceDescriptor {
        required_features: adapter.features() - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS,
        // Its limits are no limits, and wgpu makes room for every bind group that there may be.
        required_limits: wgpu::Limits { max_bind_groups: 4, ..adapter.limits() },
        // SAFETY: nothing is executed.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&request))?;
    let setup = WgpuSetup { backend: wgpu::Backend::Noop, instance, adapter, device, queue };
    let device = gpt_wgpu::device::import(setup)?;
    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        bail!("Burn took the no-op device for something else");
    };
    let matrices = vec![(16, true)];
    let capabilities =
        Capabilities { subgroup_size: Some(SUBGROUP_SIZE), matrices, f16: true, int64: true, ..Default::default() };
    kernel::register(cube.clone(), capabilities, f64::INFINITY);
    Ok(device)
}
