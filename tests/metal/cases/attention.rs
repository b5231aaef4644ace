//! Attention's four kernels. Each gets what its forerunners would have made from the f64 twins, so that one wrong kernel
//! does not hide behind another.

use gpt_wgpu::kernel::fold;
use gpt_wgpu::ops::attention::tiles::{self, HEAD_DIMS, Pass, Variant};
use gpt_wgpu::ops::dropout::Dropout;

use super::{Buffer, Case, Elem, two_rows};
use crate::apple;
use crate::common::Random;
use crate::common::twins::{self, AttentionShape};

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0xfeed_beef_cafe, step: 3, site: 0x101 };

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for f16 in [false, true] {
        for head_dim in HEAD_DIMS {
            // Two blocks of rows and several tiles, both ragged
            let shape = match head_dim {
                16 => AttentionShape { batch: 2, time: 70, heads: 2, head_dim },
                32 => AttentionShape { batch: 1, time: 67, heads: 3, head_dim },
                _ => AttentionShape { batch: 1, time: 69, heads: 1, head_dim },
            };
            for dropout in [Dropout::OFF, DROPOUT] {
                for variant in tiles::supported(&apple(), f16) {
                    cases.extend(Inputs::new(shape, dropout, variant, f16).tiled());
                    if f16 && variant.rounds_f32() {
                        cases.extend(Inputs::mixed(shape, dropout, variant).tiled());
                    }
                }
            }
            cases.push(Inputs::new(shape, Dropout::OFF, Variant::Scalar, f16).delta());
        }
        // A sequence of one token, and one that fills its tiles
        for time in [1, 64] {
            for variant in tiles::supported(&apple(), f16) {
                let shape = AttentionShape { batch: 1, time, heads: 3, head_dim: 32 };
                let tiled = Inputs::new(shape, DROPOUT, variant, f16).tiled();
                cases.extend(tiled.iter().filter(|_| time == 1 && !f16).cloned().map(Case::with_int64));
                cases.extend(tiled);
            }
        }
    }
    cases
}

/// All that the kernels read and write at one shape, by the twins.
struct Inputs {
    shape: AttentionShape,
    dropout: Dropout,
    variant: Variant,
    f16: bool,
    /// Whether out and dout are f32 beside qkv in f16, and dqkv is held.
    is_mixed: bool,
    qkv: Vec<f64>,
    dout: Vec<f64>,
    out: Vec<f64>,
    lse: Vec<f64>,
    delta: Vec<f64>,
    dqkv: Vec<f64>,
}

impl Inputs {
    fn new(shape: AttentionShape, dropout: Dropout, variant: Variant, f16: bool) -> Self {
        let mut random = Random((shape.time * 131 + shape.head_dim) as u64);
        let tokens = shape.batch * shape.time;
        // Rounded to what is multiplied: the rest of the difference is the kernel's own.
        let rounded = f16 || matches!(variant, Variant::Coop { f16: true, .. });
        let round = |v: f64| if rounded { half::f16::from_f64(v).to_f64() } else { f64::from(v as f32) };
        let mut values =
            |count: usize, scale: f64| random.vec(count).iter().map(|v| round(v * scale)).collect::<Vec<_>>();
        // Without dropout large logits, a maximum that jumps by more than 2^8 from tile to tile: the sums are rescaled.
        let mut qkv = values(tokens * 3 * shape.channels(), if dropout.is_on() { 1.5 } else { 4.0 });
        for token in qkv.chunks_mut(3 * shape.channels()) {
            token[2 * shape.channels()..].iter_mut().for_each(|v| *v = round(*v / 4.0)); // v
        }
        let dout = values(tokens * shape.channels(), 1.0);
        let (out, lse) = twins::attention(&qkv, shape, dropout);
        let dqkv = twins::attention_backward(&dout, &qkv, shape, dropout);
        let mut delta = vec![0.0; lse.len()];
        for (i, products) in
            dout.iter().zip(&out).map(|(d, o)| d * o).collect::<Vec<_>>().chunks(shape.head_dim).enumerate()
        {
            let (token, head) = (i / shape.heads, i % shape.heads);
            let (b, t) = (token / shape.time, token % shape.time);
            delta[(b * shape.heads + head) * shape.time + t] = products.iter().sum();
        }
        Self { shape, dropout, variant, f16, is_mixed: false, qkv, dout, out, lse, delta, dqkv }
    }

