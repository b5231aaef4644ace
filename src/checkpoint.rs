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

mod load;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::config::{Config, check_model};
use crate::failure;
use crate::model::GptConfig;

pub use load::{hf_model_config, load_model};
pub use write::{make_room, save};

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

/// Whether there is a checkpoint in `dir`, or was before a kill fell into its replacement: then [`open`] brings it back.
pub fn exists(dir: &Path) -> bool {
    dir.exists() || old(dir).exists()
}

/// Where the previous checkpoint stands while the new one takes its place.
fn old(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}.old"))
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
    check_model(&state.model).map_err(|error| anyhow!("{} is damaged: {error}", path.display()))?;
    Ok(Checkpoint { dir: dir.into(), state })
}

/// Brings back the previous checkpoint where a kill fell between the two renames of [`save`].
fn recover(dir: &Path) -> Result<()> {
    let old = old(dir);
    if !dir.exists() && old.exists() {
        fs::rename(&old, dir).with_context(|| format!("cannot restore {}", dir.display()))?;
    }
    Ok(())
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
