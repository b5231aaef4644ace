//! Every operation on every device present against the f64 twins, value and gradient; the twins' backward against central
//! differences; and each comparer against a wrong result.

mod common;

use burn::tensor::{Device, Tensor};
use common::twins::{self, AttentionShape, EmbeddingShape};
use common::*;
use gpt_wgpu::kernel::clock;
use gpt_wgpu::ops::attention::causal_attention;
use gpt_wgpu::ops::block::{Layer, Parameters, attention_block, mlp_block};
use gpt_wgpu::ops::cross_entropy::cross_entropy;
use gpt_wgpu::ops::dropout::{Dropout, dropout};
use gpt_wgpu::ops::embedding::embedding;
use gpt_wgpu::ops::layer_norm::layer_norm;
use gpt_wgpu::ops::linear::{Gelu, linear, linear_gelu, linear_residual};

const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc, step: 7, site: 0x105 };

/// f32 against f64 over sums of a few hundred terms.
const TOLERANCE: f64 = 2e-5;

#[test]
fn the_comparer_fails_on_a_wrong_value_a_nan_and_a_missing_element() {
    assert!(difference(&[1.0, 2.0], &[1.0, 2.0], 1e-5).is_none());
    assert!(difference(&[1.0, 2.1], &[1.0, 2.0], 1e-5).is_some());
    assert!(difference(&[1.0, f64::NAN], &[1.0, 2.0], 1e-5).is_some());
    assert!(difference(&[1.0], &[1.0, 2.0], 1e-5).is_some());
}

/// A leaf that wants a gradient.
fn leaf<const D: usize>(values: &[f64], shape: [usize; D], device: &Device) -> Tensor<D> {
    tensor(values, shape, &device.clone().autodiff()).require_grad()
}

/// Gradients of Σ y · cotangent with respect to each leaf; the cotangent is random so that no error cancels.
fn backward<const D: usize>(y: Tensor<D>, cotangent: &[f64], device: &Device) -> burn::tensor::Gradients {
    let shape = y.dims();
    let cotangent = tensor(cotangent, shape, &device.clone().autodiff());
    (y * cotangent).sum().backward()
}

#[test]
fn linear_and_its_epilogues() {
    for (name, device) in devices() {
        for (rows, k, n) in [(1, 1, 1), (2, 3, 5), (7, 16, 48), (33, 17, 31), (64, 64, 65)] {
            let mut random = Random(rows as u64 * 31 + 1);
            let (x, w) = (random.vec(rows * k), random.vec(n * k));
            let (b, r, dy) = (random.vec(n), random.vec(rows * n), random.vec(rows * n));
            let what = |part: &str| format!("{name} ({rows}, {k}, {n}) {part}");
            let h = twins::linear(&x, &w, Some(&b), rows, k, n);

            for gelu in [None, Some(Gelu::Erf), Some(Gelu::Tanh)] {
                let (xt, wt, bt) = (leaf(&x, [rows, k], &device), leaf(&w, [n, k], &device), leaf(&b, [n], &device));
                let (y, want, dh): (_, Vec<f64>, Vec<f64>) = match gelu {
                    None => (linear(xt.clone(), wt.clone(), Some(bt.clone())), h.clone(), dy.clone()),
                    Some(kind) => (
                        linear_gelu(xt.clone(), wt.clone(), Some(bt.clone()), kind),
                        h.iter().map(|&h| twins::gelu(h, kind)).collect(),
                        h.iter().zip(&dy).map(|(&h, dy)| dy * twins::gelu_slope(h, kind)).collect(),
                    ),
                };
                assert_close_tensor(&what("y"), y.clone().inner(), &want, TOLERANCE);
                let grads = backward(y, &dy, &device);
                let [dx, dw, db] = twins::linear_backward(&dh, &x, &w, rows, k, n);
                assert_close_tensor(&what("dx"), xt.grad(&grads).unwrap(), &dx, TOLERANCE);
                assert_close_tensor(&what("dw"), wt.grad(&grads).unwrap(), &dw, TOLERANCE);
                assert_close_tensor(&what("db"), bt.grad(&grads).unwrap(), &db, TOLERANCE);
            }

            let (xt, wt, rt) = (leaf(&x, [rows, k], &device), leaf(&w, [n, k], &device), leaf(&r, [rows, n], &device));
            let y = linear_residual(xt.clone(), wt.clone(), None, rt.clone(), DROPOUT);
            let factors: Vec<f64> = DROPOUT.factors(rows, n).into_iter().map(f64::from).collect();
            let product = twins::linear(&x, &w, None, rows, k, n);
            let want: Vec<f64> = (0..rows * n).map(|i| r[i] + product[i] * factors[i]).collect();
            assert_close_tensor(&what("residual y"), y.clone().inner(), &want, TOLERANCE);
            let grads = backward(y, &dy, &device);
            let dh: Vec<f64> = dy.iter().zip(&factors).map(|(d, f)| d * f).collect();
            let [dx, dw, _] = twins::linear_backward(&dh, &x, &w, rows, k, n);
            assert_close_tensor(&what("residual dx"), xt.grad(&grads).unwrap(), &dx, TOLERANCE);
            assert_close_tensor(&what("residual dw"), wt.grad(&grads).unwrap(), &dw, TOLERANCE);
            assert_close_tensor(&what("residual dr"), rt.grad(&grads).unwrap(), &dy, TOLERANCE);
        }
    }
}

