//! Writing a checkpoint, so that a kill at any moment leaves a whole one.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::Tensor;
use safetensors::{Dtype, tensor::TensorView};

use super::{
    HF_CONFIG, MEMORY, META, MODEL, OPTIMIZER, STATE, State, old, path, read, recover, stored_transposed, transpose,
};
use crate::model::{Gpt, GptConfig};
use crate::ops::linear::Gelu;
use crate::optim::{Moments, Optimizer};
use crate::parameters;

/// Makes the folder of a run's checkpoints, and sees that one could be written there: not when hours of work are to be saved.
///
/// # Errors
/// When it cannot: what stands in the way.
pub fn make_room(out_dir: &Path) -> Result<()> {
    for name in ["last", "best"] {
        let dir = path(out_dir, name);
        for place in [&dir, &old(&dir)] {
            ensure!(
                place.is_dir() || !place.exists(),
                "{} is a file, where checkpoints go; move it away",
                place.display()
            );
        }
    }
    let trial = path(out_dir, ".trial.tmp");
    fs::create_dir_all(&trial)
        .with_context(|| format!("out_dir {}: no checkpoint could be saved in checkpoints/", out_dir.display()))?;
    discard(&trial)
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
    let old = old(dir);
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

fn discard(dir: &Path) -> Result<()> {
    let removed = if dir.is_file() { fs::remove_file(dir) } else { fs::remove_dir_all(dir) };
    match removed {
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

fn write_tensors(path: &Path, tensors: Stored, metadata: Option<HashMap<String, String>>) -> Result<()> {
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
