//! The allocations of training steps in the order in which the model makes them, replayed over a model of the pool.
//!
//! This file follows model.rs, ops/ and optim.rs: what an operation takes, what its node keeps for the backward, what it gives
//! back and when. tests/memory.rs holds the outcome against what a device reports, so that the two cannot drift apart unseen.

use super::Shape;
use super::pool::{Place, Pool};
use crate::ops::cross_entropy::{chunk_rows, logits_stride};
use crate::ops::layer_norm::BACKWARD_GROUPS;
use crate::ops::linear::BLOCK_ROWS;
use crate::ops::linear::product::splits;
use crate::ops::linear::tiles;
use crate::recompute::Recompute;

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

/// Steps that are replayed: the first makes the moments, from the third on nothing new happens.
const STEPS: usize = 3;

/// What a replay saw.
pub(super) struct Replay {
    /// Bytes alive by use, at the moment at which most were.
    pub peak: Breakdown,
    /// Most bytes that the pool took from the device.
    pub reserved: u64,
    /// The largest tensor, and its name.
    pub largest: (u64, &'static str),
}

/// A tensor that is alive.
struct Buffer {
    place: Place,
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

/// What a block keeps, by the shape's [`Recompute`].
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
    /// Whether gradients of an earlier micro-batch are there to add to.
    sums: bool,
}

/// Replays a few steps of `shape`.
pub(super) fn replay(shape: &Shape) -> Replay {
    let mut replayer = Replayer {
        shape,
        pool: Pool::new(shape.largest_buffer),
        alive: Breakdown::default(),
        seen: Replay { peak: Breakdown::default(), reserved: 0, largest: (0, "") },
        gradients: Vec::new(),
        sums: false,
    };
    replayer.run();
    replayer.seen
}

impl Replayer<'_> {
    fn take(&mut self, purpose: Use, name: &'static str, bytes: u64) -> Buffer {
        let place = self.pool.alloc(bytes);
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
        self.pool.free(buffer.place);
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

    /// The same as a gradient on its way back.
    fn cotangent(&mut self, name: &'static str, channels: u64) -> Buffer {
        self.take(Use::Workspace, name, channels * self.hidden())
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
        self.shape.variant.is_none()
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
        }
        self.give_all(parameters.into_iter().chain(moments));
    }

    /// Bytes of every parameter, in the model's order.
    fn parameters(&self) -> Vec<u64> {
        let (gpt, c) = (&self.shape.gpt, self.channels());
        let norm = |sizes: &mut Vec<u64>| {
            sizes.push(c);
            sizes.extend(gpt.bias.then_some(c));
        };
        let linear = |sizes: &mut Vec<u64>, outputs: u64, inputs: u64| {
            sizes.push(outputs * inputs);
            sizes.extend(gpt.bias.then_some(outputs));
        };
        let mut sizes = vec![self.vocab() * c, gpt.block_size as u64 * c];
        for _ in 0..gpt.n_layer {
            norm(&mut sizes);
            linear(&mut sizes, 3 * c, c);
            linear(&mut sizes, c, c);
            norm(&mut sizes);
            linear(&mut sizes, 4 * c, c);
            linear(&mut sizes, c, 4 * c);
        }
        norm(&mut sizes);
        sizes.iter().map(|elements| elements * F32).collect()
    }

