//! Checkpoints: `out_dir/checkpoints/{last,best}/`, each with
//!
//! - `model.safetensors` and `config.json`: GPT-2's tensor names and layout, so that Hugging Face's GPT2LMHeadModel reads a
//!   model with biases as it is (its Conv1D layers store matrices as (in, out), transposed from ours),
//! - `optimizer.safetensors`: `m.NAME` and `v.NAME` in the model's own layout, and `memory`, what is remembered from step to
//!   step (`ops::verdict::state`): the loss scale, the updates made, the last losses and norms,
//! - `state.json`: step, data position, best loss, the resolved configuration,
//! - `meta.json`: the dataset's tokenizer, where it has one.
//!
//! All randomness is a function of the seed and a position, so these numbers are the whole random state.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::failure;
use crate::model::{Gpt, GptConfig};
use crate::ops::linear::Gelu;
use crate::ops::verdict;
use crate::optim::{Moments, Optimizer};
use crate::parameters;

/// The version of `state.json`'s schema.
pub const VERSION: u32 = 1;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const MEMORY: &str = "memory";
const STATE: &str = "state.json";
const HF_CONFIG: &str = "config.json";
/// The tokenizer's file, under the same name as in a dataset.
pub const META: &str = "meta.json";

/// Everything of a run that is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Schema version, [`VERSION`].
    pub version: u32,
    /// The next iteration.
    pub step: u64,
    /// Micro-batches drawn so far: the data position and the dropout generator's step.
    pub position: u64,
    /// Updates made by the optimizer, in checkpoints that have no `memory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer_step: Option<u64>,
    /// Lowest validation loss so far, in nats.
    pub best_val_loss: Option<f64>,
    /// The model's shape.
    pub model: GptConfig,
    /// The resolved configuration of the run.
    pub config: Config,
}

/// A checkpoint that has been read.
pub struct Checkpoint {
    /// Where it lies.
    pub dir: PathBuf,
    /// Its numbers.
    pub state: State,
}

/// The folder of checkpoint `name` (`last` or `best`) of a run.
pub fn path(out_dir: &Path, name: &str) -> PathBuf {
    out_dir.join("checkpoints").join(name)
}

/// Writes a checkpoint so that a kill at any moment leaves the old or the new one whole: a temporary folder, fsync, rename.
///
/// # Errors
/// When a file cannot be written (a full disk, no permission); the previous checkpoint is untouched.
pub fn save(dir: &Path, state: &State, model: &Gpt, optimizer: &Optimizer, tokenizer: Option<&Path>) -> Result<()> {
    let parent = dir.parent().ok_or_else(|| anyhow!("{}: no parent folder", dir.display()))?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let temporary = parent.join(format!(".{name}.tmp"));
    let old = parent.join(format!(".{name}.old"));
    recover(dir)?;
    discard(&temporary)?;
    fs::create_dir(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
    let written = write_files(&temporary, state, model, optimizer, tokenizer);
    if let Err(error) = written {
        discard(&temporary)?;
        let kept = if dir.exists() {
            format!("; the previous checkpoint in {} is untouched", dir.display())
        } else {
            String::new()
        };
        return Err(error.context(format!("the checkpoint of step {} was not saved{kept}", state.step)));
    }
    discard(&old)?;
    if dir.exists() {
        fs::rename(dir, &old).with_context(|| format!("cannot move {}", dir.display()))?;
    }
    fs::rename(&temporary, dir).with_context(|| format!("cannot create {}", dir.display()))?;
    sync_folder(parent)?;
    discard(&old)
}

/// Brings back the previous checkpoint where a kill fell between the two renames of [`save`].
fn recover(dir: &Path) -> Result<()> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let old = dir.with_file_name(format!(".{name}.old"));
    if !dir.exists() && old.exists() {
        fs::rename(&old, dir).with_context(|| format!("cannot restore {}", dir.display()))?;
    }
    Ok(())
}

fn discard(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Renames reach the disk with the folder that holds them. Windows has no such call and needs none.
fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir)
            .and_then(|folder| folder.sync_all())
            .with_context(|| format!("cannot sync {}", dir.display()))?;
    }
    Ok(())
}

fn write_files(dir: &Path, state: &State, model: &Gpt, optimizer: &Optimizer, tokenizer: Option<&Path>) -> Result<()> {
    let metadata = Some([("format".to_string(), "pt".to_string())].into());
    let mut collected = Collect::default();
    parameters::visit(model, &mut collected);
    let tensors = collected.finish()?;
    let stored = tensors.iter().map(|t| (t.name.clone(), t.as_stored())).collect();
    write_tensors(&dir.join(MODEL), stored, metadata.clone())?;

    let mut moments = BTreeMap::new();
    for tensor in &tensors {
        if let Some(Moments { m, v }) = optimizer.moments.get(&tensor.name) {
            for (prefix, values) in [("m", m), ("v", v)] {
                let values = read(values.clone())?;
                let stored = (tensor.shape.clone(), values);
                moments.insert(format!("{prefix}.{}", tensor.name), stored);
            }
        }
    }
    let memory = read(optimizer.memory.clone())?;
    moments.insert(MEMORY.into(), (vec![memory.len()], memory));
    write_tensors(&dir.join(OPTIMIZER), moments, metadata)?;
    write_file(&dir.join(STATE), &serde_json::to_vec_pretty(state)?)?;
    write_file(&dir.join(HF_CONFIG), &serde_json::to_vec_pretty(&hf_config(&state.model))?)?;
    if let Some(tokenizer) = tokenizer.filter(|path| path.exists()) {
        let text = fs::read(tokenizer).with_context(|| format!("cannot read {}", tokenizer.display()))?;
        write_file(&dir.join(META), &text)?;
    }
    sync_folder(dir)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {} ({} bytes)", path.display(), bytes.len()))
}

