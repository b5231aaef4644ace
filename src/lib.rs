//! gpt-wgpu: a portable GPT trainer. Burn models on WGSL kernels that naga lowers to Metal, Vulkan and DX12, and the same
//! model on the CPU. The modules in reading order:

#![warn(missing_docs)]

/// One measurement of training speed.
pub mod bench;
/// Checkpoints.
pub mod checkpoint;
/// The command line: one file a command.
pub mod cli;
/// Reports and runs side by side.
pub mod compare;
/// Every setting of a run.
pub mod config;
/// The built-in corpus.
pub mod corpus;
/// The CPU's kernels.
mod cpu;
/// Token files to batches.
pub mod data;
/// Which device computes, and why.
pub mod device;
/// Whether a device can be trusted to train.
pub mod doctor;
/// Devices that fail in the middle of a run.
pub mod failure;
/// One WGSL kernel and its launch.
pub mod kernel;
/// How much device memory a run needs.
pub mod memory;
/// Terminal lines and metrics.jsonl.
pub mod metrics;
/// The GPT.
pub mod model;
/// The model's operations.
pub mod ops;
/// AdamW, clip and schedule.
pub mod optim;
/// Walks over the model's parameters by name.
pub mod parameters;
/// The type of activations, and why.
pub mod precision;
/// Text files and downloads to token files.
pub mod prepare;
/// One step taken apart by kernel.
pub mod profile;
/// The gradients of one micro-step, with activations kept or computed again.
pub mod recompute;
/// Training steps that are recorded once and replayed.
pub mod replay;
/// One measurement as a versioned JSON report.
pub mod report;
/// Random numbers as a function of where they are used.
pub mod rng;
/// Text from a model.
pub mod sample;
/// A program's start taken apart.
pub mod startup;
/// One training step: what training and bench repeat.
pub mod step;
/// What the program prints.
mod terminal;
/// Text to tokens and back.
pub mod tokenizer;
/// The training loop.
pub mod train;
/// The operations once more, as plain f64 loops.
pub mod twins;
/// A step's kernels, compiled before it.
pub mod warmup;
/// Ends a run whose device hangs.
pub mod watchdog;
