//! The allocations of training steps in the order in which the model makes them, replayed over a model of the pool.
//!
//! This file, step/forward.rs and step/backward.rs follow model.rs, ops/, cpu/ and optim.rs: what an operation takes, what its node
//! keeps for the backward, what it gives back and when. tests/memory.rs holds the outcome against what a device reports, and
//! tests/memory_cpu.rs against the allocator, so that the two cannot drift apart unseen.

mod backward;
mod forward;

use std::collections::HashMap;

use super::pool::{Place, Pool};
use super::{Engine, Shape};
use crate::cpu::attention::BLOCK as QUERIES;
use crate::parameters;

/// What memory is for, in the order of a [`Breakdown`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Parameters,
    Gradients,
    Optimizer,
    Activations,
    Workspace,
}

/// Bytes by use, in the order of [`Use`].
pub(super) type Breakdown = [u64; 5];

/// Bytes of an f32.
const F32: u64 = 4;

/// Terms of a sum that the CPU's products pack at a time, and columns from which on they pack a factor that is turned. Processors
/// differ in both: these are such that no less is counted than is taken.
const PACKED: u64 = 512;
const PACKED_FROM: u64 = 48;

/// Steps that are replayed: the first makes the moments, from the third on nothing new happens.
const STEPS: usize = 3;

/// What a replay saw.
pub(super) struct Replay {
    /// Bytes alive by use, at the moment at which most were.
    pub peak: Breakdown,
    /// Most bytes that the pool took from the device.
    pub reserved: u64,
    /// What of them it has when a step ends.
    pub settled: u64,
    /// The largest tensor, and its name.
    pub largest: (u64, &'static str),
}

/// A tensor that is alive.
struct Buffer {
    /// In the pool, where there is one.
    place: Option<Place>,
    purpose: Use,
    bytes: u64,
}

/// What half a block keeps.
struct Half {
    /// Its input, which its norm keeps, with mean and rstd.
    x: Buffer,
    stats: [Buffer; 2],
    /// The norm's output, which the first linear layer keeps.
    normed: Buffer,
    /// Attention: qkv, out, lse. MLP: h, gelu(h).
    inside: Vec<Buffer>,
}

/// What a block keeps, by the shape's [`Recompute`](crate::recompute::Recompute).
enum Kept {
    /// All of both halves, attention's first.
    Everything(Box<[Half; 2]>),
    /// Their inputs.
    HalfInputs(Buffer, Buffer),
    /// The block's input.
    Input(Buffer),
}

pub(super) struct Replayer<'a> {
    shape: &'a Shape,
    pool: Pool,
    alive: Breakdown,
    seen: Replay,
    gradients: Vec<Buffer>,
    /// Into how many parts a product is split, by its sizes and by whether both factors are f16: blocks are alike, and the choice looks
    /// at many.
    splits: HashMap<([u64; 3], bool), u64>,
    /// Whether gradients of an earlier micro-batch are there to add to.
    sums: bool,
}

/// Replays a few steps of `shape`.
pub(super) fn replay(shape: &Shape) -> Replay {
    let mut replayer = Replayer::new(shape);
    replayer.run();
    replayer.seen
}

/// Replays the loss of one batch, of which nothing is kept.
pub(super) fn replay_evaluation(shape: &Shape) -> Replay {
    let mut replayer = Replayer::new(shape);
    replayer.evaluate();
    replayer.seen
}

impl<'a> Replayer<'a> {
    fn new(shape: &'a Shape) -> Self {
        Self {
            shape,
            pool: Pool::new(shape.largest_buffer),
            alive: Breakdown::default(),
            seen: Replay { peak: Breakdown::default(), reserved: 0, settled: 0, largest: (0, "") },
            gradients: Vec::new(),
            splits: HashMap::new(),
            sums: false,
        }
    }