/// Shape and values by name.
type Stored = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn write_tensors(
    path: &Path,
    tensors: Stored,
    metadata: Option<std::collections::HashMap<String, String>>,
) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, (shape, values))| {
            let bytes = bytemuck::cast_slice(values); // little-endian, as every platform of wgpu
            Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    write_file(path, &safetensors::serialize(views, metadata)?)
}

/// Hugging Face's names for a GPT-2.
fn hf_config(model: &GptConfig) -> serde_json::Value {
    serde_json::json!({
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "vocab_size": model.vocab_size,
        "activation_function": match model.gelu { Gelu::Erf => "gelu", Gelu::Tanh => "gelu_new" },
        "layer_norm_epsilon": crate::ops::layer_norm::EPSILON,
        "tie_word_embeddings": true,
    })
}

/// A parameter on the host, in the model's own layout.
struct HostTensor {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl HostTensor {
    /// Shape and values as the file has them.
    fn as_stored(&self) -> (Vec<usize>, Vec<f32>) {
        if !stored_transposed(&self.name) {
            return (self.shape.clone(), self.values.clone());
        }
        let (rows, columns) = (self.shape[0], self.shape[1]);
        (vec![columns, rows], transpose(&self.values, rows, columns))
    }
}

/// GPT-2's linear layers are Conv1D: their files hold (in, out).
fn stored_transposed(name: &str) -> bool {
    ["c_attn.weight", "c_proj.weight", "c_fc.weight"].iter().any(|end| name.ends_with(end))
}

/// (rows, columns) -> (columns, rows).
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut transposed = Vec::with_capacity(values.len());
    for column in 0..columns {
        transposed.extend((0..rows).map(|row| values[row * columns + column]));
    }
    transposed
}

/// A tensor's values on the host; waits for the device.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let device = tensor.device();
    let data = failure::checked(&device, tensor.try_into_data())?;
    // The bytes may be fetched only now: what fails here is the device too.
    Ok(failure::checked(&device, data.try_into_vec::<f32>())?)
}

#[derive(Default)]
struct Collect {
    tensors: Vec<HostTensor>,
    error: Option<anyhow::Error>,
}

impl Collect {
    fn finish(self) -> Result<Vec<HostTensor>> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.tensors),
        }
    }
}

impl parameters::Visit for Collect {
    fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        match read(tensor.clone().inner()) {
            Ok(values) => {
                self.tensors.push(HostTensor { name: name.to_string(), shape: tensor.dims().to_vec(), values })
            }
            Err(error) => self.error = Some(error.context(format!("reading {name}"))),
        }
    }
}

/// Opens a checkpoint and checks that its parts are there.
///
/// # Errors
/// When there is none, or its state.json is damaged or from another version.
pub fn open(dir: &Path) -> Result<Checkpoint> {
    recover(dir)?;
    ensure!(dir.is_dir(), "there is no checkpoint in {}; train first, or name the out_dir of a run", dir.display());
    let path = dir.join(STATE);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}; is this a gpt-wgpu checkpoint?", path.display()))?;
    let state: State = serde_json::from_str(&text)
        .with_context(|| format!("{} is damaged or not a gpt-wgpu checkpoint's", path.display()))?;
    ensure!(
        state.version == VERSION,
        "{} has version {}, this program reads version {VERSION}",
        path.display(),
        state.version
    );
    Ok(Checkpoint { dir: dir.into(), state })
}

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
/// When the file is damaged, or a tensor is missing or of another shape than `config` says.
pub fn load_model(path: &Path, config: &GptConfig, device: &Device) -> Result<Gpt> {
    with_tensors(path, |file| {
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
    Ok(GptConfig {
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
    })
}

fn with_tensors<T>(path: &Path, use_file: impl FnOnce(&SafeTensors) -> Result<T>) -> Result<T> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    // SAFETY: the map lives for this call; a file that another program truncates meanwhile is out of scope.
    let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot read {}", path.display()))?;
    let tensors = SafeTensors::deserialize(&map)
        .map_err(|e| anyhow!("{} is damaged or not a safetensors file: {e}", path.display()))?;
    use_file(&tensors)
}

/// Values of one f32 tensor, checked against the shape that the model wants.
fn tensor_of(file: &SafeTensors, path: &Path, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let view = file
        .tensor(name)
        .or_else(|_| file.tensor(&format!("transformer.{name}"))) // as GPT2LMHeadModel saves it
        .map_err(|_| anyhow!("{}: tensor {name} is missing", path.display()))?;
    if view.shape() != shape {
        bail!("{}: tensor {name} has shape {:?}, the model needs {shape:?}", path.display(), view.shape());
    }
    ensure!(view.dtype() == Dtype::F32, "{}: tensor {name} is {:?}; only F32 is read", path.display(), view.dtype());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_weights_are_stored_transposed() {
        let tensor = HostTensor {
            name: "h.0.attn.c_attn.weight".into(),
            shape: vec![2, 3],
            values: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        };
        let (shape, values) = tensor.as_stored();
        assert_eq!((shape, values), (vec![3, 2], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
    }
}
