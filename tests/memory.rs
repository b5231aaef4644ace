//! The estimate of a run's memory against what a device reports, and the plan that is made of it.

mod common;

use std::path::Path;
use std::sync::Mutex;

use gpt_wgpu::config::Config;
use gpt_wgpu::data::Batch;
use gpt_wgpu::device::{self, Chosen, DeviceSpec};
use gpt_wgpu::kernel::{Variant, submit_limit};
use gpt_wgpu::memory::plan::{Budget, Plan};
use gpt_wgpu::memory::{Engine, LARGEST_BUFFER, Shape, estimate};
use gpt_wgpu::model::{Gpt, GptConfig};
use gpt_wgpu::ops::cross_entropy::chunk_rows;
use gpt_wgpu::ops::linear::Gelu;
use gpt_wgpu::optim::Optimizer;
use gpt_wgpu::recompute::Recompute;
use gpt_wgpu::replay::Replay;
use gpt_wgpu::step::Step;

const CHAR: GptConfig =
    GptConfig { n_layer: 6, n_head: 6, n_embd: 384, block_size: 256, vocab_size: 65, bias: false, gelu: Gelu::Erf };
const GPT2: GptConfig = GptConfig { n_layer: 12, n_head: 12, n_embd: 768, block_size: 1024, vocab_size: 50304, ..CHAR };

fn shape(gpt: GptConfig, batch_size: usize, dropout: bool) -> Shape {
    Shape {
        gpt,
        batch_size,
        accumulates: false,
        dropout,
        f16: false,
        recompute: Recompute::None,
        engine: Engine::Kernels(Variant::Coop { edge: 16, f16: true }),
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

/// docs/measurements/h200: f32 and f16, Vulkan.
#[test]
fn the_yardsticks_measurements_on_an_h200_are_met() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/measurements/h200");
    let measured = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        report["peak_memory_bytes"].as_u64().unwrap()
    };
    for kernels in ["coop", "scalar", "f16"] {
        let variant = if kernels == "scalar" { Variant::Scalar } else { Variant::Coop { edge: 16, f16: true } };
        for (name, shape) in [("char", shape(CHAR, 64, true)), ("gpt2", shape(GPT2, 8, false))] {
            let name = format!("{name}-{kernels}.json");
            let shape = Shape { engine: Engine::Kernels(variant), f16: kernels == "f16", ..shape };
            assert_near(&name, estimate(&shape).total(), measured(&name));
        }
    }
}

/// The configurations of configs/, each with the model that it makes; a vocabulary that the dataset would tell is GPT-2's.
fn configurations() -> Vec<(String, Config, GptConfig)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let configurations: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let config = Config::load(&path).unwrap();
            let vocab_size = if config.model.vocab_size == 0 { 50304 } else { config.model.vocab_size };
            let gpt = config.gpt(vocab_size);
            (path.display().to_string(), config, gpt)
        })
        .collect();
    assert!(configurations.len() >= 6);
    configurations
}

#[test]
fn no_configuration_needs_a_buffer_beyond_two_gib() {
    for (name, config, gpt) in configurations() {
        for variant in [Variant::Scalar, Variant::Coop { edge: 8, f16: true }, Variant::Coop { edge: 16, f16: true }] {
            for f16 in [false, true] {
                let shape = Shape::of(&config, &gpt, f16, Engine::Kernels(variant), true, u64::MAX);
                let (bytes, what) = estimate(&shape).largest_tensor;
                assert!(bytes <= LARGEST_BUFFER, "{name}: {what} has {} MiB", mib(bytes));
            }
        }
    }
}

/// What cannot be split is the largest launch: a linear layer of the MLP, a chunk of the head, a pass of attention's backward.
#[test]
fn no_single_launch_of_a_configuration_is_more_than_a_small_gpu_may_be_given() {
    for (name, config, gpt) in configurations() {
        let rows = config.data.batch_size * gpt.block_size;
        let chunk = rows.min(chunk_rows(gpt.vocab_size, true, false, u64::MAX));
        let layer = 2 * rows * 4 * gpt.n_embd * gpt.n_embd;
        let head = 2 * chunk * gpt.vocab_size * gpt.n_embd;
        let attention = 5 * rows * gpt.block_size * gpt.n_embd / 2;
        let largest = layer.max(head).max(attention);
        eprintln!("{name}: {:.3} TFLOP", largest as f64 / 1e12);
        assert!((largest as f64) < submit_limit("integrated"), "{name}: {largest} operations in a launch");
    }
}