    fn take(&mut self, purpose: Use, name: &'static str, bytes: u64) -> Buffer {
        let place = self.shape.pooled.then(|| self.pool.alloc(bytes));
        self.alive[purpose as usize] += bytes;
        let seen = &mut self.seen;
        if self.alive.iter().sum::<u64>() > seen.peak.iter().sum() {
            seen.peak = self.alive;
        }
        seen.reserved = seen.reserved.max(self.pool.reserved());
        if bytes > seen.largest.0 {
            seen.largest = (bytes, name);
        }
        Buffer { place, purpose, bytes }
    }

    fn give(&mut self, buffer: Buffer) {
        self.alive[buffer.purpose as usize] -= buffer.bytes;
        if let Some(place) = buffer.place {
            self.pool.free(place);
        }
    }

    fn give_all(&mut self, buffers: impl IntoIterator<Item = Buffer>) {
        buffers.into_iter().for_each(|buffer| self.give(buffer));
    }

    /// A tensor that is there only for a moment.
    fn touch(&mut self, name: &'static str, bytes: u64) {
        let buffer = self.take(Use::Workspace, name, bytes);
        self.give(buffer);
    }

    /// (B, T, `channels` C) in the activations' element.
    fn activation(&mut self, name: &'static str, channels: u64) -> Buffer {
        self.take(Use::Activations, name, channels * self.hidden())
    }

    /// The same of what only products read.
    fn rounded(&mut self, name: &'static str, channels: u64) -> Buffer {
        self.take(Use::Activations, name, channels * self.rounded_hidden())
    }

    /// The same as a gradient on its way back.
    fn cotangent(&mut self, name: &'static str, channels: u64) -> Buffer {
        self.take(Use::Workspace, name, channels * self.hidden())
    }

    /// The same of what only products read.
    fn rounded_cotangent(&mut self, name: &'static str, channels: u64) -> Buffer {
        self.take(Use::Workspace, name, channels * self.rounded_hidden())
    }

    /// Bytes of (B, T, C) where only products read it.
    fn rounded_hidden(&self) -> u64 {
        if self.is_mixed() { self.hidden() / 2 } else { self.hidden() }
    }

    /// Whether half a block of f32 stores what only products read as these round it, in f16.
    fn is_mixed(&self) -> bool {
        !self.shape.f16 && matches!(self.shape.engine, Engine::Kernels(variant) if variant.rounds_f32())
    }

    /// Whether the blocks' products multiply f16.
    fn multiplies_f16(&self) -> bool {
        self.shape.f16 || self.is_mixed()
    }

    /// Bytes of (B, T, C).
    fn hidden(&self) -> u64 {
        self.rows() * self.channels() * self.element()
    }

    /// Bytes of an activation's element.
    fn element(&self) -> u64 {
        if self.shape.f16 { 2 } else { F32 }
    }

    fn rows(&self) -> u64 {
        (self.shape.batch_size * self.shape.gpt.block_size) as u64
    }

    fn channels(&self) -> u64 {
        self.shape.gpt.n_embd as u64
    }

    fn vocab(&self) -> u64 {
        self.shape.gpt.vocab_size as u64
    }

    /// Bytes of (B, H, T).
    fn row_values(&self) -> u64 {
        self.rows() * self.shape.gpt.n_head as u64 * F32
    }

    fn is_composed(&self) -> bool {
        self.shape.engine == Engine::Composed
    }

    /// The threads of the CPU's loops, where they run.
    fn loops(&self) -> Option<u64> {
        match self.shape.engine {
            Engine::Loops(threads) => Some(threads as u64),
            _ => None,
        }
    }

    /// The scores of one block of queries, `count` times, that each of the loops' threads has at a time.
    fn blocks_of_scores(&mut self, count: u64) {
        if let Some(threads) = self.loops() {
            let (time, heads) = (self.shape.gpt.block_size as u64, self.shape.gpt.n_head as u64);
            let at_once = threads.min(self.shape.batch_size as u64 * heads);
            self.touch("the scores of a block of queries", at_once * count * time.min(QUERIES as u64) * time * F32);
        }
    }

