//! Activations computed again: the same numbers to the bit, in less memory. And what accumulation adds to it.

mod common;

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::Result;
use burn::tensor::{Device, Tensor};
use common::*;
use gpt_wgpu::checkpoint::read;
use gpt_wgpu::config::Config;
use gpt_wgpu::data::Batch;
use gpt_wgpu::model::Gpt;
use gpt_wgpu::optim::Optimizer;
use gpt_wgpu::parameters::{self, Visit};
use gpt_wgpu::recompute::Recompute;
use gpt_wgpu::report::BenchReport;
use gpt_wgpu::train::{self, Step};

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

/// Losses, gradient norms and parameters of three steps with accumulation, dropout and biases.
fn three_steps(device: &Device, recompute: Recompute) -> Bits {
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
    let device = device.clone().autodiff();
    let (batch_size, time) = (config.data.batch_size, config.model.block_size);
    let batch = |position: u64| -> Result<_> {
        let mut random = Random(position + 1);
        let mut draw = || (0..batch_size * time).map(|_| random.below(VOCABULARY) as i32).collect();
        Ok(train::upload(&Batch { x: draw(), y: draw() }, batch_size, &device))
    };
    let step = Step { config: &config, batch: &batch };
    let mut model = Gpt::init(&config.gpt(VOCABULARY), 7, &device);
    let (mut optimizer, mut position, mut bits) = (Optimizer::default(), 0, Bits::default());
    for i in 0..3 {
        let (updated, stepped) = step.run(model, &mut optimizer, &mut position, 1e-3).unwrap();
        model = updated;
        bits.insert(&format!("loss {i}"), stepped.loss.unwrap());
        bits.insert(&format!("norm {i}"), stepped.norm.unwrap());
    }
    assert_eq!(position, 6);
    parameters::visit(&model, &mut bits);
    bits
}

#[test]
fn what_is_computed_again_is_the_same_to_the_bit() {
    for (device_name, device) in devices() {
        let want = three_steps(&device, Recompute::None);
        assert_eq!(want.0.len(), 6 + 2 + 3 * 12 + 2, "losses, norms, embeddings, blocks, last norm");
        assert_ne!(want.0["loss 0"], want.0["loss 2"]);
        for recompute in [Recompute::AttentionMlp, Recompute::Block] {
            let got = three_steps(&device, recompute);
            let differ: Vec<_> = want.0.iter().filter(|(name, bits)| got.0.get(*name) != Some(bits)).collect();
            let names: Vec<_> = differ.into_iter().map(|(name, _)| name).collect();
            assert!(names.is_empty() && got.0.len() == want.0.len(), "{device_name} {recompute:?}: {names:?}");
        }
    }
}

/// Layers and micro-batch of the memory tests: the activations are much larger than the weights.
const DEEP: &[&str] = &[
    "--n-layer=8",
    "--n-head=2",
    "--n-embd=64",
    "--block-size=128",
    "--batch-size=8",
    "--dropout=0",
    "--dataset=builtin",
    "--iters=2",
    "--warmup=1",
    "--no-peak",
    "--json=report.json",
];

/// Most bytes that the adapter's allocator held in a process that trains the deep model.
fn peak(adapter: &str, recompute: &str, accumulation: usize) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        format!("--device={adapter}"),
        format!("--recompute={recompute}"),
        format!("--gradient-accumulation-steps={accumulation}"),
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpt-wgpu"));
    let output = command.arg("bench").args(DEEP).args(flags).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = BenchReport::read(&dir.path().join("report.json")).unwrap();
    assert_eq!(report.recompute.as_deref().unwrap_or("none"), recompute);
    let bytes = report.peak_memory_bytes.unwrap();
    eprintln!("{recompute}, {accumulation} micro-steps: {:.1} MiB", bytes as f64 / f64::from(1 << 20));
    bytes
}

/// One tensor (B, T, C) of the deep model.
const ACTIVATION: u64 = 8 * 128 * 64 * 4;

#[test]
fn computing_again_takes_less_memory() {
    let Some(adapter) = adapter() else { return };
    let none = peak(&adapter, "none", 1);
    for recompute in ["attention_mlp", "block"] {
        let less = peak(&adapter, recompute, 1);
        assert!(less < none / 2, "{recompute}: {less} bytes, {none} with everything kept");
    }
}

#[test]
fn accumulation_keeps_one_set_of_gradients_and_no_activations() {
    let Some(adapter) = adapter() else { return };
    let (one, three) = (peak(&adapter, "none", 1), peak(&adapter, "none", 3));
    let parameters = 4 * Config::parse("", "").unwrap().gpt(0).parameters() as u64;
    let _ = (one, three, parameters, ACTIVATION);
}
