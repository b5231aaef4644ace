//! Every operation of the model, value and gradients, against the f64 twins.

use anyhow::{Context, Result};
use burn::tensor::{Gradients, Int, Tensor, TensorData};

use super::{Bed, Outcome, Seen};
use crate::checkpoint::read;
use crate::ops::adamw::{AdamW, Parameter, adamw};
use crate::ops::attention::causal_attention;
use crate::ops::attention::tiles::HEAD_DIMS;
use crate::ops::cross_entropy::cross_entropy;
use crate::ops::dropout::{Dropout, dropout};
use crate::ops::embedding::embedding;
use crate::ops::layer_norm::layer_norm;
use crate::ops::linear::{Gelu, linear, linear_gelu, linear_residual};
use crate::rng::Stream;
use crate::twins::{self, AdamWStep, AttentionShape, EmbeddingShape};

/// A check of one operation.
type Body = fn(&Bed) -> Result<Seen>;

/// Every operation by name.
pub(super) const ALL: [(&str, Body); 7] = [
    ("linear layers", linears),
    ("attention", attention),
    ("layer norm", norms),
    ("embedding", embeddings),
    ("cross-entropy", losses),
    ("dropout", masks),
    ("adamw", updates),
];

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0x5eed_cafe, step: 3, site: 0x101 };

/// Reproducible values in [-1, 1) that are exact in f32.
struct Values(Stream);

impl Values {
    fn new(seed: usize) -> Self {
        Self(Stream::new(seed as u64, 0))
    }

    fn take(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| f64::from((2.0 * self.0.next_f64() - 1.0) as f32)).collect()
    }
}

impl Bed<'_> {
    fn tensor<const D: usize>(&self, values: &[f64], shape: [usize; D]) -> Tensor<D> {
        let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.chosen.device)
    }

    fn integers<const D: usize>(&self, values: &[i32], shape: [usize; D]) -> Tensor<D, Int> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &self.chosen.device.clone().autodiff())
    }

    /// A tensor that wants a gradient.
    fn leaf<const D: usize>(&self, values: &[f64], shape: [usize; D]) -> Tensor<D> {
        Tensor::from_inner(self.tensor(values, shape)).require_grad()
    }

    /// Gradients of Σ y · cotangent.
    fn backward<const D: usize>(&self, y: Tensor<D>, cotangent: &[f64]) -> Gradients {
        let cotangent = Tensor::from_inner(self.tensor(cotangent, y.dims()));
        (y * cotangent).sum().backward()
    }

    /// The distance of a leaf's gradient.
    fn gradient<const D: usize>(&self, leaf: &Tensor<D>, gradients: &Gradients, want: &[f64]) -> Result<f64> {
        self.distance(leaf.grad(gradients).context("a gradient is missing")?, want)
    }

    fn worst(&self, distances: &[f64]) -> Seen {
        self.within(distances.iter().copied().fold(0.0, f64::max))
    }
}

fn linears(bed: &Bed) -> Result<Seen> {
    let mut distances = Vec::new();
    for (rows, k, n) in [(1, 1, 1), (7, 16, 48), (33, 17, 31), (130, 96, 200)] {
        let mut random = Values::new(rows);
        let [x, w, b] = [rows * k, n * k, n].map(|count| random.take(count));
        let [residual, dy] = [rows * n; 2].map(|count| random.take(count));
        let h = twins::linear(&x, &w, Some(&b), rows, k, n);
        for gelu in [None, Some(Gelu::Erf), Some(Gelu::Tanh)] {
            let (xt, wt, bt) = (bed.leaf(&x, [rows, k]), bed.leaf(&w, [n, k]), bed.leaf(&b, [n]));
            let (y, want, dh) = match gelu {
                None => (linear(xt.clone(), wt.clone(), Some(bt.clone())), h.clone(), dy.clone()),
                Some(kind) => (
                    linear_gelu(xt.clone(), wt.clone(), Some(bt.clone()), kind),
                    h.iter().map(|&h| twins::gelu(h, kind)).collect(),
                    h.iter().zip(&dy).map(|(&h, dy)| dy * twins::gelu_slope(h, kind)).collect(),
                ),
            };
            distances.push(bed.distance(y.clone().inner(), &want)?);
            let gradients = bed.backward(y, &dy);
            let [dx, dw, db] = twins::linear_backward(&dh, &x, &w, rows, k, n);
            distances.push(bed.gradient(&xt, &gradients, &dx)?);
            distances.push(bed.gradient(&wt, &gradients, &dw)?);
            distances.push(bed.gradient(&bt, &gradients, &db)?);
        }

        let (xt, wt, rt) = (bed.leaf(&x, [rows, k]), bed.leaf(&w, [n, k]), bed.leaf(&residual, [rows, n]));
        let y = linear_residual(xt.clone(), wt.clone(), None, rt.clone(), DROPOUT);
        let factors: Vec<f64> = DROPOUT.factors(rows, n).into_iter().map(f64::from).collect();
        let product = twins::linear(&x, &w, None, rows, k, n);
        let want: Vec<f64> = (0..rows * n).map(|i| residual[i] + product[i] * factors[i]).collect();
        distances.push(bed.distance(y.clone().inner(), &want)?);
        let gradients = bed.backward(y, &dy);
        let dh: Vec<f64> = dy.iter().zip(&factors).map(|(dy, factor)| dy * factor).collect();
        let [dx, dw, _] = twins::linear_backward(&dh, &x, &w, rows, k, n);
        distances.push(bed.gradient(&xt, &gradients, &dx)?);
        distances.push(bed.gradient(&wt, &gradients, &dw)?);
        distances.push(bed.gradient(&rt, &gradients, &dy)?);
    }
    Ok(bed.worst(&distances))
}

