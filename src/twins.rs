//! The operations as plain f64 loops, forward and backward, in the manner of llm.c: the bottom of the chain of twins. The
//! tests and `doctor` hold every kernel against them. Tensors are row-major slices.

use crate::ops::adamw::AdamW;
use crate::ops::dropout::Dropout;
use crate::ops::linear::Gelu;
use crate::ops::verdict::VERDICT;

/// Where `got` leaves `want` by more than `tolerance` · (1 + |want|), the first such element; NaN never passes.
pub fn difference(got: &[f64], want: &[f64], tolerance: f64) -> Option<String> {
    if got.len() != want.len() {
        return Some(format!("{} elements, wanted {}", got.len(), want.len()));
    }
    got.iter()
        .zip(want)
        .position(|(g, w)| (g - w).is_nan() || (g - w).abs() > tolerance * (1.0 + w.abs()))
        .map(|i| format!("element {i} is {}, wanted {}", got[i], want[i]))
}

/// How far `got` is from `want`: the largest difference of an element, relative to that element and the root mean square of
/// all. Infinite where a number is none, or one is missing.
pub fn distance(got: &[f64], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let rms = (want.iter().map(|w| w * w).sum::<f64>() / want.len().max(1) as f64).sqrt().max(1e-9);
    let apart = got.iter().zip(want).map(|(g, w)| (g - w).abs() / (rms + w.abs()));
    apart.fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { d.max(worst) })
}

/// y (rows, n) = x (rows, k) wᵀ (n, k) + b.
pub fn linear(x: &[f64], w: &[f64], b: Option<&[f64]>, rows: usize, k: usize, n: usize) -> Vec<f64> {
    let mut y = vec![0.0; rows * n];
    for r in 0..rows {
        for o in 0..n {
            let mut sum = b.map_or(0.0, |b| b[o]);
            for i in 0..k {
                sum += x[r * k + i] * w[o * k + i];
            }
            y[r * n + o] = sum;
        }
    }
    y
}

/// (dx, dw, db) of [`linear`].
pub fn linear_backward(dy: &[f64], x: &[f64], w: &[f64], rows: usize, k: usize, n: usize) -> [Vec<f64>; 3] {
    let (mut dx, mut dw, mut db) = (vec![0.0; rows * k], vec![0.0; n * k], vec![0.0; n]);
    for r in 0..rows {
        for o in 0..n {
            let d = dy[r * n + o];
            db[o] += d;
            for i in 0..k {
                dx[r * k + i] += d * w[o * k + i];
                dw[o * k + i] += d * x[r * k + i];
            }
        }
    }
    [dx, dw, db]
}

/// The error function by its series and continued fraction, to about 1e-15.
pub fn erf(x: f64) -> f64 {
    if x.abs() < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        return sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let z = x.abs();
    let mut fraction = 0.0;
    for n in (1..200).rev() {
        fraction = n as f64 / 2.0 / (z + fraction);
    }
    let complement = (-z * z).exp() / std::f64::consts::PI.sqrt() / (z + fraction);
    (1.0 - complement) * x.signum()
}

/// gelu(x).
pub fn gelu(x: f64, kind: Gelu) -> f64 {
    match kind {
        Gelu::Erf => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Gelu::Tanh => {
            let scale = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * x * (1.0 + (scale * (x + 0.044715 * x * x * x)).tanh())
        }
    }
}

/// gelu' by central differences: independent of any formula for it.
pub fn gelu_slope(x: f64, kind: Gelu) -> f64 {
    let h = 1e-5;
    (gelu(x + h, kind) - gelu(x - h, kind)) / (2.0 * h)
}

/// (y, mean, rstd) of rows of c elements.
pub fn layer_norm(x: &[f64], w: &[f64], b: Option<&[f64]>, c: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut y, mut means, mut rstds) = (Vec::new(), Vec::new(), Vec::new());
    for row in x.chunks(c) {
        let mean = row.iter().sum::<f64>() / c as f64;
        let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / c as f64;
        let rstd = 1.0 / (variance + 1e-5).sqrt();
        for i in 0..c {
            y.push((row[i] - mean) * rstd * w[i] + b.map_or(0.0, |b| b[i]));
        }
        means.push(mean);
        rstds.push(rstd);
    }
    (y, means, rstds)
}

