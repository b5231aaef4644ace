//! The bench report: one measurement of training speed as a file that another person can lay beside theirs.
//!
//! The JSON is described key by key in docs/bench-schema.md. `gpt-wgpu bench` and the scripts of the peers write it,
//! `gpt-wgpu compare` reads it. Keys that this version does not know are ignored, so that a later program can add some
//! without a new version; a key that changes its meaning needs one.

mod file;
mod merge;

use serde::{Deserialize, Serialize};

pub use file::{ReportError, median, utc_now};
pub(crate) use file::{decode, json_error};

/// What the key `schema` of every report says.
pub const SCHEMA: &str = "gpt-wgpu-bench";
/// The version of the schema that this program writes, and the only one that it reads.
pub const VERSION: u32 = 1;

/// One measurement. A `None` is `null` in the JSON and means "not measured".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`VERSION`].
    pub version: u32,
    /// What was measured.
    pub program: Program,
    /// Its version.
    pub program_version: String,
    /// Commit of its source.
    pub commit: Option<String>,
    /// The computer.
    pub machine: Machine,
    /// What computed.
    pub device: Device,
    /// When, as ISO 8601 in UTC: `2026-11-21T11:59:30Z`.
    pub date: String,
    /// Element type that the matrix products take.
    pub dtype: Dtype,
    /// The products in words, where `dtype` does not say enough: `f16 inputs, f32 sums, f32 weights`.
    pub products: Option<String>,
    /// Which kernels ran, where the program has several.
    pub kernels: Option<String>,
    /// What the backward computed again instead of keeping it: `attention_mlp`, `block`; `None` where it kept everything.
    pub recompute: Option<String>,
    /// Whether a graph compiler (torch.compile, mx.compile) ran; `None` where there is no such choice.
    pub compiled: Option<bool>,
    /// The model and the batch.
    pub config: BenchConfig,
    /// What the tokens were: `tokens of shakespeare_char`, or `random tokens`, which change the losses and not the times.
    pub data: Option<String>,
    /// Iterations before the first sample.
    pub warmup: usize,
    /// Every timed iteration in the order of measurement, ms: forward, backward, clip, AdamW.
    pub samples_ms: Vec<f64>,
    /// [`median`] of `samples_ms`.
    pub median_ms: f64,
    /// Smallest of `samples_ms`.
    pub min_ms: f64,
    /// Largest of `samples_ms`.
    pub max_ms: f64,
    /// [`BenchConfig::tokens_per_iter`] by the median.
    pub tokens_per_s: f64,
    /// Model FLOPs utilisation of the matrix peak that was measured on this device.
    pub mfu_measured: Option<Mfu>,
    /// The same of the vendor's published peak.
    pub mfu_published: Option<Mfu>,
    /// From the program's start to the end of its first iteration, compilation included, s.
    pub time_to_first_step_s: Option<f64>,
    /// Most memory that the device's allocator held during the timed iterations, bytes.
    pub peak_memory_bytes: Option<u64>,
    /// Energy of the timed iterations.
    pub energy: Option<Energy>,
    /// Why `energy` is null.
    pub energy_reason: Option<String>,
    /// Where the time of one iteration goes.
    pub ops: Option<Vec<Op>>,
    /// What took the time of the samples.
    pub timer: Timer,
    /// Losses of the timed iterations, nats.
    pub losses: Option<Vec<f64>>,
}

/// Declares an enum whose variants are words in the JSON.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal $(| $alias:literal)*,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word $(, alias = $alias)*)] $variant,)+
        }

        impl $name {
            /// The word in the JSON.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }
    };
}

words! {
    /// The programs that write reports.
    Program {
        /// This one.
        GptWgpu = "gpt-wgpu",
        /// scripts/bench_pytorch.py.
        Pytorch = "pytorch",
        /// scripts/bench_mlx.py.
        Mlx = "mlx",
    }
}

