//! The estimate of a run's memory against what a device reports, and the plan that is made of it.

mod common;

use std::path::Path;
use std::sync::Mutex;

use burn::tensor::Device;
use gpt_wgpu::config::Config;
use gpt_wgpu::data::Batch;
use gpt_wgpu::device::{self, Chosen, DeviceSpec};
use gpt_wgpu::kernel::Variant;
use gpt_wgpu::memory::plan::{Budget, Plan};
use gpt_wgpu::memory::{Keep, LARGEST_BUFFER, Shape, estimate};
use gpt_wgpu::model::{Gpt, GptConfig};
use gpt_wgpu::ops::linear::Gelu;
use gpt_wgpu::optim::Optimizer;
use gpt_wgpu::train::{Step, upload};

const CHAR: GptConfig =
    GptConfig { n_layer: 6, n_head: 6, n_embd: 384, block_size: 256, vocab_size: 65, bias: false, gelu: Gelu::Erf };
const GPT2: GptConfig = GptConfig { n_layer: 12, n_head: 12, n_embd: 768, block_size: 1024, vocab_size: 50304, ..CHAR };

fn shape(gpt: GptConfig, batch_size: usize, dropout: bool) -> Shape {
    Shape {
        gpt,
        batch_size,
        accumulates: false,
        dropout,
        element: 4,
        keep: Keep::Everything,
        variant: Some(Variant::Coop { edge: 16, f16: true }),
        pooled: true,
        largest_buffer: LARGEST_BUFFER,
    }
}

/// How far the estimate may be from what is measured.
const TOLERANCE: f64 = 0.1;

#[track_caller]
fn assert_near(what: &str, estimated: u64, measured: u64) {
    let off = estimated as f64 / measured as f64 - 1.0;
    eprintln!("{what}: {:.1} MiB estimated, {:.1} MiB measured: {:+.1} %", mib(estimated), mib(measured), 100.0 * off);
    assert!(off.abs() < TOLERANCE, "{what}: {} estimated, {} measured", mib(estimated), mib(measured));
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// docs/measurements/h200: f32, Vulkan.
#[test]
fn the_yardsticks_measurements_on_an_h200_are_met() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/measurements/h200");
    let measured = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        report["peak_memory_bytes"].as_u64().unwrap()
    };
    for kernels in ["coop", "scalar"] {
        let variant = if kernels == "coop" { Variant::Coop { edge: 16, f16: true } } else { Variant::Scalar };
        for (name, shape) in [("char", shape(CHAR, 64, true)), ("gpt2", shape(GPT2, 8, false))] {
            let name = format!("{name}-{kernels}.json");
            let shape = Shape { variant: Some(variant), ..shape };
            assert_near(&name, estimate(&shape).total(), measured(&name));
        }
    }
}

/// One device a test: each begins with an empty pool.
fn fresh_gpu() -> Option<Chosen> {
    let name = std::env::var("GPT_WGPU_DEVICE").unwrap_or_else(|_| "vulkan".into());
    let spec: DeviceSpec = name.parse().unwrap();
    common::gpu()?; // says why there is none, or fails where there has to be one
    Some(device::choose(spec).unwrap())
}

/// Bytes reserved after each of `steps` steps.
fn reserved(chosen: &Chosen, gpt: &GptConfig, config: &Config, steps: usize) -> Vec<u64> {
    let device = chosen.device.clone().autodiff();
    let (batch_size, time) = (config.data.batch_size, gpt.block_size);
    let tokens: Vec<i32> = (0..batch_size * time).map(|i| (i * 7 % gpt.vocab_size) as i32).collect();
    let batch = |_| Ok(upload(&Batch { x: tokens.clone(), y: tokens.clone() }, batch_size, &device));
    let step = Step { config, batch: &batch };
    let mut model = Gpt::init(gpt, 1, &device);
    let (mut optimizer, mut position) = (Optimizer::default(), 0);
    let mut reserved = Vec::new();
    for _ in 0..steps {
        let (updated, _) = step.run(model, &mut optimizer, &mut position, 1e-3).unwrap();
        model = updated;
        device::wait(&chosen.device).unwrap();
        reserved.push(bytes_reserved(&chosen.device));
    }
    reserved
}

fn bytes_reserved(device: &Device) -> u64 {
    device.memory_pool_usage().unwrap().bytes_reserved
}

fn configured(gpt: &GptConfig, batch_size: usize, accumulation: usize, dropout: f64) -> Config {
    let mut config = Config::default();
    config.model.n_layer = gpt.n_layer;
    config.model.n_head = gpt.n_head;
    config.model.n_embd = gpt.n_embd;
    config.model.block_size = gpt.block_size;
    config.model.bias = gpt.bias;
    config.model.dropout = dropout;
    config.data.batch_size = batch_size;
    config.data.gradient_accumulation_steps = accumulation;
    config
}

/// One device at a time: two pools do not disturb each other, two trainings take long.
static ONE: Mutex<()> = Mutex::new(());

#[test]
fn a_devices_pool_holds_what_is_estimated() {
    let _one = ONE.lock();
    let small = GptConfig { n_layer: 3, n_head: 3, n_embd: 96, block_size: 64, vocab_size: 65, ..CHAR };
    let cases = [
        ("the quickstart", small, 12, 1, 0.0),
        ("dropout, biases", GptConfig { bias: true, ..small }, 16, 1, 0.2),
        ("accumulation", small, 12, 2, 0.0),
        ("a large vocabulary", GptConfig { n_layer: 1, vocab_size: 20_000, ..small }, 4, 1, 0.0),
        ("a wide layer", GptConfig { n_layer: 2, n_head: 4, n_embd: 256, ..small }, 4, 2, 0.1),
        ("a long context", GptConfig { n_layer: 2, block_size: 256, ..small }, 4, 1, 0.0),
    ];
    for (name, gpt, batch_size, accumulation, dropout) in cases {
        let Some(chosen) = fresh_gpu() else {
            return;
        };
        let config = configured(&gpt, batch_size, accumulation, dropout);
        let budget = Budget::of(&chosen);
        let plan = Plan::new(&config, &gpt, budget, false);
        let measured = reserved(&chosen, &gpt, &config, 4);
        eprintln!("{name}: {measured:?}");
        assert_near(name, plan.estimate.total(), measured[3]);
    }
}