/// (dx, dw, db) of [`layer_norm`].
pub fn layer_norm_backward(dy: &[f64], x: &[f64], w: &[f64], c: usize) -> [Vec<f64>; 3] {
    let (_, means, rstds) = layer_norm(x, w, None, c);
    let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; c], vec![0.0; c]);
    for r in 0..x.len() / c {
        let normed = |i: usize| (x[r * c + i] - means[r]) * rstds[r];
        let dnormed = |i: usize| dy[r * c + i] * w[i];
        let average = (0..c).map(dnormed).sum::<f64>() / c as f64;
        let along = (0..c).map(|i| dnormed(i) * normed(i)).sum::<f64>() / c as f64;
        for i in 0..c {
            dx[r * c + i] = (dnormed(i) - average - normed(i) * along) * rstds[r];
            dw[i] += dy[r * c + i] * normed(i);
            db[i] += dy[r * c + i];
        }
    }
    [dx, dw, db]
}

/// The sizes of an embedding; tokens (B, T) follow.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingShape {
    /// Tokens T of a sequence.
    pub time: usize,
    /// Rows of wte.
    pub vocab: usize,
    /// Rows of wpe.
    pub block_size: usize,
    /// Channels C.
    pub channels: usize,
}

/// dropout(the rows of wte that the tokens name + the rows of wpe of their places), (B, T, C).
pub fn embedding(tokens: &[i32], wte: &[f64], wpe: &[f64], s: EmbeddingShape, dropout: Dropout) -> Vec<f64> {
    let c = s.channels;
    let mask = mask(tokens.len(), c, dropout);
    let mut x = Vec::with_capacity(tokens.len() * c);
    for (row, &token) in tokens.iter().enumerate() {
        for i in 0..c {
            x.push((wte[token as usize * c + i] + wpe[row % s.time * c + i]) * mask[row * c + i]);
        }
    }
    x
}

/// (dwte (V, C), dwpe (block_size, C)) of [`embedding`].
pub fn embedding_backward(dx: &[f64], tokens: &[i32], s: EmbeddingShape, dropout: Dropout) -> [Vec<f64>; 2] {
    let c = s.channels;
    let mask = mask(tokens.len(), c, dropout);
    let (mut dwte, mut dwpe) = (vec![0.0; s.vocab * c], vec![0.0; s.block_size * c]);
    for (row, &token) in tokens.iter().enumerate() {
        for i in 0..c {
            let d = dx[row * c + i] * mask[row * c + i];
            dwte[token as usize * c + i] += d;
            dwpe[row % s.time * c + i] += d;
        }
    }
    [dwte, dwpe]
}

/// The factors of a dropout, all 1 where it is off.
fn mask(rows: usize, columns: usize, dropout: Dropout) -> Vec<f64> {
    if !dropout.is_on() {
        return vec![1.0; rows * columns];
    }
    dropout.factors(rows, columns).into_iter().map(f64::from).collect()
}

/// All numbers of one of AdamW's steps.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled decay.
    pub weight_decay: f64,
    /// What is the same in every step.
    pub hyper: AdamW,
}

impl AdamWStep {
    /// The same step of a parameter that decays, or does not.
    pub fn of(self, decays: bool) -> Self {
        Self { weight_decay: if decays { self.weight_decay } else { 0.0 }, ..self }
    }
}

/// The verdict that lets AdamW make its `count`-th update, with `factor` on the gradient.
pub fn verdict(factor: f64, step: AdamWStep, count: u64) -> [f64; VERDICT] {
    let AdamWStep { lr, weight_decay, hyper } = step;
    let [correction1, correction2] = [hyper.beta1, hyper.beta2].map(|beta| 1.0 - beta.powi(count as i32));
    [factor, 1.0, lr / correction1, 1.0 / correction2.sqrt(), 1.0 - lr * weight_decay]
}