words! {
    /// What a program reaches its device through.
    Backend {
        /// wgpu on Apple's Metal.
        Metal = "metal",
        /// wgpu on Vulkan, MoltenVK included.
        Vulkan = "vulkan",
        /// wgpu on Direct3D 12.
        Dx12 = "dx12",
        /// wgpu on OpenGL.
        Gl = "gl",
        /// The processor, whatever the program.
        Cpu = "cpu",
        /// PyTorch on CUDA.
        Cuda = "cuda",
        /// PyTorch on Metal.
        Mps = "mps",
        /// MLX on Metal.
        Mlx = "mlx",
    }
}

words! {
    /// Element type that the matrix products take.
    Dtype {
        /// f32 throughout.
        Fp32 = "fp32" | "f32",
        /// f32 cut to TF32 by NVIDIA's tensor cores.
        Tf32 = "tf32",
        /// IEEE half precision.
        Fp16 = "fp16" | "f16",
        /// bfloat16.
        Bf16 = "bf16",
    }
}

words! {
    /// What took the time of the samples.
    Timer {
        /// The device's own clock: without what the host adds.
        Timestamps = "timestamp queries",
        /// The host's clock around an iteration, the device waited for.
        Host = "host clock",
    }
}

/// The computer. It has no host name: a report is made to be published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Operating system and its version.
    pub os: String,
    /// `x86_64`, `aarch64`, ...
    pub arch: String,
    /// The processor's name.
    pub cpu: String,
    /// CPU threads that the program used.
    pub threads: usize,
}

/// What computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// What the program reached it through.
    pub backend: Backend,
    /// The adapter's name, or the processor's.
    pub name: String,
    /// Driver and version.
    pub driver: Option<String>,
    /// Memory of the device, bytes.
    pub memory_bytes: Option<u64>,
}

/// The model and the batch, in nanoGPT's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchConfig {
    /// Blocks.
    pub n_layer: usize,
    /// Attention heads in a block.
    pub n_head: usize,
    /// Channels.
    pub n_embd: usize,
    /// Tokens in a sequence.
    pub block_size: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Chance that an element is dropped.
    pub dropout: f64,
    /// Biases in linear layers and layer norms.
    pub bias: bool,
    /// `erf`, or `tanh` for the approximation.
    #[serde(default = "erf")]
    pub gelu: String,
    /// Sequences in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in an iteration.
    #[serde(default = "one")]
    pub gradient_accumulation_steps: usize,
}

fn erf() -> String {
    "erf".into()
}

fn one() -> usize {
    1
}

impl BenchConfig {
    /// Tokens in one iteration.
    pub fn tokens_per_iter(&self) -> usize {
        self.gradient_accumulation_steps * self.batch_size * self.block_size
    }

    /// Every key with its value as text, in the schema's order.
    pub fn entries(&self) -> [(&'static str, String); 10] {
        [
            ("n_layer", self.n_layer.to_string()),
            ("n_head", self.n_head.to_string()),
            ("n_embd", self.n_embd.to_string()),
            ("block_size", self.block_size.to_string()),
            ("vocab_size", self.vocab_size.to_string()),
            ("dropout", self.dropout.to_string()),
            ("bias", self.bias.to_string()),
            ("gelu", self.gelu.clone()),
            ("batch_size", self.batch_size.to_string()),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps.to_string()),
        ]
    }
}

/// Model FLOPs utilisation against one peak.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mfu {
    /// Of the peak, 0 to 1.
    pub fraction: f64,
    /// The peak, FLOP/s.
    pub peak_flops: f64,
    /// How the peak was measured, or where it was published.
    pub how: String,
}

/// Energy of the timed iterations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// What measured it: `nvml`, `rapl package`, `macmon`.
    pub source: String,
    /// Mean power, W.
    pub watts: f64,
    /// Energy of one iteration, J.
    pub joules_per_iter: f64,
    /// Tokens trained on for one joule.
    pub tokens_per_joule: f64,
}

/// One operation's share of an iteration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Op {
    /// Its name.
    pub name: String,
    /// Launches in one iteration.
    pub count: usize,
    /// Time of them all, ms.
    pub ms: f64,
    /// Of the iteration, 0 to 100.
    pub percent: f64,
    /// Arithmetic speed, FLOP/s.
    pub flops_per_s: Option<f64>,
    /// Memory traffic, bytes/s.
    pub bytes_per_s: Option<f64>,
}
