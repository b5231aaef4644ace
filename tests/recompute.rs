//! Activations computed again: the same numbers to the bit, in less memory. And what accumulation adds to it.

mod common;

use std::collections::{BTreeMap, HashSet};

use burn::tensor::{Device, Tensor};
use common::guarded::primitive;
use common::*;
use gpt_wgpu::checkpoint::read;
use gpt_wgpu::config::Config;
use gpt_wgpu::data::Batch;
use gpt_wgpu::kernel::{self, Kernel};
use gpt_wgpu::model::{Gpt, Scale};
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::optim::{GradientSum, Optimizer};
use gpt_wgpu::parameters::{self, Visit};
use gpt_wgpu::recompute::{self, Recompute};
use gpt_wgpu::report::BenchReport;
use gpt_wgpu::step::{self, Step};

const VOCABULARY: usize = 37;

/// Bits of a tensor's elements, by name.
#[derive(Debug, Default)]
struct Bits(BTreeMap<String, Vec<u32>>);

impl Bits {
    fn insert<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) {
        self.0.insert(name.into(), read(tensor).unwrap().into_iter().map(f32::to_bits).collect());
    }
}

impl Visit for Bits {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        self.insert(name, tensor.clone().inner());
    }
}

/// A small model with everything in it: dropout, biases, accumulation.
fn config(recompute: Recompute) -> Config {
    let mut config = Config::default();
    config.model.n_layer = 3;
    config.model.n_head = 2;
    config.model.n_embd = 32;
    config.model.block_size = 19;
    config.model.dropout = 0.1;
    config.model.bias = true;
    config.data.batch_size = 3;
    config.data.gradient_accumulation_steps = 2;
    config.train.recompute = recompute;
    config
}

/// Random tokens and targets.
fn batch(config: &Config, position: u64) -> Batch {
    let (mut random, count) = (Random(position + 1), config.data.batch_size * config.model.block_size);
    let mut draw = || (0..count).map(|_| random.below(VOCABULARY) as i32).collect();
    Batch { x: draw(), y: draw() }
}

/// Losses, what the verdicts remember (gradient norms among it) and parameters of three steps.
fn three_steps(inner: &Device, f16: bool, recompute: Recompute) -> Bits {
    let (config, device) = (config(recompute), inner.clone().autodiff());
    let batch = |position| Ok(batch(&config, position));
    let step = Step { config: &config, device: &device, batch: &batch };
    let mut model = Gpt::init(&config.gpt(VOCABULARY), 7, &device);
    model.f16 = f16;
    let (mut optimizer, mut position, mut bits) = (Optimizer::new(f16, inner), 0, Bits::default());
    for i in 0..3 {
        let (updated, loss_sum) = step.run(model, &mut optimizer, &mut position, 1e-3).unwrap();
        model = updated;
        bits.insert(&format!("loss {i}"), loss_sum);
        bits.insert(&format!("memory {i}"), optimizer.memory.clone());
    }
    assert_eq!((position, optimizer.last_step().unwrap().updates), (6, 3));
    parameters::visit(&model, &mut bits);
    bits
}

/// What is compiled ahead is what a step launches, no kernel less; and to find out computes nothing.
#[test]
fn the_kernels_of_a_step_are_known_before_it() {
    let (in_f32, in_f16) = (gpu().map(|device| (device, false)), gpu_with_f16().map(|device| (device, true)));
    for (inner, f16) in in_f32.into_iter().chain(in_f16) {
        for recompute in [Recompute::None, Recompute::AttentionMlp, Recompute::Block] {
            let (config, device) = (config(recompute), inner.clone().autodiff());
            let batch = |position| Ok(batch(&config, position));
            let step = Step { config: &config, device: &device, batch: &batch };
            let mut model = Gpt::init(&config.gpt(VOCABULARY), 1, &device);
            model.f16 = f16;
            let mut optimizer = Optimizer::new(f16, &inner);
            let bits = |model: &Gpt| {
                let mut bits = Bits::default();
                parameters::visit(model, &mut bits);
                bits.0
            };
            let before = bits(&model);
            let known = step.kernels(&model, &optimizer, 0).unwrap();
            let known: HashSet<String> = known.iter().map(Kernel::text).collect();
            assert!(before == bits(&model), "a parameter changed");
            let (stepped, launched) = kernel::noted(|| step.run(model, &mut optimizer, &mut 0, 1e-3));
            stepped.unwrap();
            let missing = launched.iter().filter(|kernel| !known.contains(&kernel.text()));
            let missing: Vec<_> = missing.map(Kernel::name).collect();
            assert!(launched.len() > 50 && missing.is_empty(), "{recompute:?}, f16 {f16}: {missing:?}");
        }
    }
}