    fn run(&mut self) {
        let sizes = self.parameters();
        let parameters: Vec<Buffer> = sizes.iter().map(|&size| self.take(Use::Parameters, "a weight", size)).collect();
        let mut moments = Vec::new();
        for _ in 0..STEPS {
            let rounded = self.rounded_weights();
            self.micro_step();
            if self.shape.accumulates {
                let sum = std::mem::take(&mut self.gradients);
                self.sums = true;
                self.micro_step();
                self.sums = false;
                let gradients = std::mem::replace(&mut self.gradients, sum);
                self.give_all(gradients); // added into the sum
            }
            self.give_all(rounded);
            if moments.is_empty() {
                let pairs = sizes.iter().flat_map(|&size| [size; 2]);
                moments = pairs.map(|size| self.take(Use::Optimizer, "a moment", size)).collect();
            }
            if self.is_composed() {
                for &size in &sizes {
                    let temporary = [(); 3].map(|()| self.take(Use::Workspace, "an update", size));
                    self.give_all(temporary);
                }
            }
            // Made from the last layer to the first, given back in the parameters' order.
            let gradients = std::mem::take(&mut self.gradients);
            self.give_all(gradients.into_iter().rev());
            self.seen.settled = self.pool.reserved();
        }
        self.give_all(parameters.into_iter().chain(moments));
    }

    fn evaluate(&mut self) {
        let sizes = self.parameters();
        let parameters: Vec<Buffer> = sizes.iter().map(|&size| self.take(Use::Parameters, "a weight", size)).collect();
        let rounded = self.rounded_weights();
        let tokens = [(); 2].map(|()| self.take(Use::Activations, "the tokens", self.rows() * F32));
        let mut x = self.activation("x", 1);
        for _ in 0..self.shape.gpt.n_layer {
            let (middle, attention) = self.attention(x);
            let (y, mlp) = {
                let x = self.forget(attention);
                self.give(x);
                self.mlp(middle)
            };
            let middle = self.forget(mlp);
            self.give(middle);
            x = y;
        }
        let normed = self.activation("x", 1);
        let stats = self.stats();
        self.loss(false);
        self.give_all(parameters.into_iter().chain(rounded).chain(tokens).chain(stats).chain([x, normed]));
    }

    /// Bytes of every parameter, in the model's order.
    fn parameters(&self) -> Vec<u64> {
        let elements = |shape: Vec<usize>| shape.into_iter().map(|size| size as u64).product::<u64>();
        parameters::shapes(&self.shape.gpt).into_iter().map(|(_, shape)| elements(shape) * F32).collect()
    }

    /// The weights of the blocks' products in f16, where these multiply f16.
    fn rounded_weights(&mut self) -> Vec<Buffer> {
        if !self.multiplies_f16() {
            return Vec::new();
        }
        let (c, blocks) = (self.channels(), self.shape.gpt.n_layer);
        let sizes = [3, 1, 4, 4].repeat(blocks).into_iter().map(|times| times * c * c);
        sizes.map(|elements| self.take(Use::Activations, "a weight in f16", 2 * elements)).collect()
    }

    /// Forward and backward of one micro-batch.
    fn micro_step(&mut self) {
        let tokens = [(); 2].map(|()| self.take(Use::Activations, "the tokens", self.rows() * F32));
        let mut x = self.activation("x", 1);
        let mut blocks = Vec::new();
        for _ in 0..self.shape.gpt.n_layer {
            let (y, kept) = self.block(x);
            blocks.push(kept);
            x = y;
        }
        let normed = self.activation("x", 1);
        let stats = self.stats();
        let (dx, dw) = self.head();
        self.give(normed); // the head made its gradients at once and keeps no input
        let mut dy = self.norm_backward(dx, x, stats);
        while let Some(kept) = blocks.pop() {
            dy = self.block_backward(dy, kept);
        }
        self.embedding_backward(dy, dw);
        self.give_all(tokens);
    }

    /// mean and rstd.
    fn stats(&mut self) -> [Buffer; 2] {
        [(); 2].map(|()| self.take(Use::Activations, "a norm's means", self.rows() * F32))
    }
}