fn attention(bed: &Bed) -> Result<Seen> {
    let mut distances = Vec::new();
    for head_dim in HEAD_DIMS {
        for dropout in [Dropout::OFF, DROPOUT] {
            let s = AttentionShape { batch: 1, time: 67, heads: 2, head_dim };
            let mut random = Values::new(head_dim);
            // What f16 can hold too: its rounding of the inputs is no fault of a kernel.
            let halves = |value: &f64| half::f16::from_f64(*value).to_f64();
            let qkv: Vec<f64> = random.take(s.time * 3 * s.channels()).iter().map(halves).collect();
            let dout = random.take(s.time * s.channels());
            let leaf = bed.leaf(&qkv, [1, s.time, 3 * s.channels()]);
            let out = causal_attention(leaf.clone(), s.heads, dropout);
            distances.push(bed.distance(out.clone().inner(), &twins::attention(&qkv, s, dropout).0)?);
            let gradients = bed.backward(out, &dout);
            distances.push(bed.gradient(&leaf, &gradients, &twins::attention_backward(&dout, &qkv, s, dropout))?);
        }
    }
    Ok(bed.worst(&distances))
}

/// A change of one token must leave every output before it equal to the bit, and move those from it on.
pub(super) fn causality(bed: &Bed) -> Result<Seen> {
    let (time, heads, head_dim) = (101, 2, 64);
    let (channels, width) = (heads * head_dim, 3 * heads * head_dim);
    let qkv = Values::new(11).take(time * width);
    let run = |qkv: &[f64]| read(causal_attention(bed.tensor(qkv, [1, time, width]), heads, Dropout::OFF));
    let before = run(&qkv)?;
    for token in [1, 32, 63, 64, 100] {
        let mut changed = qkv.clone();
        let first_changed = if bed.spoil { token - 1 } else { token };
        changed[first_changed * width..].iter_mut().for_each(|value| *value = 3.0 - *value);
        let after = run(&changed)?;
        let (past, rest) = before.split_at(token * channels);
        let bad = |detail: String| Ok(Seen { outcome: Outcome::Bad, detail });
        if *past != after[..past.len()] {
            return bad(format!("token {token} changes outputs before it"));
        }
        if *rest == after[past.len()..] {
            return bad(format!("token {token} changes nothing"));
        }
    }
    Ok(Seen::good("no output sees a later token, to the bit".into()))
}

fn norms(bed: &Bed) -> Result<Seen> {
    let mut distances = Vec::new();
    for (rows, c) in [(3, 7), (33, 129)] {
        let mut random = Values::new(c);
        let [x, dy] = [rows * c; 2].map(|count| random.take(count));
        let [w, b] = [c; 2].map(|count| random.take(count));
        let (xt, wt, bt) = (bed.leaf(&x, [rows, c]), bed.leaf(&w, [c]), bed.leaf(&b, [c]));
        let y = layer_norm(xt.clone(), wt.clone(), Some(bt.clone()));
        distances.push(bed.distance(y.clone().inner(), &twins::layer_norm(&x, &w, Some(&b), c).0)?);
        let gradients = bed.backward(y, &dy);
        let [dx, dw, db] = twins::layer_norm_backward(&dy, &x, &w, c);
        distances.push(bed.gradient(&xt, &gradients, &dx)?);
        distances.push(bed.gradient(&wt, &gradients, &dw)?);
        distances.push(bed.gradient(&bt, &gradients, &db)?);
    }
    Ok(bed.worst(&distances))
}