    fn mixed(shape: AttentionShape, dropout: Dropout, variant: Variant) -> Self {
        Self { is_mixed: true, ..Self::new(shape, dropout, variant, true) }
    }

    /// Of qkv.
    fn elem(&self) -> Elem {
        if self.f16 { Elem::F16 } else { Elem::F32 }
    }

    /// Of out.
    fn out_elem(&self) -> Elem {
        if self.f16 && !self.is_mixed { Elem::F16 } else { Elem::F32 }
    }

    fn gradient_scale(&self) -> f32 {
        if self.f16 && !self.is_mixed { 1.0 } else { 64.0 }
    }

    /// f16 products carry 11 bits into sums of up to T terms; f32 ones 24, of which large logits take four before they are
    /// exponentiated. Storage in f16 rounds once more.
    fn tolerance(&self) -> f64 {
        match self.variant {
            Variant::Coop { f16: true, .. } => 4e-3,
            _ if self.f16 => 2e-3,
            _ if self.dropout.is_on() => 1e-5,
            _ => 1e-4,
        }
    }

    /// The kernels' `Params`.
    fn params(&self) -> Vec<u32> {
        let s = self.shape;
        let mut params = vec![s.batch as u32, s.heads as u32, s.time as u32, 0];
        params.extend(self.dropout.params());
        let scale = self.gradient_scale();
        params.extend([scale, if self.is_mixed { 1.0 } else { scale.recip() }].map(f32::to_bits));
        params
    }

    fn case(&self, kernel: gpt_wgpu::kernel::Kernel, groups: usize, buffers: Vec<Buffer>) -> Case {
        let what = format!("{:?}", self.shape);
        let grid = if self.shape.heads == 3 { two_rows(groups as u32) } else { fold(groups as u32) };
        Case { kernel, what, grid, buffers, params: self.params() }
    }

    /// dqkv with only the thirds wanted that `written` names.
    fn gradient(&self, written: [bool; 3]) -> Buffer {
        let third = |i: usize| i / self.shape.channels() % 3;
        let factor = if self.is_mixed { f64::from(self.gradient_scale()) } else { 1.0 };
        let want = self.dqkv.iter().enumerate().map(|(i, v)| if written[third(i)] { *v * factor } else { f64::NAN });
        Buffer::output("dqkv", self.elem(), want.collect(), self.tolerance())
    }

    fn tiled(&self) -> Vec<Case> {
        let s = self.shape;
        let make = |pass| {
            let f16 = [self.elem(), self.out_elem()].map(|elem| elem == Elem::F16);
            let (kernel, rows) = tiles::kernel(pass, self.variant, true, s.head_dim, f16, self.dropout.is_on());
            (kernel, s.batch * s.heads * s.time.div_ceil(rows as usize))
        };
        let qkv = Buffer::input("qkv", self.elem(), &self.qkv);
        let backward = |written| {
            vec![
                qkv.clone(),
                Buffer::input("dout", self.out_elem(), &self.dout),
                Buffer::input("lse", Elem::F32, &self.lse),
                Buffer::input("delta", Elem::F32, &self.delta),
                self.gradient(written),
            ]
        };
        let forward = vec![
            qkv.clone(),
            Buffer::output("out", self.out_elem(), self.out.clone(), self.tolerance()),
            Buffer::output("lse", Elem::F32, self.lse.clone(), 1e-5), // of f32 sums in every variant
        ];
        [
            (Pass::Forward, forward),
            (Pass::Dq, backward([true, false, false])),
            (Pass::Dkv, backward([false, true, true])),
        ]
        .into_iter()
        .map(|(pass, buffers)| {
            let (kernel, groups) = make(pass);
            self.case(kernel, groups, buffers)
        })
        .collect()
    }

    fn delta(&self) -> Case {
        let s = self.shape;
        let (kernel, rows) = tiles::delta_kernel(s.head_dim, self.f16);
        // The kernel sums what it reads, so the twin of f16 tensors starts from rounded ones.
        let round = |v: &f64| if self.f16 { half::f16::from_f64(*v).to_f64() } else { f64::from(*v as f32) };
        let out: Vec<f64> = self.out.iter().map(round).collect();
        let buffers = vec![
            Buffer::input("dout", self.elem(), &self.dout),
            Buffer::input("out", self.elem(), &out),
            Buffer::output("delta", Elem::F32, self.delta.clone(), if self.f16 { 1e-3 } else { 1e-6 }),
        ];
        self.case(kernel, (s.batch * s.time * s.heads).div_ceil(rows as usize), buffers)
    }
}