#[test]
fn what_is_computed_again_is_the_same_to_the_bit() {
    let in_f16 = gpu_with_f16().map(|device| ("gpu in f16", device, true));
    let in_f32 = devices().into_iter().map(|(name, device)| (name, device, false));
    for (device_name, device, f16) in in_f32.chain(in_f16) {
        let want = three_steps(&device, f16, Recompute::None);
        assert_eq!(want.0.len(), 6 + 2 + 3 * 12 + 2, "losses, memories, embeddings, blocks, last norm");
        assert_ne!(want.0["loss 0"], want.0["loss 2"]);
        for recompute in [Recompute::AttentionMlp, Recompute::Block] {
            let got = three_steps(&device, f16, recompute);
            let differ: Vec<_> = want.0.iter().filter(|(name, bits)| got.0.get(*name) != Some(bits)).collect();
            let names: Vec<_> = differ.into_iter().map(|(name, _)| name).collect();
            assert!(names.is_empty() && got.0.len() == want.0.len(), "{device_name} {recompute:?}: {names:?}");
        }
    }
}

/// The names of a model's parameters.
#[derive(Default)]
struct Names(Vec<String>);

impl Visit for Names {
    fn parameter<const D: usize>(&mut self, name: &str, _: &Tensor<D>) {
        self.0.push(name.into());
    }
}

#[test]
fn gradients_are_summed_in_place() {
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let (inner, device) = (device.clone(), device.autodiff());
    for recompute in [Recompute::None, Recompute::AttentionMlp, Recompute::Block] {
        let config = config(recompute);
        let model = Gpt::init(&config.gpt(VOCABULARY), 7, &device);
        let mut names = Names::default();
        parameters::visit(&model, &mut names);
        let mut sum = GradientSum::default();
        let mut places = |position| -> Vec<_> {
            let (tokens, targets) = step::upload(&batch(&config, position), config.data.batch_size, &device);
            let dropout = Dropout { probability: 0.1, seed: 1, step: position as u32, site: 0 };
            let scale = Scale(Optimizer::new(false, &inner).memory);
            recompute::gradients(&model, tokens, targets, dropout, scale, recompute, &mut sum).unwrap();
            let place = |name: &String| primitive(sum.get(name).unwrap().clone()).handle.binding().memory.id();
            names.0.iter().map(place).collect()
        };
        let first = places(0);
        assert_eq!(places(1), first, "{recompute:?}");
    }
}

/// A model of the memory tests: its activations are much larger than its weights.
const DEEP: &[&str] = &[
    "--n-layer=8",
    "--n-head=2",
    "--n-embd=64",
    "--block-size=64",
    "--batch-size=8",
    "--dropout=0",
    "--dataset=builtin",
    "--iters=1",
    "--warmup=1",
    "--no-peak",
    "--json=report.json",
];

/// Most bytes that the adapter's allocator held in a process of its own that trained the deep model.
fn peak(adapter: &str, recompute: &str, accumulation: usize) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let mut command = common::program::gpt_wgpu();
    command.arg("bench").args(DEEP).arg(format!("--device={adapter}")).arg(format!("--recompute={recompute}"));
    command.arg(format!("--gradient-accumulation-steps={accumulation}")).current_dir(dir.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = BenchReport::read(&dir.path().join("report.json")).unwrap();
    assert_eq!(report.recompute.as_deref().unwrap_or("none"), recompute);
    report.peak_memory_bytes.unwrap()
}

#[test]
fn computing_again_takes_less_memory() {
    let Some(adapter) = adapter() else { return };
    let all = peak(&adapter, "none", 1);
    for recompute in ["attention_mlp", "block"] {
        let less = peak(&adapter, recompute, 1);
        eprintln!("{recompute}: {less} bytes, {all} with everything kept");
        assert!(less < all / 3 * 2, "{recompute}: {less} bytes, {all} with everything kept");
    }
}

/// A second set of activations would nearly double the peak; the sum of the gradients is a fifteenth of it.
#[test]
fn accumulation_keeps_no_activations() {
    let Some(adapter) = adapter() else { return };
    let (one, three) = (peak(&adapter, "none", 1), peak(&adapter, "none", 3));
    eprintln!("{three} bytes with three micro-steps, {one} with one");
    assert!(three < one + one / 4, "{three} bytes with three micro-steps, {one} with one");
}