/// AdamW's `count`-th step, counted from 1, of p, m and v in place; `scale` multiplies the gradient.
pub fn adamw(p: &mut [f64], g: &[f64], m: &mut [f64], v: &mut [f64], scale: f64, step: AdamWStep, count: u64) {
    let AdamWStep { lr, weight_decay, hyper: AdamW { beta1, beta2, eps } } = step;
    for i in 0..p.len() {
        let g = g[i] * scale;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let m_hat = m[i] / (1.0 - beta1.powi(count as i32));
        let v_hat = v[i] / (1.0 - beta2.powi(count as i32));
        p[i] = p[i] * (1.0 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps);
    }
}

/// The sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Sequences B.
    pub batch: usize,
    /// Tokens T.
    pub time: usize,
    /// Heads H.
    pub heads: usize,
    /// Channels D of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Channels C of all heads.
    pub fn channels(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Index of element d of part (0 = q, 1 = k, 2 = v), head h, token (b, t) in the packed projection.
    fn packed(&self, b: usize, t: usize, part: usize, h: usize, d: usize) -> usize {
        ((b * self.time + t) * 3 + part) * self.channels() + h * self.head_dim + d
    }

    fn merged(&self, b: usize, t: usize, h: usize, d: usize) -> usize {
        (b * self.time + t) * self.channels() + h * self.head_dim + d
    }
}

/// Causal attention over qkv (B, T, 3C) -> (out (B, T, C), lse (B, H, T)).
pub fn attention(qkv: &[f64], s: AttentionShape, dropout: Dropout) -> (Vec<f64>, Vec<f64>) {
    let mut out = vec![0.0; s.batch * s.time * s.channels()];
    let mut lses = vec![0.0; s.batch * s.heads * s.time];
    for_each_row(qkv, s, dropout, |row| {
        for (key, (&p, &factor)) in row.probabilities.iter().zip(row.factors).enumerate() {
            for d in 0..s.head_dim {
                out[s.merged(row.b, row.query, row.h, d)] += p * factor * qkv[s.packed(row.b, key, 2, row.h, d)];
            }
        }
        lses[(row.b * s.heads + row.h) * s.time + row.query] = row.lse;
    });
    (out, lses)
}

/// dqkv (B, T, 3C) of [`attention`].
pub fn attention_backward(dout: &[f64], qkv: &[f64], s: AttentionShape, dropout: Dropout) -> Vec<f64> {
    let mut dqkv = vec![0.0; qkv.len()];
    let scale = 1.0 / (s.head_dim as f64).sqrt();
    for_each_row(qkv, s, dropout, |row| {
        let (b, h, query) = (row.b, row.h, row.query);
        for (key, ds) in row.score_gradients(dout, qkv, s).into_iter().enumerate() {
            let ds = ds * scale;
            for d in 0..s.head_dim {
                let go = dout[s.merged(b, query, h, d)];
                dqkv[s.packed(b, key, 2, h, d)] += row.probabilities[key] * row.factors[key] * go;
                dqkv[s.packed(b, query, 0, h, d)] += ds * qkv[s.packed(b, key, 1, h, d)];
                dqkv[s.packed(b, key, 1, h, d)] += ds * qkv[s.packed(b, query, 0, h, d)];
            }
        }
    });
    dqkv
}

/// The gradients of [`attention`]'s scaled scores, transposed: dSᵀ (B, H, T keys, T queries), 0 for the future.
pub fn score_gradients(dout: &[f64], qkv: &[f64], s: AttentionShape, dropout: Dropout) -> Vec<f64> {
    let mut gradients = vec![0.0; s.batch * s.heads * s.time * s.time];
    for_each_row(qkv, s, dropout, |row| {
        for (key, ds) in row.score_gradients(dout, qkv, s).into_iter().enumerate() {
            gradients[((row.b * s.heads + row.h) * s.time + key) * s.time + row.query] = ds;
        }
    });
    gradients
}

/// One query's row of the score matrix.
struct Row<'a> {
    b: usize,
    h: usize,
    query: usize,
    probabilities: &'a [f64],
    factors: &'a [f64],
    lse: f64,
}

