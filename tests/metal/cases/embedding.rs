//! The embedding, forward, and the three kernels of its gradient, each given what the one before would have made.

use gpt_wgpu::kernel::fold;
use gpt_wgpu::kernel::lanes::Lanes;
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::ops::embedding::{BLOCK, backward_kernel, forward_kernel, rank_kernel, sort_kernel};

use super::{Buffer, Case, Elem, two_rows};
use crate::common::Random;
use crate::common::twins::{self, EmbeddingShape};

const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc, step: 7, site: 0x100 };

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // 33 lanes of one column, 18 of four: tiles of 16 lanes, the last ragged
    for channels in [33, 72] {
        let shape = EmbeddingShape { time: 9, vocab: 22, block_size: 13, channels };
        for dropout in [Dropout::OFF, DROPOUT] {
            let inputs = Inputs::new(5, shape, dropout);
            for f16 in [false, true] {
                cases.push(inputs.forward(f16));
                cases.extend([1, 16].map(|rows| inputs.backward(rows, f16)));
            }
            cases.extend(dropout.is_on().then(|| inputs.forward(false).with_int64()));
            cases.extend(dropout.is_on().then(|| inputs.backward(16, false).with_int64()));
        }
    }
    // More positions than a workgroup sorts, and as many as it does
    for batch in [130, 128, 1] {
        let shape = EmbeddingShape { time: 16, vocab: 300, block_size: 16, channels: 4 };
        let inputs = Inputs::new(batch, shape, Dropout::OFF);
        cases.extend([inputs.sort(), inputs.rank()]);
    }
    cases
}

/// One shape's tokens.
struct Inputs {
    batch: usize,
    shape: EmbeddingShape,
    dropout: Dropout,
    tokens: Vec<i32>,
}

impl Inputs {
    /// Half of the tokens are one of two neighbours, so that their lists are long; the last row of wte is nobody's.
    fn new(batch: usize, shape: EmbeddingShape, dropout: Dropout) -> Self {
        let mut random = Random(23);
        let tokens = (0..batch * shape.time)
            .map(|i| if i % 2 == 0 { 5 + (i % 4 / 2) as i32 } else { random.below(shape.vocab - 1) as i32 })
            .collect();
        Self { batch, shape, dropout, tokens }
    }

    fn what(&self) -> String {
        format!("{} x {:?}", self.batch, self.shape)
    }

    fn tokens(&self) -> Buffer {
        Buffer::input("tokens", Elem::Int, &self.tokens.iter().map(|&t| f64::from(t)).collect::<Vec<_>>())
    }

    fn forward(&self, f16: bool) -> Case {
        let s = self.shape;
        let (elem, tolerance) = Elem::activation(f16, 1e-6);
        let mut random = Random(29);
        let (wte, wpe) = (random.vec(s.vocab * s.channels), random.vec(s.block_size * s.channels));
        let x = twins::embedding(&self.tokens, &wte, &wpe, s, self.dropout);
        let lanes = Lanes::of(s.channels);
        let mut params = [self.tokens.len(), lanes.count, s.time, s.vocab].map(|size| size as u32).to_vec();
        params.extend(self.dropout.params());
        Case {
            kernel: forward_kernel(lanes, f16, self.dropout.is_on()),
            what: self.what(),
            grid: two_rows((self.tokens.len() * lanes.count).div_ceil(256) as u32),
            buffers: vec![
                self.tokens(),
                Buffer::input("wte", Elem::F32, &wte),
                Buffer::input("wpe", Elem::F32, &wpe),
                Buffer::output("x", elem, x, tolerance),
            ],
            params,
        }
    }

    /// The keys of every block in order, then u32::MAX.
    fn sorted(&self) -> Vec<f64> {
        let blocks = self.tokens.chunks(BLOCK).flat_map(|block| {
            let mut keys: Vec<_> = block.iter().enumerate().map(|(i, &t)| (t as usize * BLOCK + i) as f64).collect();
            keys.sort_by(f64::total_cmp);
            keys.resize(BLOCK, -1.0); // u32::MAX as an i32
            keys
        });
        blocks.collect()
    }

    /// All positions by (token, position), and where each token's begin.
    fn lists(&self) -> [Vec<f64>; 2] {
        let mut order: Vec<usize> = (0..self.tokens.len()).collect();
        order.sort_by_key(|&i| (self.tokens[i], i));
        let below = |token: usize| self.tokens.iter().filter(|&&t| (t as usize) < token).count() as f64;
        [order.into_iter().map(|i| i as f64).collect(), (0..=self.shape.vocab).map(below).collect()]
    }

    fn sort(&self) -> Case {
        let blocks = self.tokens.len().div_ceil(BLOCK);
        Case {
            kernel: sort_kernel(),
            what: self.what(),
            grid: two_rows(blocks as u32),
            buffers: vec![self.tokens(), Buffer::output("sorted", Elem::Int, self.sorted(), 0.0)],
            params: vec![self.tokens.len() as u32, self.shape.vocab as u32],
        }
    }

    fn rank(&self) -> Case {
        let blocks = self.tokens.len().div_ceil(BLOCK);
        let [order, starts] = self.lists();
        Case {
            kernel: rank_kernel(),
            what: self.what(),
            grid: two_rows((blocks * BLOCK + self.shape.vocab + 1).div_ceil(256) as u32),
            buffers: vec![
                Buffer::input("sorted", Elem::Int, &self.sorted()),
                Buffer::output("order", Elem::Int, order, 0.0),
                Buffer::output("starts", Elem::Int, starts, 0.0),
            ],
            params: vec![blocks as u32, self.shape.vocab as u32],
        }
    }

    /// `rows` of wte and wpe a workgroup.
    fn backward(&self, rows: usize, f16: bool) -> Case {
        let s = self.shape;
        let (elem, _) = Elem::activation(f16, 0.0);
        let dx = Random(31).of(f16, self.tokens.len() * s.channels);
        let [dwte, dwpe] = twins::embedding_backward(&dx, &self.tokens, s, self.dropout);
        let [order, starts] = self.lists();
        let lanes = Lanes::of(s.channels);
        let mut params = [self.batch, s.time, lanes.count, s.vocab, s.block_size].map(|size| size as u32).to_vec();
        params.extend(self.dropout.params());
        let groups = (s.vocab + s.block_size).div_ceil(rows) * lanes.count.div_ceil(16);
        Case {
            kernel: backward_kernel(lanes, f16, self.dropout.is_on(), rows),
            what: self.what(),
            grid: if self.dropout.is_on() { two_rows(groups as u32) } else { fold(groups as u32) },
            buffers: vec![
                Buffer::input("dx", elem, &dx),
                Buffer::input("order", Elem::Int, &order),
                Buffer::input("starts", Elem::Int, &starts),
                Buffer::output("dwte", Elem::F32, dwte, 1e-5),
                Buffer::output("dwpe", Elem::F32, dwpe, 1e-5),
            ],
            params,
        }
    }
}