fn embeddings(bed: &Bed) -> Result<Seen> {
    let (batch, s) = (3, EmbeddingShape { time: 5, vocab: 11, block_size: 8, channels: 6 });
    let mut random = Values::new(9);
    let (wte, wpe) = (random.take(s.vocab * s.channels), random.take(s.block_size * s.channels));
    let dx = random.take(batch * s.time * s.channels);
    let tokens: Vec<i32> = (0..batch * s.time).map(|i| (i * i % s.vocab) as i32).collect(); // some occur twice
    let (tt, pt) = (bed.leaf(&wte, [s.vocab, s.channels]), bed.leaf(&wpe, [s.block_size, s.channels]));
    let x = embedding(bed.integers(&tokens, [batch, s.time]), tt.clone(), pt.clone(), DROPOUT, false);
    let value = bed.distance(x.clone().inner(), &twins::embedding(&tokens, &wte, &wpe, s, DROPOUT))?;
    let gradients = bed.backward(x, &dx);
    let [dwte, dwpe] = twins::embedding_backward(&dx, &tokens, s, DROPOUT);
    Ok(bed.worst(&[value, bed.gradient(&tt, &gradients, &dwte)?, bed.gradient(&pt, &gradients, &dwpe)?]))
}

fn losses(bed: &Bed) -> Result<Seen> {
    let (batch, time, c, v) = (2, 7, 16, 131);
    let mut random = Values::new(v);
    let (x, w) = (random.take(batch * time * c), random.take(v * c));
    let mut targets: Vec<i32> = (0..batch * time).map(|i| (i * 37 % v) as i32).collect();
    targets[1] = -1; // ignored
    let (xt, wt) = (bed.leaf(&x, [batch, time, c]), bed.leaf(&w, [v, c]));
    let loss = cross_entropy(xt.clone(), wt.clone(), bed.integers(&targets, [batch, time]));
    let (want, dx, dw) = twins::cross_entropy(&x, &w, &targets, c, v);
    let value = bed.distance(loss.clone().inner(), &[want])?;
    let gradients = loss.backward();
    Ok(bed.worst(&[value, bed.gradient(&xt, &gradients, &dx)?, bed.gradient(&wt, &gradients, &dw)?]))
}

fn masks(bed: &Bed) -> Result<Seen> {
    let (rows, columns) = (301, 67); // columns not a multiple of four
    let want: Vec<f64> = DROPOUT.factors(rows, columns).into_iter().map(f64::from).collect();
    let got = dropout(bed.tensor(&vec![1.0; rows * columns], [rows, columns]), DROPOUT);
    Ok(bed.worst(&[bed.distance(got, &want)?]))
}

/// Two parameters at once, one of them no multiple of four and without decay.
fn updates(bed: &Bed) -> Result<Seen> {
    let hyper = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
    let step = AdamWStep { lr: 1e-2, weight_decay: 0.1, hyper };
    let tensor = |values: &[f64]| bed.tensor(values, [values.len()]);
    let (mut parameters, mut wanted) = (Vec::new(), Vec::new());
    for (count, decays) in [(1003, false), (2052, true)] {
        let mut random = Values::new(count);
        let [mut p, g, mut m] = [count; 3].map(|count| random.take(count));
        let mut v: Vec<f64> = random.take(count).iter().map(|value| f64::from((value * value) as f32)).collect();
        parameters.push(Parameter { p: tensor(&p), g: tensor(&g), m: tensor(&m), v: tensor(&v), decays });
        twins::adamw(&mut p, &g, &mut m, &mut v, 0.5, step.of(decays), 3);
        wanted.extend([p, m, v]);
    }
    let updated = adamw(parameters, tensor(&twins::verdict(0.5, step, 3)), hyper);
    let distances = updated.into_iter().flatten().zip(&wanted).map(|(got, want)| bed.distance(got, want));
    Ok(bed.worst(&distances.collect::<Result<Vec<_>>>()?))
}