impl Row<'_> {
    /// out = Σ p factor v, with p = softmax(s)  =>  dp = factor dout · v, ds = p (dp - Σ dp p); one for each key up to the query.
    fn score_gradients(&self, dout: &[f64], qkv: &[f64], s: AttentionShape) -> Vec<f64> {
        let product = |key: usize, d: usize| {
            dout[s.merged(self.b, self.query, self.h, d)] * qkv[s.packed(self.b, key, 2, self.h, d)]
        };
        let dp: Vec<f64> = (0..=self.query)
            .map(|key| self.factors[key] * (0..s.head_dim).map(|d| product(key, d)).sum::<f64>())
            .collect();
        let sum: f64 = dp.iter().zip(self.probabilities).map(|(dp, p)| dp * p).sum();
        dp.iter().zip(self.probabilities).map(|(dp, p)| p * (dp - sum)).collect()
    }
}

fn for_each_row(qkv: &[f64], s: AttentionShape, dropout: Dropout, mut visit: impl FnMut(Row)) {
    let rows = s.batch * s.heads * s.time;
    let mask = mask(rows, s.time, dropout);
    for b in 0..s.batch {
        for h in 0..s.heads {
            for query in 0..s.time {
                let scores: Vec<f64> = (0..=query)
                    .map(|key| {
                        let dot: f64 = (0..s.head_dim)
                            .map(|d| qkv[s.packed(b, query, 0, h, d)] * qkv[s.packed(b, key, 1, h, d)])
                            .sum();
                        dot / (s.head_dim as f64).sqrt()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|v| (v - max).exp()).sum();
                let probabilities: Vec<f64> = scores.iter().map(|v| (v - max).exp() / sum).collect();
                let row = (b * s.heads + h) * s.time + query;
                let factors = &mask[row * s.time..][..query + 1];
                visit(Row { b, h, query, probabilities: &probabilities, factors, lse: max + sum.ln() });
            }
        }
    }
}

/// (loss, dlogits) of one row of logits against its target, zeros where that is negative.
pub fn row_of_cross_entropy(logits: &[f64], target: i32) -> (f64, Vec<f64>) {
    let Ok(target) = usize::try_from(target) else {
        return (0.0, vec![0.0; logits.len()]);
    };
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
    let onehot = |o| if o == target { 1.0 } else { 0.0 };
    let dlogits = logits.iter().enumerate().map(|(o, l)| (l - max).exp() / sum - onehot(o)).collect();
    (max + sum.ln() - logits[target], dlogits)
}

/// (loss, dx, dw) of the mean cross-entropy of x (rows, c) wᵀ (v, c) against targets, negative ones ignored.
pub fn cross_entropy(x: &[f64], w: &[f64], targets: &[i32], c: usize, v: usize) -> (f64, Vec<f64>, Vec<f64>) {
    let count = targets.iter().filter(|&&t| t >= 0).count().max(1) as f64;
    let (mut loss, mut dx, mut dw) = (0.0, vec![0.0; x.len()], vec![0.0; w.len()]);
    for (r, &target) in targets.iter().enumerate().filter(|(_, t)| **t >= 0) {
        let row = &x[r * c..][..c];
        let logits: Vec<f64> = (0..v).map(|o| row.iter().zip(&w[o * c..][..c]).map(|(a, b)| a * b).sum()).collect();
        let (row_loss, dlogits) = row_of_cross_entropy(&logits, target);
        loss += row_loss / count;
        for (o, d) in dlogits.into_iter().enumerate() {
            let d = d / count;
            for i in 0..c {
                dx[r * c + i] += d * w[o * c + i];
                dw[o * c + i] += d * row[i];
            }
        }
    }
    (loss, dx, dw)
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn a_wrong_value_a_nan_and_a_missing_element_are_far() {
        assert_eq!(distance(&[3.0, -4.0], &[3.0, -4.0]), 0.0);
        assert!((distance(&[1.1, 1.0], &[1.0, 1.0]) - 0.05).abs() < 1e-12);
        assert_eq!(distance(&[f64::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(distance(&[1.0], &[1.0, 1.0]), f64::INFINITY);
    }
}