    /// The weights of the blocks' products in f16, where activations are.
    fn rounded_weights(&mut self) -> Vec<Buffer> {
        if !self.shape.f16 {
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

    fn block(&mut self, x: Buffer) -> (Buffer, Kept) {
        let (middle, attention) = self.attention(x);
        let attention = match self.shape.recompute {
            Recompute::None => Ok(attention),
            Recompute::AttentionMlp | Recompute::Block => Err(self.forget(attention)),
        };
        let (y, mlp) = self.mlp(middle);
        let kept = match (attention, self.shape.recompute) {
            (Ok(attention), _) => Kept::Everything(Box::new([attention, mlp])),
            (Err(x), Recompute::Block) => {
                let middle = self.forget(mlp);
                self.give(middle);
                Kept::Input(x)
            }
            (Err(x), _) => Kept::HalfInputs(x, self.forget(mlp)),
        };
        (y, kept)
    }

    /// Leaves the input of half a block.
    fn forget(&mut self, half: Half) -> Buffer {
        self.give(half.normed);
        self.give_all(half.stats.into_iter().chain(half.inside));
        half.x
    }

    fn attention(&mut self, x: Buffer) -> (Buffer, Half) {
        let normed = self.activation("x", 1);
        let stats = self.stats();
        let qkv = self.activation("qkv", 3);
        if self.is_composed() {
            self.scores(4);
        }
        let out = self.activation("x", 1);
        let lse = self.take(Use::Activations, "the attention's row sums", self.row_values());
        let y = self.activation("x", 1);
        (y, Half { x, stats, normed, inside: vec![qkv, out, lse] })
    }

    fn mlp(&mut self, x: Buffer) -> (Buffer, Half) {
        let normed = self.activation("x", 1);
        let stats = self.stats();
        let inside = vec![self.activation("the MLP's hidden layer", 4), self.activation("the MLP's hidden layer", 4)];
        let y = self.activation("x", 1);
        (y, Half { x, stats, normed, inside })
    }

    /// `count` matrices (B, H, T, T) at once, which only composed attention makes.
    fn scores(&mut self, count: usize) {
        let bytes = self.row_values() * self.shape.gpt.block_size as u64;
        let matrices: Vec<Buffer> =
            (0..count).map(|_| self.take(Use::Workspace, "attention's scores, T by T", bytes)).collect();
        self.give_all(matrices);
    }

    /// dx and dw of the loss.
    fn head(&mut self) -> (Buffer, Buffer) {
        let (rows, vocab, c) = (self.rows(), self.vocab(), self.channels());
        let weight = self.shape.f16.then(|| self.take(Use::Workspace, "the head's weight in f16", 2 * vocab * c));
        let dx = self.activation("x", 1);
        let dw = self.take(Use::Gradients, "the embedding's gradient", vocab * c * F32);
        let losses = self.take(Use::Workspace, "the losses", rows * F32);
        let stride = logits_stride(vocab as usize, self.shape.f16) as u64;
        let chunk = (chunk_rows(vocab as usize, self.shape.f16, self.is_composed(), self.shape.largest_buffer) as u64)
            .min(rows);
        let logits = self.take(Use::Workspace, "the logits of a chunk", chunk * stride * self.element());
        for start in (0..rows).step_by(chunk as usize) {
            let here = chunk.min(rows - start);
            if self.is_composed() {
                let steps = [(); 3].map(|()| self.take(Use::Workspace, "the logits of a chunk", here * stride * F32));
                self.give_all(steps);
            }
            self.parts(here, c, vocab, false);
            self.parts(vocab, c, here, start > 0);
        }
        self.give_all([logits, losses]);
        self.give_all(weight);
        (dx, dw)
    }

    /// The parts of a product (m, n) over k that is split, or added to what is there.
    fn parts(&mut self, m: u64, n: u64, k: u64, accumulate: bool) {
        let count = match self.shape.variant {
            Some(variant) => {
                let [m, n, k] = [m, n, k].map(|size| size as usize);
                splits(variant, tiles::choose(variant, self.shape.f16, m, n, true), [m, n, k]).0 as u64
            }
            None => 1,
        };
        if count > 1 || accumulate {
            self.touch("the parts of a split product", count * m * n * F32);
        }
    }

    /// dw (and db) of a linear layer.
    fn weight_gradient(&mut self, outputs: u64, inputs: u64) {
        if self.shape.gpt.bias {
            let parts = self.rows().div_ceil(BLOCK_ROWS as u64) * outputs * F32;
            let parts = self.take(Use::Workspace, "the parts of a bias's gradient", parts);
            let db = self.take(Use::Gradients, "a bias's gradient", outputs * F32);
            self.give(parts);
            self.gradients.push(db);
        }
        let dw = self.take(Use::Gradients, "a weight's gradient", outputs * inputs * F32);
        self.gradients.push(dw);
        self.parts(outputs, inputs, self.rows(), false);
    }

    /// dy -> dx of a norm.
    fn norm_backward(&mut self, dy: Buffer, x: Buffer, stats: [Buffer; 2]) -> Buffer {
        let dx = self.cotangent("x", 1);
        let weights = [(); 2].map(|()| self.take(Use::Gradients, "a norm's gradient", self.channels() * F32));
        self.touch(
            "the parts of a norm's gradient",
            (BACKWARD_GROUPS as u64).min(self.rows()) * 2 * self.channels() * F32,
        );
        self.give_all(stats.into_iter().chain([dy, x]));
        let [dw, db] = weights;
        self.gradients.push(dw);
        if self.shape.gpt.bias {
            self.gradients.push(db);
        } else {
            self.give(db);
        }
        dx
    }

    fn block_backward(&mut self, dy: Buffer, kept: Kept) -> Buffer {
        match kept {
            Kept::Everything(halves) => {
                let [attention, mlp] = *halves;
                let dy = self.mlp_backward(dy, mlp);
                self.attention_backward(dy, attention)
            }
            Kept::HalfInputs(x, middle) => {
                let (y, mlp) = self.mlp(middle);
                self.give(y);
                let dy = self.mlp_backward(dy, mlp);
                self.add_segment();
                let (y, attention) = self.attention(x);
                self.give(y);
                let dx = self.attention_backward(dy, attention);
                self.add_segment();
                dx
            }
            Kept::Input(x) => {
                let (middle, attention) = self.attention(x);
                let (y, mlp) = self.mlp(middle);
                self.give(y);
                let dy = self.mlp_backward(dy, mlp);
                let dx = self.attention_backward(dy, attention);
                self.add_segment();
                dx
            }
        }
    }

    /// A segment that was computed again adds its gradients to those of earlier micro-batches at once.
    fn add_segment(&mut self) {
        if self.sums {
            let added = std::mem::take(&mut self.gradients);
            self.give_all(added);
        }
    }

    /// dx of a residual layer `inputs` C -> C whose input is `x`, or is kept longer by somebody else.
    fn residual_backward(&mut self, inputs: u64, x: Option<Buffer>) -> Buffer {
        let dropped = self.shape.dropout.then(|| self.cotangent("x", 1));
        self.weight_gradient(self.channels(), inputs * self.channels());
        self.give_all(x);
        let dx = self.cotangent("the MLP's hidden layer", inputs);
        self.give_all(dropped);
        dx
    }

    /// dnormed, then the norm, added to what came past the half.
    fn input_backward(&mut self, dy: Buffer, dh: Buffer, outputs: u64, half: (Buffer, [Buffer; 2], Buffer)) -> Buffer {
        let (x, stats, normed) = half;
        self.weight_gradient(outputs * self.channels(), self.channels());
        self.give(normed);
        let dnormed = self.cotangent("x", 1);
        self.give(dh);
        let dx = self.norm_backward(dnormed, x, stats);
        self.give(dy);
        dx
    }

    fn mlp_backward(&mut self, dy: Buffer, half: Half) -> Buffer {
        let mut inside = half.inside.into_iter();
        let h = inside.next();
        let dhidden = self.residual_backward(4, inside.next());
        if self.is_composed() {
            let steps = [(); 4].map(|()| self.cotangent("the MLP's hidden layer", 4));
            self.give_all(steps);
        }
        let dh = self.cotangent("the MLP's hidden layer", 4);
        self.give_all(h.into_iter().chain([dhidden]));
        self.input_backward(dy, dh, 4, (half.x, half.stats, half.normed))
    }

    fn attention_backward(&mut self, dy: Buffer, half: Half) -> Buffer {
        let dout = self.residual_backward(1, None); // attention keeps its output itself
        let delta = self.take(Use::Workspace, "the attention's row sums", self.row_values());
        if self.is_composed() {
            self.scores(6);
        }
        let dqkv = self.cotangent("qkv", 3);
        self.give_all(half.inside.into_iter().chain([dout, delta]));
        self.input_backward(dy, dqkv, 3, (half.x, half.stats, half.normed))
    }

    /// dwte, to which the head's is added, and dwpe.
    fn embedding_backward(&mut self, dy: Buffer, head: Buffer) {
        let (rows, c) = (self.rows(), self.channels());
        let dwte = self.take(Use::Gradients, "the embedding's gradient", self.vocab() * c * F32);
        let dwpe = self.take(Use::Gradients, "the positions' gradient", self.shape.gpt.block_size as u64 * c * F32);
        let sizes = [rows.next_multiple_of(1024), rows, self.vocab() + 1];
        let order = sizes.map(|elements| self.take(Use::Workspace, "the order of the tokens", elements * F32));
        self.give_all(order);
        self.give_all([dy, head]);
        self.gradients.extend([dwte, dwpe]);
    }
}