#[test]
fn layer_norm_with_and_without_bias() {
    for (name, device) in devices() {
        for (rows, c) in [(1, 2), (3, 7), (5, 64), (33, 129)] {
            let mut random = Random(c as u64);
            let (x, w, b, dy) = (random.vec(rows * c), random.vec(c), random.vec(c), random.vec(rows * c));
            for bias in [true, false] {
                let what = |part: &str| format!("{name} ({rows}, {c}) bias {bias} {part}");
                let (xt, wt) = (leaf(&x, [rows, c], &device), leaf(&w, [c], &device));
                let bt = bias.then(|| leaf(&b, [c], &device));
                let y = layer_norm(xt.clone(), wt.clone(), bt.clone());
                let (want, _, _) = twins::layer_norm(&x, &w, bias.then_some(&b[..]), c);
                assert_close_tensor(&what("y"), y.clone().inner(), &want, TOLERANCE);
                let grads = backward(y, &dy, &device);
                let [dx, dw, db] = twins::layer_norm_backward(&dy, &x, &w, c);
                assert_close_tensor(&what("dx"), xt.grad(&grads).unwrap(), &dx, 1e-4);
                assert_close_tensor(&what("dw"), wt.grad(&grads).unwrap(), &dw, TOLERANCE);
                if let Some(bt) = bt {
                    assert_close_tensor(&what("db"), bt.grad(&grads).unwrap(), &db, TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn attention_forward_and_backward() {
    let shape = |batch, time, heads, head_dim| AttentionShape { batch, time, heads, head_dim };
    for (name, device) in devices() {
        for s in [shape(1, 1, 1, 4), shape(2, 2, 3, 8), shape(3, 7, 2, 16), shape(1, 33, 3, 32), shape(1, 65, 1, 64)] {
            for dropout in [Dropout::OFF, DROPOUT] {
                let what = |part: &str| format!("{name} {s:?} dropout {} {part}", dropout.is_on());
                let mut random = Random(s.time as u64 + 5);
                let dims = [s.batch, s.time, 3 * s.channels()];
                let qkv = random.vec(dims.iter().product());
                let dout = random.vec(s.batch * s.time * s.channels());
                let leaf = leaf(&qkv, dims, &device);
                let out = causal_attention(leaf.clone(), s.heads, dropout);
                let (want, _) = twins::attention(&qkv, s, dropout);
                assert_close_tensor(&what("out"), out.clone().inner(), &want, TOLERANCE);
                let grads = backward(out, &dout, &device);
                let dqkv = twins::attention_backward(&dout, &qkv, s, dropout);
                assert_close_tensor(&what("dqkv"), leaf.grad(&grads).unwrap(), &dqkv, TOLERANCE);
            }
        }
    }
}

#[test]
fn attention_never_sees_the_future() {
    let (time, heads, head_dim) = (19, 2, 8);
    let width = 3 * heads * head_dim;
    for (name, device) in devices() {
        let mut random = Random(3);
        let qkv = random.vec(time * width);
        let run = |qkv: &[f64]| values(causal_attention(tensor(qkv, [1, time, width], &device), heads, Dropout::OFF));
        let before = run(&qkv);
        let changed_token = 11;
        let mut changed = qkv.clone();
        changed[changed_token * width..(changed_token + 1) * width].iter_mut().for_each(|v| *v += 3.0);
        let after = run(&changed);
        let first = changed_token * heads * head_dim;
        assert_eq!(before[..first], after[..first], "{name}: an output before the change moved");
        assert_ne!(before[first..], after[first..], "{name}: nothing moved at all");
    }
}

#[test]
fn the_mask_of_dropout_is_equal_on_all_devices_and_keeps_the_right_share() {
    let (rows, columns) = (301, 67); // columns not a multiple of four
    let want: Vec<f64> = DROPOUT.factors(rows, columns).into_iter().map(f64::from).collect();
    for (name, device) in devices() {
        let ones = vec![1.0; rows * columns];
        // Wherever the clock stands that a kernel counts from
        for now in [0, DROPOUT.step, 1000, u32::MAX] {
            clock::set_step(now);
            let got = values(dropout(tensor(&ones, [rows, columns], &device), DROPOUT));
            assert_eq!(got, want, "{name}, clock {now}");
        }
    }
    let count = (rows * columns) as f64;
    let kept = want.iter().filter(|f| **f > 0.0).count() as f64;
    let p = f64::from(DROPOUT.probability);
    let sigma = (count * p * (1.0 - p)).sqrt();
    assert!((kept - count * (1.0 - p)).abs() < 4.0 * sigma, "{kept} of {count} kept");
    for other in [DROPOUT.at(1), Dropout { step: 8, ..DROPOUT }, Dropout { seed: 1, ..DROPOUT }] {
        assert_ne!(DROPOUT.factors(4, 64), other.factors(4, 64));
    }
}

/// Half a block is one node of the graph, and gives what its operations give one by one.
#[test]
fn half_blocks_are_their_operations() {
    let (batch, time, c, heads) = (2, 5, 32, 2);
    for (name, device) in devices() {
        for (attention, biases) in
            [(false, [false; 3]), (false, [true; 3]), (true, [true; 3]), (true, [true, false, false])]
        {
            let mut random = Random(21);
            let inner = if attention { 3 * c } else { 4 * c };
            let outer = if attention { c } else { 4 * c };
            let x = random.vec(batch * time * c);
            let dy = random.vec(batch * time * c);
            let matrices =
                [(inner, c), (c, outer)].map(|(rows, columns)| (random.vec(rows * columns), [rows, columns]));
            let vectors = [c, c, inner, c].map(|count| random.vec(count));
            let run = |whole: bool| {
                let x = leaf(&x, [batch, time, c], &device);
                let [w_in, w_out] = matrices.each_ref().map(|(values, shape)| leaf(values, *shape, &device));
                let [norm, b_norm, b_in, b_out] =
                    vectors.each_ref().map(|values| leaf::<1>(values, [values.len()], &device));
                let [with_norm, with_in, with_out] = biases;
                let keep = |with: bool, b: &Tensor<1>| with.then(|| b.clone());
                let (bn, bi, bo) = (keep(with_norm, &b_norm), keep(with_in, &b_in), keep(with_out, &b_out));
                let y = if whole {
                    let norm = (norm.clone(), bn);
                    let layer = |weight: &Tensor<2>, bias| Layer { weight: weight.clone(), rounded: None, bias };
                    let parameters = Parameters { norm, inner: layer(&w_in, bi), outer: layer(&w_out, bo) };
                    if attention {
                        attention_block(x.clone(), parameters, heads, [DROPOUT.at(3), DROPOUT.at(4)])
                    } else {
                        mlp_block(x.clone(), parameters, Gelu::Erf, DROPOUT.at(4))
                    }
                } else {
                    let normed = layer_norm(x.clone(), norm.clone(), bn);
                    let hidden = if attention {
                        causal_attention(linear(normed, w_in.clone(), bi), heads, DROPOUT.at(3))
                    } else {
                        linear_gelu(normed, w_in.clone(), bi, Gelu::Erf)
                    };
                    linear_residual(hidden, w_out.clone(), bo, x.clone(), DROPOUT.at(4))
                };
                let value = values(y.clone().inner());
                let grads = backward(y, &dy, &device);
                let mut found = vec![value, values(x.grad(&grads).unwrap())];
                found.extend([&w_in, &w_out].map(|w| values(w.grad(&grads).unwrap())));
                let vectors = [(true, &norm), (with_norm, &b_norm), (with_in, &b_in), (with_out, &b_out)];
                found.extend(
                    vectors.into_iter().filter(|(with, _)| *with).map(|(_, v)| values(v.grad(&grads).unwrap())),
                );
                found
            };
            let (whole, apart) = (run(true), run(false));
            assert_eq!(whole.len(), apart.len());
            for (i, (whole, apart)) in whole.iter().zip(&apart).enumerate() {
                let what = format!("{name}, attention {attention}, biases {biases:?}, result {i}");
                assert_close(&what, whole, apart, TOLERANCE);
            }
        }
    }
}

#[test]
fn embedding_sums_and_scatters() {
    let (batch, time, vocab, block_size, c) = (3, 5, 11, 8, 6);
    for (name, device) in devices() {
        let mut random = Random(9);
        let (wte, wpe) = (random.vec(vocab * c), random.vec(block_size * c));
        let dx = random.vec(batch * time * c);
        let mut tokens: Vec<i32> = (0..batch * time).map(|_| random.below(vocab) as i32).collect();
        tokens[1] = tokens[0]; // a token that occurs twice: its gradients add
        let (tt, pt) = (leaf(&wte, [vocab, c], &device), leaf(&wpe, [block_size, c], &device));
        let ids = int_tensor(&tokens, [batch, time], &device.clone().autodiff());
        let x = embedding(ids, tt.clone(), pt.clone(), DROPOUT, false);
        let s = EmbeddingShape { time, vocab, block_size, channels: c };
        let want = twins::embedding(&tokens, &wte, &wpe, s, DROPOUT);
        let [dwte, dwpe] = twins::embedding_backward(&dx, &tokens, s, DROPOUT);
        assert_close_tensor(&format!("{name} x"), x.clone().inner(), &want, TOLERANCE);
        let grads = backward(x, &dx, &device);
        assert_close_tensor(&format!("{name} dwte"), tt.grad(&grads).unwrap(), &dwte, TOLERANCE);
        assert_close_tensor(&format!("{name} dwpe"), pt.grad(&grads).unwrap(), &dwpe, TOLERANCE);
    }
}

#[test]
fn cross_entropy_with_ignored_targets_and_several_chunks() {
    for (name, device) in devices() {
        // The last shape has more logits than one chunk holds.
        for (batch, time, c, v) in [(1, 1, 3, 2), (2, 7, 16, 13), (3, 700, 2, 8192)] {
            let mut random = Random(v as u64);
            let (x, w) = (random.vec(batch * time * c), random.vec(v * c));
            let mut targets: Vec<i32> = (0..batch * time).map(|_| random.below(v) as i32).collect();
            if time > 1 {
                targets[1] = -1;
            }
            let (xt, wt) = (leaf(&x, [batch, time, c], &device), leaf(&w, [v, c], &device));
            let ids = int_tensor(&targets, [batch, time], &device.clone().autodiff());
            let loss = cross_entropy(xt.clone(), wt.clone(), ids.clone());
            let (want, dx, dw) = twins::cross_entropy(&x, &w, &targets, c, v);
            let what = |part: &str| format!("{name} ({batch}, {time}, {c}, {v}) {part}");
            assert_close_tensor(&what("loss"), loss.clone().inner(), &[want], TOLERANCE);
            let inference = cross_entropy(xt.clone().inner(), wt.clone().inner(), ids.inner());
            assert_close_tensor(&what("loss without gradients"), inference, &[want], TOLERANCE);
            let grads = (loss * 0.5).backward();
            let half = |d: &[f64]| d.iter().map(|v| v * 0.5).collect::<Vec<_>>();
            assert_close_tensor(&what("dx"), xt.grad(&grads).unwrap(), &half(&dx), TOLERANCE);
            assert_close_tensor(&what("dw"), wt.grad(&grads).unwrap(), &half(&dw), TOLERANCE);
        }
    }
}

/// The twins' own gradients against central differences of their forward.
#[test]
fn the_twins_agree_with_central_differences() {
    let step = 1e-5;
    let check = |what: &str, f: &dyn Fn(&[f64]) -> f64, at: &[f64], gradient: &[f64]| {
        let numeric: Vec<f64> = (0..at.len())
            .map(|i| {
                let mut moved = at.to_vec();
                moved[i] = at[i] + step;
                let up = f(&moved);
                moved[i] = at[i] - step;
                (up - f(&moved)) / (2.0 * step)
            })
            .collect();
        assert_close(what, gradient, &numeric, 1e-7);
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut random = Random(77);

    let s = AttentionShape { batch: 2, time: 5, heads: 2, head_dim: 3 };
    let qkv = random.vec(s.batch * s.time * 3 * s.channels());
    let dout = random.vec(s.batch * s.time * s.channels());
    for dropout in [Dropout::OFF, DROPOUT] {
        let gradient = twins::attention_backward(&dout, &qkv, s, dropout);
        check("attention", &|qkv| dot(&twins::attention(qkv, s, dropout).0, &dout), &qkv, &gradient);
    }

    let (x, w, dy) = (random.vec(3 * 4), random.vec(4), random.vec(3 * 4));
    let [dx, dw, _] = twins::layer_norm_backward(&dy, &x, &w, 4);
    check("layer_norm dx", &|x| dot(&twins::layer_norm(x, &w, None, 4).0, &dy), &x, &dx);
    check("layer_norm dw", &|w| dot(&twins::layer_norm(&x, w, None, 4).0, &dy), &w, &dw);

    let s = EmbeddingShape { time: 3, vocab: 4, block_size: 5, channels: 3 };
    let (wte, wpe, dx, tokens) = (random.vec(4 * 3), random.vec(5 * 3), random.vec(6 * 3), [1, 3, 1, 0, 1, 1]);
    let [dwte, dwpe] = twins::embedding_backward(&dx, &tokens, s, DROPOUT);
    check("embedding dwte", &|wte| dot(&twins::embedding(&tokens, wte, &wpe, s, DROPOUT), &dx), &wte, &dwte);
    check("embedding dwpe", &|wpe| dot(&twins::embedding(&tokens, &wte, wpe, s, DROPOUT), &dx), &wpe, &dwpe);

    let (x, w, targets) = (random.vec(3 * 4), random.vec(5 * 4), [1, -1, 4]);
    let (_, dx, dw) = twins::cross_entropy(&x, &w, &targets, 4, 5);
    check("cross_entropy dx", &|x| twins::cross_entropy(x, &w, &targets, 4, 5).0, &x, &dx);
    check("cross_entropy dw", &|w| twins::cross_entropy(&x, w, &targets, 4, 5).0, &w, &dw);

    let (x, w, dy) = (random.vec(3 * 4), random.vec(5 * 4), random.vec(3 * 5));
    let [dx, dw, _] = twins::linear_backward(&dy, &x, &w, 3, 4, 5);
    check("linear dx", &|x| dot(&twins::linear(x, &w, None, 3, 4, 5), &dy), &x, &dx);
    check("linear dw", &|w| dot(&twins::linear(&x, w, None, 3, 4, 5), &dy), &w, &dw);
}
