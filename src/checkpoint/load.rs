//! Reading weights and moments.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{Checkpoint, HF_CONFIG, MEMORY, MODEL, OPTIMIZER, stored_transposed, transpose};
use crate::config::check_model;
use crate::model::{Gpt, GptConfig};
use crate::ops::linear::Gelu;
use crate::ops::verdict;
use crate::optim::{Moments, Optimizer};
use crate::parameters;

impl Checkpoint {
    /// The model with its weights, on `device`.
    pub fn model(&self, device: &Device) -> Result<Gpt> {
        load_model(&self.dir.join(MODEL), &self.state.model, device)
    }

    /// The optimizer with its moments, for steps of `micro_batches` with activations in f16 (or f32), on `device`
    /// (without autodiff).
    pub fn optimizer(&self, model: &Gpt, micro_batches: usize, f16: bool, device: &Device) -> Result<Optimizer> {
        let path = self.dir.join(OPTIMIZER);
        with_tensors(&path, |file| {
            let memory = match file.tensor(MEMORY) {
                Ok(_) => tensor_of(file, &path, MEMORY, &[verdict::state::SIZE])?,
                Err(_) => verdict::first_state(1.0, self.state.optimizer_step.unwrap_or(0)),
            };
            // Without an update so far there are no moments either.
            let has_moments = file.names().iter().any(|name| name.starts_with("m."));
            let optimizer = Optimizer::with_memory(memory, micro_batches, f16, device);
            let mut load = LoadMoments { file, path: &path, device, optimizer, has_moments, error: None };
            parameters::visit(model, &mut load);
            match load.error {
                Some(error) => Err(error),
                None => Ok(load.optimizer),
            }
        })
    }
}

/// A model whose weights come from a safetensors file with GPT-2's names, on `device`.
///
/// # Errors
/// When the file is damaged, or a tensor is missing, of another shape than `config` says, or has no place in such a model.
pub fn load_model(path: &Path, config: &GptConfig, device: &Device) -> Result<Gpt> {
    with_tensors(path, |file| {
        check_tensors(file, path, config)?;
        let mut load = LoadModel { file, path, device, error: None };
        let model = parameters::map(Gpt::init(config, 0, device), &mut load);
        match load.error {
            Some(error) => Err(error),
            None => Ok(model),
        }
    })
}

/// The shape of a GPT-2 in Hugging Face's folder format (`config.json` beside `model.safetensors`).
pub fn hf_model_config(dir: &Path) -> Result<GptConfig> {
    let path = dir.join(HF_CONFIG);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    let number = |key: &str| {
        json[key]
            .as_u64()
            .map(|n| n as usize)
            .ok_or_else(|| anyhow!("{}: {key} is missing; is this a GPT-2?", path.display()))
    };
    let gpt = GptConfig {
        n_layer: number("n_layer")?,
        n_head: number("n_head")?,
        n_embd: number("n_embd")?,
        block_size: number("n_positions")?,
        vocab_size: number("vocab_size")?,
        bias: true,
        gelu: match json["activation_function"].as_str() {
            Some("gelu") => Gelu::Erf,
            _ => Gelu::Tanh, // GPT-2's own, gelu_new
        },
    };
    check_model(&gpt).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    Ok(gpt)
}

fn with_tensors<T>(path: &Path, use_file: impl FnOnce(&SafeTensors) -> Result<T>) -> Result<T> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    // SAFETY: the map lives for this call; a file that another program truncates meanwhile is out of scope.
    let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot read {}", path.display()))?;
    let tensors = SafeTensors::deserialize(&map)
        .map_err(|e| anyhow!("{} is damaged or not a safetensors file: {e}", path.display()))?;
    use_file(&tensors)
}

/// Refuses a file whose weights are not those of such a model, before memory is asked for: fewer would be made up, more left out.
fn check_tensors(file: &SafeTensors, path: &Path, config: &GptConfig) -> Result<()> {
    let mut own = HashSet::new();
    for (name, mut shape) in parameters::shapes(config) {
        if stored_transposed(&name) {
            shape.reverse();
        }
        view_of(file, path, &name, &shape)?;
        own.insert(name);
    }
    for stored in file.names() {
        let name = stored.strip_prefix(HF_PREFIX).unwrap_or(stored);
        // Masks that some versions of Hugging Face's GPT-2 save
        let is_mask = [".attn.bias", ".attn.masked_bias"].iter().any(|end| name.ends_with(end));
        let is_weight = ["wte.", "wpe.", "h.", "ln_f."].iter().any(|start| name.starts_with(start)) && !is_mask;
        ensure!(
            !is_weight || own.contains(name),
            "{}: tensor {stored} has no place in a model with n_layer = {} and bias = {}",
            path.display(),
            config.n_layer,
            config.bias
        );
    }
    Ok(())
}

/// What GPT2LMHeadModel puts in front of GPT-2's names.
const HF_PREFIX: &str = "transformer.";

/// One f32 tensor, checked against the shape that the model wants.
fn view_of<'a>(file: &SafeTensors<'a>, path: &Path, name: &str, shape: &[usize]) -> Result<TensorView<'a>> {
    let view = file
        .tensor(name)
        .or_else(|_| file.tensor(&format!("{HF_PREFIX}{name}")))
        .map_err(|_| anyhow!("{}: tensor {name} is missing", path.display()))?;
    if view.shape() != shape {
        bail!("{}: tensor {name} has shape {:?}, the model needs {shape:?}", path.display(), view.shape());
    }
    ensure!(view.dtype() == Dtype::F32, "{}: tensor {name} is {:?}; only F32 is read", path.display(), view.dtype());
    Ok(view)
}

/// The values of [`view_of`].
fn tensor_of(file: &SafeTensors, path: &Path, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let view = view_of(file, path, name, shape)?;
    Ok(view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect())
}

struct LoadModel<'a> {
    file: &'a SafeTensors<'a>,
    path: &'a Path,
    device: &'a Device,
    error: Option<anyhow::Error>,
}

impl parameters::Map for LoadModel<'_> {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) -> Tensor<D> {
        let shape = tensor.dims();
        let transposed = stored_transposed(name);
        let mut stored = shape.to_vec();
        if transposed {
            stored.reverse();
        }
        match tensor_of(self.file, self.path, name, &stored) {
            Ok(values) => {
                let values = if transposed { transpose(&values, stored[0], stored[1]) } else { values };
                let loaded = Tensor::from_data(TensorData::new(values, shape), self.device);
                if tensor.is_require_grad() { loaded.require_grad() } else { loaded }
            }
            Err(error) => {
                self.error.get_or_insert(error);
                tensor
            }
        }
    }
}

struct LoadMoments<'a> {
    file: &'a SafeTensors<'a>,
    path: &'a Path,
    device: &'a Device,
    optimizer: Optimizer,
    has_moments: bool,
    error: Option<anyhow::Error>,
}

impl parameters::Visit for LoadMoments<'_> {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        if !self.has_moments {
            return;
        }
        let moment = |prefix: &str| -> Result<Tensor<1>> {
            let name = format!("{prefix}.{name}");
            let values = tensor_of(self.file, self.path, &name, &tensor.dims())?;
            let count = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [count]), self.device))
        };
        match (moment("m"), moment("v")) {
            (Ok(m), Ok(v)) => {
                self.optimizer.moments.insert(name.to_string(), Moments { m, v });
            }
            (Err(error), _) | (_, Err(error)) => {
                self.error.get_or_insert(error);
            }
        }
    }
}
