//! What the forward takes, and what of it is kept; the head with the loss, whose gradients are made on the way.

use super::{Buffer, F32, Half, Kept, PACKED, PACKED_FROM, Replayer, Use};
use crate::cpu;
use crate::memory::{Engine, Shape};
use crate::ops::cross_entropy::{chunk_rows, logits_stride};
use crate::ops::linear::product::splits;
use crate::ops::linear::tiles;
use crate::recompute::Recompute;

impl Replayer<'_> {
    pub(super) fn block(&mut self, x: Buffer) -> (Buffer, Kept) {
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
    pub(super) fn forget(&mut self, half: Half) -> Buffer {
        self.give(half.normed);
        self.give_all(half.stats.into_iter().chain(half.inside));
        half.x
    }

    pub(super) fn attention(&mut self, x: Buffer) -> (Buffer, Half) {
        let normed = self.rounded("x", 1);
        let stats = self.stats();
        let qkv = self.rounded("qkv", 3);
        if self.is_composed() {
            self.scores(4);
        }
        let out = self.activation("x", 1);
        let lse = self.take(Use::Activations, "the attention's row sums", self.row_values());
        self.blocks_of_scores(1);
        let y = self.activation("x", 1);
        (y, Half { x, stats, normed, inside: vec![qkv, out, lse] })
    }

    pub(super) fn mlp(&mut self, x: Buffer) -> (Buffer, Half) {
        let normed = self.rounded("x", 1);
        let stats = self.stats();
        let inside = vec![self.activation("the MLP's hidden layer", 4), self.rounded("the MLP's hidden layer", 4)];
        let y = self.activation("x", 1);
        (y, Half { x, stats, normed, inside })
    }

    /// `count` matrices (B, H, T, T) at once, which only composed attention makes.
    pub(super) fn scores(&mut self, count: usize) {
        let bytes = self.row_values().saturating_mul(self.shape.gpt.block_size as u64);
        let matrices: Vec<Buffer> =
            (0..count).map(|_| self.take(Use::Workspace, "attention's scores, T by T", bytes)).collect();
        self.give_all(matrices);
    }

    /// dx and dw of the loss.
    pub(super) fn head(&mut self) -> (Buffer, Buffer) {
        let (vocab, c) = (self.vocab(), self.channels());
        let weight = self.shape.f16.then(|| self.take(Use::Workspace, "the head's weight in f16", 2 * vocab * c));
        let dx = self.activation("x", 1);
        let dw = self.take(Use::Gradients, "the embedding's gradient", vocab * c * F32);
        self.loss(true);
        self.give_all(weight);
        (dx, dw)
    }

    /// The logits of all rows, a chunk at a time, and, if wanted, their gradients' products.
    pub(super) fn loss(&mut self, gradients: bool) {
        let (rows, vocab, c) = (self.rows(), self.vocab(), self.channels());
        let rounded = self.is_mixed().then(|| {
            [("the head's input in f16", rows), ("the head's weight in f16", vocab)]
                .map(|(name, rows)| self.take(Use::Workspace, name, 2 * rows * c))
        });
        let losses = self.take(Use::Workspace, "the losses", rows * F32);
        let (chunk, stride) = self.chunk();
        let logits = self.take(Use::Workspace, "the logits of a chunk", chunk * stride * self.element());
        for start in (0..rows).step_by(chunk as usize) {
            let here = chunk.min(rows - start);
            if self.is_composed() {
                let steps = [(); 3].map(|()| self.take(Use::Workspace, "the logits of a chunk", here * stride * F32));
                self.give_all(steps);
            }
            if gradients {
                let f16 = self.multiplies_f16();
                self.parts([here, c, vocab], f16, false);
                self.parts([vocab, c, here], f16, start > 0);
                self.pack(vocab, c, here);
            }
        }
        self.give_all(rounded.into_iter().flatten().chain([logits, losses]));
    }

    /// Rows whose logits exist together, and elements from row to row.
    fn chunk(&self) -> (u64, u64) {
        let (rows, vocab) = (self.rows() as usize, self.vocab() as usize);
        let Shape { f16, largest_buffer, .. } = *self.shape;
        let (chunk, stride) = match self.shape.engine {
            Engine::Loops(_) => (cpu::cross_entropy::chunk_rows(rows, vocab), vocab),
            _ => (chunk_rows(vocab, f16, self.is_composed(), largest_buffer), logits_stride(vocab)),
        };
        (chunk.min(rows) as u64, stride as u64)
    }

    /// The parts of a product (m, n) over k that is split, of two factors in f16 or not. A whole one is added where it is made, but by
    /// Burn's primitives.
    pub(super) fn parts(&mut self, [m, n, k]: [u64; 3], f16: bool, accumulate: bool) {
        let count = match self.shape.engine {
            Engine::Kernels(variant) => *self.splits.entry(([m, n, k], f16)).or_insert_with(|| {
                let sizes = [m, n, k].map(|size| size as usize);
                // The tile for few registers is as large, and split as often.
                let tile = tiles::choose(variant, false, f16, sizes[0], sizes[1], true);
                splits(variant, tile, sizes).0 as u64
            }),
            Engine::Composed => 1,
            Engine::Loops(_) => return,
        };
        if count > 1 || (accumulate && self.is_composed()) {
            self.touch("the parts of a split product", count * m * n * F32);
        }
    }

    /// What the CPU's product (m, n) over k rows packs of its first factor, whose columns are summed.
    pub(super) fn pack(&mut self, m: u64, n: u64, k: u64) {
        if self.loops().is_some() && n > PACKED_FROM {
            self.touch("what a product packs", k.min(PACKED) * m * F32);
        }
    }
}
