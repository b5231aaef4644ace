//! Attention's kernels. Each gets what its forerunners would have made from the f64 twins, so that one wrong kernel
//! does not hide behind another.

use burn::tensor::DType;
use gpt_wgpu::kernel::{Kernel, fold};
use gpt_wgpu::ops::attention::tiles::{self, HEAD_DIMS, Pass, Variant, Version};
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
    /// dS', a row of queries for each key.
    kept: Vec<f64>,
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
        let kept = twins::score_gradients(&dout, &qkv, shape, dropout);
        let dqkv = twins::attention_backward(&dout, &qkv, shape, dropout);
        let mut delta = vec![0.0; lse.len()];
        for (i, products) in
            dout.iter().zip(&out).map(|(d, o)| d * o).collect::<Vec<_>>().chunks(shape.head_dim).enumerate()
        {
            let (token, head) = (i / shape.heads, i % shape.heads);
            let (b, t) = (token / shape.time, token % shape.time);
            delta[(b * shape.heads + head) * shape.time + t] = products.iter().sum();
        }
        Self { shape, dropout, variant, f16, is_mixed: false, qkv, dout, out, lse, delta, dqkv, kept }
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

    /// The kernels' `Params` for the heads from `first` on.
    fn params(&self, first: usize) -> Vec<u32> {
        let s = self.shape;
        let mut params = vec![(s.batch * s.heads - first) as u32, s.heads as u32, s.time as u32, first as u32];
        params.extend(self.dropout.params());
        let scale = self.gradient_scale();
        params.extend([scale, if self.is_mixed { 1.0 } else { scale.recip() }].map(f32::to_bits));
        params
    }

    fn case(&self, kernel: Kernel, groups: usize, first: usize, buffers: Vec<Buffer>) -> Case {
        let what = format!("{:?}", self.shape);
        let grid = if self.shape.heads == 3 { two_rows(groups as u32) } else { fold(groups as u32) };
        Case { kernel, what, grid, buffers, params: self.params(first) }
    }

    /// dqkv with only the thirds wanted that `written` names, of the heads from `first` on.
    fn gradient(&self, written: [bool; 3], first: usize) -> Buffer {
        let s = self.shape;
        let factor = if self.is_mixed { f64::from(self.gradient_scale()) } else { 1.0 };
        let is_written = |i: usize| {
            let (token, column) = (i / (3 * s.channels()), i % (3 * s.channels()));
            let head = token / s.time * s.heads + column % s.channels() / s.head_dim;
            written[column / s.channels()] && head >= first
        };
        let want = self.dqkv.iter().enumerate().map(|(i, v)| if is_written(i) { *v * factor } else { f64::NAN });
        Buffer::output("dqkv", self.elem(), want.collect(), self.tolerance())
    }

    /// dS' of the heads from `first` on as it is kept: in whole quads of queries, or in matrices; zeros behind the last token, `future` where
    /// a whole quad or matrix lies above the diagonal.
    fn kept(&self, first: usize, future: f64) -> Vec<f64> {
        let time = self.shape.time;
        let factor = if self.variant == Variant::Scalar { 1.0 } else { f64::from(self.gradient_scale()) };
        let (_, [keys, queries]) = tiles::kept(self.variant, time);
        // A unit of one key and four queries, or a matrix
        let (unit_keys, unit_queries) = match self.variant {
            Variant::Scalar => (1, 4),
            Variant::Coop { edge, .. } => (edge as usize, edge as usize),
        };
        let mut kept = Vec::new();
        for head in self.kept[first * time * time..].chunks(time * time) {
            for unit in 0..keys / unit_keys * (queries / unit_queries) {
                let first_key = unit / (queries / unit_queries) * unit_keys;
                let first_query = unit % (queries / unit_queries) * unit_queries;
                for element in 0..unit_keys * unit_queries {
                    let (key, query) = (first_key + element / unit_queries, first_query + element % unit_queries);
                    kept.push(match first_query + unit_queries > first_key {
                        false => future,
                        true if key < time && query < time => head[key * time + query] * factor,
                        true => 0.0,
                    });
                }
            }
        }
        kept
    }

    fn tiled(&self) -> Vec<Case> {
        let s = self.shape;
        let version = Version { variant: self.variant, few_registers: true };
        let make = |pass, first| {
            let f16 = [self.elem(), self.out_elem()].map(|elem| elem == Elem::F16);
            let (kernel, rows) = tiles::kernel(pass, version, s.head_dim, f16, self.dropout.is_on());
            (kernel, (s.batch * s.heads - first) * s.time.div_ceil(rows as usize))
        };
        let qkv = Buffer::input("qkv", self.elem(), &self.qkv);
        let backward = |written, first| {
            vec![
                qkv.clone(),
                Buffer::input("dout", self.out_elem(), &self.dout),
                Buffer::input("lse", Elem::F32, &self.lse),
                Buffer::input("delta", Elem::F32, &self.delta),
                self.gradient(written, first),
            ]
        };
        // All heads but the first, where there are more: dS' begins with theirs.
        let first = usize::from(s.batch * s.heads > 1);
        let kept_elem = if tiles::kept(self.variant, s.time).0 == DType::F16 { Elem::F16 } else { Elem::F32 };
        // Of one key dS is the difference of two equal numbers.
        let near = if s.time == 1 { self.tolerance().max(1e-3) } else { self.tolerance() };
        let kept = Buffer::output("dS'", kept_elem, self.kept(first, f64::INFINITY), near);
        let keeping = [backward([false, true, true], first), vec![kept]].concat();
        let given = Buffer::input("dS'", kept_elem, &self.kept(first, f64::NAN)); // what nobody wrote
        let of_kept = vec![qkv.clone(), given, self.gradient([true, false, false], first)];
        let forward = vec![
            qkv.clone(),
            Buffer::output("out", self.out_elem(), self.out.clone(), self.tolerance()),
            Buffer::output("lse", Elem::F32, self.lse.clone(), 1e-5), // of f32 sums in every variant
        ];
        [
            (Pass::Forward, 0, forward),
            (Pass::Dq, 0, backward([true, false, false], 0)),
            (Pass::Dkv, 0, backward([false, true, true], 0)),
            (Pass::DkvDs, first, keeping),
            (Pass::DqOfDs, first, of_kept),
        ]
        .into_iter()
        .map(|(pass, first, buffers)| {
            let (kernel, groups) = make(pass, first);
            self.case(kernel, groups, first, buffers)
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
        self.case(kernel, (s.batch * s.time * s.heads).div_ceil(rows as usize), 0, buffers)
    }
}
