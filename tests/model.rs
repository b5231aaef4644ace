//! The whole model against PyTorch: logits, loss, every gradient and ten AdamW steps of the goldens that
//! scripts/make_golden.py wrote, on every device present.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Gradients, Tensor};
use common::*;
use gpt_wgpu::checkpoint::load_model;
use gpt_wgpu::config::OptimConfig;
use gpt_wgpu::model::{Gpt, GptConfig};
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::ops::linear::Gelu;
use gpt_wgpu::optim::{GradientSum, Optimizer, learning_rate};
use gpt_wgpu::parameters;
use safetensors::{Dtype, SafeTensors};

/// One golden file: its tensors as f64 and its hyperparameters.
struct Golden {
    values: BTreeMap<String, Vec<f64>>,
    shapes: BTreeMap<String, Vec<usize>>,
    meta: std::collections::HashMap<String, String>,
}

impl Golden {
    fn path(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    fn load(name: &str) -> Self {
        let bytes = std::fs::read(Self::path(name)).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (mut values, mut shapes) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in file.tensors() {
            let words = view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            let read = match view.dtype() {
                Dtype::F32 => words.map(|b| f64::from(f32::from_le_bytes(b))).collect(),
                Dtype::I32 => words.map(|b| f64::from(i32::from_le_bytes(b))).collect(),
                other => panic!("{name} is {other:?}"),
            };
            shapes.insert(name.clone(), view.shape().to_vec());
            values.insert(name, read);
        }
        Self { values, shapes, meta: header.metadata().clone().unwrap() }
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> T {
        self.meta[key].parse().unwrap_or_else(|_| panic!("{key}"))
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        self.values[name].iter().map(|&v| v as i32).collect()
    }

    fn config(&self) -> GptConfig {
        GptConfig {
            n_layer: self.number("n_layer"),
            n_head: self.number("n_head"),
            n_embd: self.number("n_embd"),
            block_size: self.number("block_size"),
            vocab_size: self.number("vocab_size"),
            bias: self.number("bias"),
            gelu: if self.meta["gelu"] == "tanh" { Gelu::Tanh } else { Gelu::Erf },
        }
    }

    /// The golden's weights as a checkpoint's model.safetensors, read by the trainer's own loader.
    fn model(&self, device: &Device) -> Gpt {
        let from = self.meta.get("params_from").map(|name| Self::load(name));
        let source = from.as_ref().unwrap_or(self);
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = source
            .values
            .iter()
            .filter_map(|(name, values)| {
                let short = name.strip_prefix("param.")?;
                let bytes = values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
                Some((short.to_string(), source.shapes[name].clone(), bytes))
            })
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            (name, safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        load_model(&path, &self.config(), device).unwrap()
    }
}

/// Gradients or values by name, in the file's layout (linear weights as (in, out)).
struct Collect<'a> {
    gradients: Option<&'a Gradients>,
    found: BTreeMap<String, Vec<f64>>,
}

impl parameters::Visit for Collect<'_> {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        let tensor = match self.gradients {
            Some(gradients) => tensor.grad(gradients).unwrap_or_else(|| panic!("{name} has no gradient")),
            None => tensor.clone().inner(),
        };
        let linear = ["c_attn.weight", "c_proj.weight", "c_fc.weight"].iter().any(|end| name.ends_with(end));
        let tensor = if linear { tensor.swap_dims(0, 1) } else { tensor };
        self.found.insert(name.to_string(), values(tensor));
    }
}

fn collect(model: &Gpt, gradients: Option<&Gradients>) -> BTreeMap<String, Vec<f64>> {
    let mut collect = Collect { gradients, found: BTreeMap::new() };
    parameters::visit(model, &mut collect);
    collect.found
}

const GOLDENS: [&str; 3] = ["gpt_bias.safetensors", "gpt_nobias.safetensors", "gpt_tanh.safetensors"];

#[test]
fn logits_loss_and_every_gradient_match_pytorch() {
    for name in GOLDENS {
        let golden = Golden::load(name);
        let shape = &golden.shapes["tokens"];
        let dims = [shape[0], shape[1]];
        for (device_name, device) in devices() {
            let device = device.autodiff();
            let model = golden.model(&device);
            let tokens = int_tensor(&golden.ints("tokens"), dims, &device);
            let targets = int_tensor(&golden.ints("targets"), dims, &device);
            let what = |part: &str| format!("{name} on {device_name}: {part}");
            let logits = model.logits(tokens.clone()).inner();
            assert_close_tensor(&what("logits"), logits, &golden.values["logits"], 1e-5);
            let loss = model.loss(tokens, targets, Dropout::OFF);
            assert_close_tensor(&what("loss"), loss.clone().inner(), &golden.values["loss"], 1e-5);
            let gradients = loss.backward();
            let found = collect(&model, Some(&gradients));
            let wanted = golden.values.keys().filter(|key| key.starts_with("grad.")).count();
            assert_eq!(found.len(), wanted, "{}", what("number of gradients"));
            for (parameter, gradient) in found {
                assert_close(&what(&parameter), &gradient, &golden.values[&format!("grad.{parameter}")], 1e-5);
            }
        }
    }
}