fn budget(gib: f64) -> Budget {
    Budget {
        bytes: Some((gib * f64::from(1 << 30)) as u64),
        source: "for a test",
        hint: Some("a hint"),
        largest_buffer: LARGEST_BUFFER,
        pooled: true,
        f16: false,
        has_f16: true,
        engines: [Engine::Kernels(Variant::Scalar); 2],
    }
}

/// The number behind `name = ` in an offer.
fn offered(refusal: &str, name: &str) -> Option<usize> {
    let (_, after) = refusal.split_once(&format!("{name} = "))?;
    after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[test]
fn every_setting_that_a_refusal_offers_fits_and_the_next_larger_does_not() {
    let config = configured(&GPT2, 12, 40, 0.0);
    let refused = |config: &Config, gpt: &GptConfig| Plan::new(config, gpt, budget(8.0), false).refusal();
    let refusal = refused(&config, &GPT2).expect("11 GiB do not fit 8");
    assert!(refusal.contains("a hint") && refusal.contains("for a test"), "{refusal}");

    let offer = |batch: usize| {
        let mut config = config.clone();
        config.data.batch_size = batch;
        config.data.gradient_accumulation_steps = 480 / batch;
        config
    };
    let batch = offered(&refusal, "batch_size").unwrap();
    assert_eq!(offered(&refusal, "gradient_accumulation_steps"), Some(480 / batch), "{refusal}");
    assert_eq!(refused(&offer(batch), &GPT2), None);
    let next = (batch + 1..12).find(|batch| 480 % batch == 0).unwrap();
    assert!(refused(&offer(next), &GPT2).is_some(), "{next} fits too: {refusal}");

    assert!(refusal.contains("recompute = attention_mlp") && refusal.contains("dtype = f16"), "{refusal}");
    let mut again = config.clone();
    again.train.recompute = Recompute::AttentionMlp;
    assert_eq!(refused(&again, &GPT2), None);
    let half = Budget { f16: true, ..budget(8.0) };
    assert_eq!(Plan::new(&config, &GPT2, half, false).refusal(), None);

    let largest = Plan::new(&config, &GPT2, budget(8.0), false).largest_batch().unwrap();
    let with = |batch_size: usize| {
        let mut config = config.clone();
        config.data.batch_size = batch_size;
        refused(&config, &GPT2).is_some()
    };
    assert_eq!((with(largest), with(largest + 1)), (false, true));
}

/// Where nothing more can be computed again and there is no f16, the model itself has to shrink.
#[test]
fn a_smaller_model_is_offered_last_and_fits() {
    let mut config = configured(&GPT2, 12, 40, 0.0);
    config.train.recompute = Recompute::Block;
    let small = Budget { has_f16: false, ..budget(3.5) };
    let refused = |gpt: &GptConfig| Plan::new(&config, gpt, small.clone(), false).refusal();
    let refusal = refused(&GPT2).expect("4 GiB do not fit 3.5");
    assert!(!refusal.contains("recompute") && !refusal.contains("dtype"), "{refusal}");

    let time = offered(&refusal, "block_size").unwrap();
    assert_eq!(refused(&GptConfig { block_size: time, ..GPT2 }), None);
    assert!(refused(&GptConfig { block_size: time + 64, ..GPT2 }).is_some(), "{refusal}");

    let layers = offered(&refusal, "n_layer").unwrap();
    assert_eq!(refused(&GptConfig { n_layer: layers, ..GPT2 }), None);
    assert!(refused(&GptConfig { n_layer: layers + 1, ..GPT2 }).is_some(), "{refusal}");
}

#[test]
fn a_checkpoints_shape_is_not_offered_another() {
    let config = configured(&GPT2, 12, 40, 0.0);
    let refusal = Plan::new(&config, &GPT2, budget(8.0), true).refusal().unwrap();
    assert!(
        refusal.contains("batch_size") && !refusal.contains("block_size") && !refusal.contains("n_layer"),
        "{refusal}"
    );
    let refusal = Plan::new(&config, &GPT2, budget(1.0), true).refusal().unwrap();
    assert!(refusal.contains("No one setting"), "{refusal}");
}

#[test]
fn an_unknown_budget_refuses_only_what_no_buffer_holds() {
    let config = configured(&GPT2, 12, 40, 0.0);
    let unknown = Budget { bytes: None, ..budget(0.0) };
    assert_eq!(Plan::new(&config, &GPT2, unknown.clone(), false).refusal(), None);
    let small = Budget { largest_buffer: 128 << 20, ..unknown };
    let refusal = Plan::new(&config, &GPT2, small, false).refusal().unwrap();
    assert!(refusal.contains("a buffer of 147.4 MiB (a weight)") && refusal.contains("128.0 MiB"), "{refusal}");
}

#[test]
fn less_is_kept_by_each_way_of_computing_again_and_by_half_the_element() {
    let all = shape(GPT2, 8, false);
    let total = |shape: Shape| estimate(&shape).total();
    // Of GPT-2's vocabulary what is alive with the logits is the most, however the blocks are kept.
    let few_tokens = shape(GptConfig { vocab_size: 512, ..GPT2 }, 8, false);
    let by_keep = [Recompute::None, Recompute::AttentionMlp, Recompute::Block]
        .map(|recompute| total(Shape { recompute, ..few_tokens }));
    assert!(by_keep[0] > by_keep[1] && by_keep[1] > by_keep[2], "{by_keep:?}");
    let f32 = estimate(&Shape { engine: Engine::Kernels(Variant::Scalar), ..all });
    let (mixed, f16) = (estimate(&all), estimate(&Shape { f16: true, ..all }));
    assert_eq!(f32.parameters, f16.parameters);
    // and the weights of products in f16
    assert!(f16.activations < f32.activations * 56 / 100 && f16.activations > f32.activations * 50 / 100, "{f16:?}");
    // Of 16 (B, T, C) a block nine are halves, which only products read; and those weights.
    assert!(
        mixed.activations < f32.activations * 78 / 100 && mixed.activations > f32.activations * 72 / 100,
        "{mixed:?}"
    );
    // Activations at the peak: 16 (B, T, C) a block kept whole (x, two normed, qkv, out, h, gelu(h), the middle), 2 or 1 beyond the one at work.
    let unit = (8 * 1024 * 768 * 4) as f64;
    for (recompute, units) in [(Recompute::AttentionMlp, 2.0 * 12.0), (Recompute::Block, 12.0)] {
        let kept = estimate(&Shape { recompute, ..all }).activations as f64 / unit;
        assert!(kept >= units && kept <= units + 18.0, "{recompute:?}: {kept} (B, T, C)");
    }
}

/// One device a test: each begins with an empty pool.
fn fresh_gpu() -> Option<Chosen> {
    let name = std::env::var("GPT_WGPU_DEVICE").unwrap_or_else(|_| "vulkan".into());
    let spec: DeviceSpec = name.parse().unwrap();
    common::gpu()?; // says why there is none, or fails where there has to be one
    Some(device::choose(spec).unwrap())
}

/// A device's pool.
#[derive(Clone, Copy, Debug)]
struct Usage {
    reserved: u64,
    allocations: u64,
}

/// The device's pool after each of `steps` steps; where they are replayed, recorded anew every 20 steps.
fn after_steps(chosen: &Chosen, gpt: &GptConfig, config: &Config, f16: bool, steps: usize) -> Vec<Usage> {
    let device = chosen.device.clone().autodiff();
    let (batch_size, time) = (config.data.batch_size, gpt.block_size);
    let tokens: Vec<i32> = (0..batch_size * time).map(|i| (i * 7 % gpt.vocab_size) as i32).collect();
    let batch = |_| Ok(Batch { x: tokens.clone(), y: tokens.clone() });
    let step = Step { config, device: &device, batch: &batch };
    let mut model = Gpt::init(gpt, 1, &device);
    model.f16 = f16;
    let (mut optimizer, mut position) = (Optimizer::new(f16, &chosen.device), 0);
    // What is done ahead of a run where kernels are compiled ahead
    step.kernels(&model, &optimizer, position).unwrap();
    let (mut replay, mut usage) = (Replay::new(&step, config.train.replay), Vec::new());
    for i in 0..steps {
        if i % 20 == 19 {
            replay.forget();
        }
        model = replay.advance(model, &mut optimizer, &mut position, 1e-3).unwrap();
        device::wait(&chosen.device).unwrap();
        let now = chosen.device.memory_pool_usage().unwrap();
        usage.push(Usage { reserved: now.bytes_reserved, allocations: now.number_allocs });
    }
    usage
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
        ("many activations", GptConfig { n_layer: 4, ..small }, 32, 1, 0.0),
        ("dropout, biases", GptConfig { bias: true, ..small }, 16, 1, 0.2),
        ("accumulation", small, 12, 2, 0.0),
        ("a large vocabulary", GptConfig { n_layer: 1, vocab_size: 20_000, ..small }, 1, 1, 0.0),
        ("a wide layer", GptConfig { n_layer: 2, n_head: 4, n_embd: 256, ..small }, 4, 2, 0.1),
        ("a long context", GptConfig { n_layer: 2, block_size: 256, ..small }, 8, 1, 0.0),
        ("f16", small, 16, 1, 0.1),
        ("f16, a large vocabulary", GptConfig { n_layer: 1, vocab_size: 20_000, ..small }, 1, 1, 0.0),
        ("attention_mlp", GptConfig { n_layer: 4, ..small }, 16, 1, 0.0),
        ("f16, block", GptConfig { n_layer: 4, ..small }, 16, 2, 0.1),
    ];
    for (name, gpt, batch_size, accumulation, dropout) in cases {
        let mut config = configured(&gpt, batch_size, accumulation, dropout);
        if name.contains("attention_mlp") {
            config.train.recompute = Recompute::AttentionMlp;
        } else if name.contains("block") {
            config.train.recompute = Recompute::Block;
        }
        let f16 = name.contains("f16");
        let mut peak = |replay| -> Option<u64> {
            let chosen = fresh_gpu()?;
            config.train.replay = replay;
            let plan = Plan::new(&config, &gpt, Budget::of(&chosen, f16), false);
            // From the second step on the moments are there; the third is recorded and replayed.
            let measured = after_steps(&chosen, &gpt, &config, f16, if replay { 3 } else { 2 });
            let peak = measured.iter().map(|usage| usage.reserved).max()?;
            eprintln!("{:?}", measured.iter().map(|usage| usage.reserved).collect::<Vec<_>>());
            let how = if replay { "replayed" } else { "made anew" };
            // Between steps: nobody sees the pool within one, where it may have been more for a while.
            assert_near(&format!("{name}, {how}"), plan.estimate.settled, peak);
            assert!(plan.estimate.total() >= plan.estimate.settled, "{name}");
            Some(peak)
        };
        let Some(replayed) = peak(true) else {
            return;
        };
        // Made anew, what steps keep is the same again: three cases are enough on a software rasteriser.
        if !["many activations", "dropout, biases", "accumulation"].contains(&name) {
            continue;
        }
        let Some(anew) = peak(false) else {
            return;
        };
        // A page more or less: before a recording CubeCL empties the pages of outgrown sizes.
        assert!(replayed as f64 <= 1.05 * anew as f64, "{name}: {replayed} bytes with replays, {anew} without");
    }
}

/// What a step takes it gives back, and so does a recording. CubeCL keeps the parameters of the last 512 different launches, which
/// fill up first.
#[test]
fn memory_is_flat_over_two_thousand_steps() {
    let _one = ONE.lock();
    for replay in [false, true] {
        let Some(chosen) = fresh_gpu() else {
            return;
        };
        let gpt = GptConfig { n_layer: 1, n_head: 1, n_embd: 16, block_size: 8, vocab_size: 33, ..CHAR };
        let mut config = configured(&gpt, 2, 1, 0.1);
        config.train.replay = replay;
        let usage = after_steps(&chosen, &gpt, &config, false, 2000);
        let (early, late) = (usage[100], usage[1999]);
        let grows = |early: u64, late: u64| late as f64 >= 1.01 * early as f64;
        assert!(!grows(early.reserved, late.reserved), "reserved: {early:?} after 100 steps, {late:?} after 2000");
        // A page has room for many small tensors that nobody gives back.
        assert!(
            !grows(early.allocations, late.allocations),
            "allocations: {early:?} after 100 steps, {late:?} after 2000"
        );
    }
}
