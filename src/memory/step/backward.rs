//! What the backward takes, and when what was kept goes.

use super::{Buffer, Engine, F32, Half, Kept, Replayer, Use};
use crate::cpu;
use crate::ops::attention::launches::bytes_kept;
use crate::ops::layer_norm::BACKWARD_GROUPS;
use crate::ops::linear::{BLOCK_ROWS, tiles::has_slopes};

impl Replayer<'_> {
    /// dw (and db) of a linear layer whose input and whose output's gradient are both f16, or not.
    fn weight_gradient(&mut self, outputs: u64, inputs: u64, f16: bool) {
        if self.shape.gpt.bias {
            let block = if self.loops().is_some() { cpu::BLOCK_ROWS } else { BLOCK_ROWS };
            let parts = self.rows().div_ceil(block as u64) * outputs * F32;
            let parts = self.take(Use::Workspace, "the parts of a bias's gradient", parts);
            let db = self.take(Use::Gradients, "a bias's gradient", outputs * F32);
            self.give(parts);
            self.gradients.push(db);
        }
        let dw = self.take(Use::Gradients, "a weight's gradient", outputs * inputs * F32);
        self.gradients.push(dw);
        self.parts([outputs, inputs, self.rows()], f16, false);
        self.pack(outputs, inputs, self.rows());
    }

    /// dy -> dx of a norm.
    pub(super) fn norm_backward(&mut self, dy: Buffer, x: Buffer, stats: [Buffer; 2]) -> Buffer {
        let dx = self.cotangent("x", 1);
        let weights = [(); 2].map(|()| self.take(Use::Gradients, "a norm's gradient", self.channels() * F32));
        let parts = match self.loops() {
            Some(_) => self.rows().div_ceil(cpu::BLOCK_ROWS as u64),
            None => (BACKWARD_GROUPS as u64).min(self.rows()),
        };
        self.touch("the parts of a norm's gradient", parts * 2 * self.channels() * F32);
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

    pub(super) fn block_backward(&mut self, dy: Buffer, kept: Kept) -> Buffer {
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
        let is_copied = self.shape.dropout || self.is_mixed();
        let dropped = is_copied.then(|| self.rounded_cotangent("x", 1));
        // The heads, which somebody else keeps, are f32 where anything is.
        let f16 = self.shape.f16 || (self.is_mixed() && x.is_some());
        self.weight_gradient(self.channels(), inputs * self.channels(), f16);
        self.give_all(x);
        let dx = self.cotangent("the MLP's hidden layer", inputs);
        self.give_all(dropped);
        dx
    }

    /// dnormed, then the norm, added to what came past the half.
    fn input_backward(&mut self, dy: Buffer, dh: Buffer, outputs: u64, half: (Buffer, [Buffer; 2], Buffer)) -> Buffer {
        let (x, stats, normed) = half;
        self.weight_gradient(outputs * self.channels(), self.channels(), self.multiplies_f16());
        self.give(normed);
        let dnormed = self.cotangent("x", 1);
        self.give(dh);
        let dx = self.norm_backward(dnormed, x, stats);
        self.give(dy);
        dx
    }

    /// Whether GELU's slope is multiplied where the gradient of its output is made: by that product, or in its place.
    fn takes_slope_along(&self) -> bool {
        match self.shape.engine {
            Engine::Kernels(variant) => has_slopes(variant),
            Engine::Loops(_) => true,
            Engine::Composed => false,
        }
    }

    fn mlp_backward(&mut self, dy: Buffer, half: Half) -> Buffer {
        let mut inside = half.inside.into_iter();
        let h = inside.next();
        let dhidden = self.residual_backward(4, inside.next());
        if self.is_composed() {
            let steps = [(); 4].map(|()| self.cotangent("the MLP's hidden layer", 4));
            self.give_all(steps);
        }
        let dh = if self.takes_slope_along() {
            dhidden
        } else {
            let dh = self.rounded_cotangent("the MLP's hidden layer", 4);
            self.give(dhidden);
            dh
        };
        self.give_all(h);
        self.input_backward(dy, dh, 4, (half.x, half.stats, half.normed))
    }

    fn attention_backward(&mut self, dy: Buffer, half: Half) -> Buffer {
        let dout = self.residual_backward(1, None); // attention keeps its output itself
        let delta = match self.loops() {
            Some(_) => None, // a row's is one number
            None => Some(self.take(Use::Workspace, "the attention's row sums", self.row_values())),
        };
        if self.is_composed() {
            self.scores(6);
        }
        let dqkv = self.rounded_cotangent("qkv", 3);
        if let Engine::Kernels(variant) = self.shape.engine {
            let (heads, time) = (self.shape.batch_size * self.shape.gpt.n_head, self.shape.gpt.block_size);
            let kept = bytes_kept(variant, heads, time, self.shape.largest_buffer);
            self.touch("the gradients of the scores", kept);
        }
        self.blocks_of_scores(if self.shape.dropout { 3 } else { 2 });
        self.give_all(half.inside.into_iter().chain([dout]).chain(delta));
        self.input_backward(dy, dqkv, 3, (half.x, half.stats, half.normed))
    }

    /// dwte, to which the head's is added, and dwpe.
    pub(super) fn embedding_backward(&mut self, dy: Buffer, head: Buffer) {
        let (rows, c) = (self.rows(), self.channels());
        let dwte = self.take(Use::Gradients, "the embedding's gradient", self.vocab() * c * F32);
        let dwpe = self.take(Use::Gradients, "the positions' gradient", self.shape.gpt.block_size as u64 * c * F32);
        if self.loops().is_none() {
            let sizes = [rows.next_multiple_of(1024), rows, self.vocab() + 1];
            let order = sizes.map(|elements| self.take(Use::Workspace, "the order of the tokens", elements * F32));
            self.give_all(order);
        }
        self.give_all([dy, head]);
        self.gradients.extend([dwte, dwpe]);
    }
}