#[test]
fn the_wrong_gelu_fails_the_golden() {
    let golden = Golden::load("gpt_bias.safetensors");
    let shape = &golden.shapes["tokens"];
    let device = Device::flex();
    let mut model = golden.model(&device);
    model.config.gelu = Gelu::Tanh;
    let logits = model.logits(int_tensor(&golden.ints("tokens"), [shape[0], shape[1]], &device));
    assert!(difference(&values(logits), &golden.values["logits"], 1e-5).is_some());
}

#[test]
fn ten_adamw_steps_match_pytorch() {
    for name in ["gpt_bias.safetensors", "gpt_nobias.safetensors"] {
        let golden = Golden::load(name);
        let shape = &golden.shapes["steps.tokens"];
        let (steps, dims) = (shape[0], [shape[1], shape[2]]);
        let config = OptimConfig {
            learning_rate: golden.number("learning_rate"),
            decay_lr: true,
            warmup_iters: golden.number("warmup_iters"),
            lr_decay_iters: golden.number("lr_decay_iters"),
            min_lr: golden.number("min_lr"),
            weight_decay: golden.number("weight_decay"),
            beta1: golden.number("beta1"),
            beta2: golden.number("beta2"),
            grad_clip: golden.number("grad_clip"),
            skip_spike_sigma: 0.0,
        };
        for (device_name, inner) in devices() {
            let device = inner.clone().autodiff();
            let mut model = golden.model(&device);
            let before = collect(&model, None);
            let mut optimizer = Optimizer::new(false, &inner);
            let what = |part: &str| format!("{name} on {device_name}: {part}");
            let count = dims[0] * dims[1];
            let batch = |name: &str, step: usize| {
                int_tensor(&golden.ints(name)[step * count..(step + 1) * count], dims, &device)
            };
            for step in 0..steps {
                let lr = learning_rate(&config, step as u64);
                assert_close(&what("lr"), &[lr], &golden.values["steps.lr"][step..=step], 1e-6);
                let loss = model.loss(batch("steps.tokens", step), batch("steps.targets", step), Dropout::OFF);
                let mut gradients = GradientSum::default();
                gradients.add(&model, &mut loss.backward());
                let wanted = &golden.values["steps.loss"][step..=step];
                let loss = loss.inner();
                assert_close_tensor(&what(&format!("loss {step}")), loss.clone(), wanted, 1e-4);
                model = optimizer.step(model, gradients, (loss, 1), &config, lr);
                let wanted = &golden.values["steps.grad_norm"][step..=step];
                let last = optimizer.last_step().unwrap();
                assert_close(&what(&format!("norm {step}")), &[last.grad_norm], wanted, 1e-4);
                assert!(last.applied && last.updates == step as u64 + 1, "{}", what("update left out"));
            }
            let after = collect(&model, None);
            for (parameter, value) in &after {
                if let Some(wanted) = golden.values.get(&format!("steps.param.{parameter}")) {
                    assert_close(&what(parameter), value, wanted, 1e-4);
                }
                assert_ne!(value, &before[parameter], "{}", what(&format!("{parameter} did not move")));
            }
        }
    }
}

#[test]
fn a_gradient_norm_below_the_clip_is_left_alone() {
    let device = Device::flex().autodiff();
    let golden = Golden::load("gpt_nobias.safetensors");
    let shape = &golden.shapes["tokens"];
    let step = |grad_clip: f64| {
        let model = golden.model(&device);
        let tokens = int_tensor(&golden.ints("tokens"), [shape[0], shape[1]], &device);
        let mut gradients = GradientSum::default();
        let loss = model.loss(tokens.clone(), tokens, Dropout::OFF);
        gradients.add(&model, &mut loss.backward());
        let config = OptimConfig { grad_clip, ..OptimConfig::default() };
        let mut optimizer = Optimizer::new(false, &Device::flex());
        let model = optimizer.step(model, gradients, (loss.inner(), 1), &config, 1e-2);
        (collect(&model, None), optimizer.last_step().unwrap().grad_norm)
    };
    let (free, norm) = step(0.0);
    let (loose, _) = step(norm * 2.0);
    assert_eq!(free, loose, "a clip above the norm must change nothing");
}

#[test]
fn a_seed_is_a_model_and_the_initial_loss_is_that_of_guessing() {
    let config =
        GptConfig { n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, vocab_size: 65, bias: false, gelu: Gelu::Erf };
    let device = Device::flex();
    let model = |seed| collect(&Gpt::init(&config, seed, &device), None);
    assert_eq!(model(1), model(1));
    assert_ne!(model(1), model(2));
    let counted: usize = model(1).values().map(Vec::len).sum();
    assert_eq!(counted, config.parameters() + config.block_size * config.n_embd, "parameters() leaves out wpe");
    let mut random = Random(5);
    let mut draw = || {
        let tokens: Vec<i32> = (0..4 * 16).map(|_| random.below(65) as i32).collect();
        int_tensor(&tokens, [4, 16], &device)
    };
    let loss = values(Gpt::init(&config, 1, &device).loss(draw(), draw(), Dropout::OFF))[0];
    assert!((loss - 65f64.ln()).abs() < 0.1, "{loss}");
}
