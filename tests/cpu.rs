//! The CPU's fused loops at their edges: against the f64 twins, against Burn's primitives, and with any number of threads.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Tensor};
use common::twins::{self, AttentionShape};
use common::*;
use gpt_wgpu::checkpoint::read;
use gpt_wgpu::config::Config;
use gpt_wgpu::data::Batch;
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::model::Gpt;
use gpt_wgpu::ops::attention::causal_attention;
use gpt_wgpu::ops::cross_entropy::cross_entropy;
use gpt_wgpu::ops::dropout::{Dropout, dropout};
use gpt_wgpu::ops::layer_norm::layer_norm;
use gpt_wgpu::ops::linear::{Gelu, linear, linear_gelu, linear_residual};
use gpt_wgpu::optim::Optimizer;
use gpt_wgpu::parameters::{self, Visit};
use gpt_wgpu::step::Step;

const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc, step: 7, site: 0x105 };

/// f32 against f64 over sums of a few hundred terms.
const TOLERANCE: f64 = 2e-5;

/// The choice of kernels is the process's, so the tests take turns.
fn with(kernels: Kernels) -> MutexGuard<'static, ()> {
    static CHOICE: Mutex<()> = Mutex::new(());
    let turn = CHOICE.lock().unwrap_or_else(PoisonError::into_inner);
    kernel::choose(kernels);
    turn
}

fn leaf<const D: usize>(values: &[f64], shape: [usize; D]) -> Tensor<D> {
    tensor(values, shape, &Device::flex().autodiff()).require_grad()
}

/// Gradients of Σ y · cotangent.
fn backward<const D: usize>(y: Tensor<D>, cotangent: &[f64]) -> burn::tensor::Gradients {
    let shape = y.dims();
    (y * tensor(cotangent, shape, &Device::flex().autodiff())).sum().backward()
}

#[test]
fn attention_around_its_blocks_of_queries() {
    let _turn = with(Kernels::Auto);
    for (time, head_dim) in [(1, 1), (31, 3), (33, 8), (64, 32), (65, 40), (128, 16), (257, 24)] {
        for dropout in [Dropout::OFF, DROPOUT] {
            let s = AttentionShape { batch: 2, time, heads: 3, head_dim };
            let what = |part: &str| format!("{s:?} dropout {} {part}", dropout.is_on());
            let mut random = Random(time as u64);
            let dims = [s.batch, time, 3 * s.channels()];
            let qkv = random.vec(dims.iter().product());
            let dout = random.vec(s.batch * time * s.channels());
            let leaf = leaf(&qkv, dims);
            let out = causal_attention(leaf.clone(), s.heads, dropout);
            assert_close_tensor(&what("out"), out.clone().inner(), &twins::attention(&qkv, s, dropout).0, TOLERANCE);
            let want = twins::attention_backward(&dout, &qkv, s, dropout);
            assert_close_tensor(&what("dqkv"), leaf.grad(&backward(out, &dout)).unwrap(), &want, TOLERANCE);
        }
    }
}

/// Scores of some hundred: the softmax is nearly one-hot, and a maximum taken wrongly overflows.
#[test]
fn attention_with_large_scores() {
    let _turn = with(Kernels::Auto);
    let s = AttentionShape { batch: 1, time: 67, heads: 2, head_dim: 16 };
    let mut qkv = Random(5).vec(s.time * 3 * s.channels());
    for token in qkv.chunks_mut(3 * s.channels()) {
        token[..2 * s.channels()].iter_mut().for_each(|v| *v *= 16.0);
    }
    let out = causal_attention(leaf(&qkv, [1, s.time, 3 * s.channels()]), s.heads, Dropout::OFF);
    assert_close_tensor("out", out.inner(), &twins::attention(&qkv, s, Dropout::OFF).0, 1e-3);
}

#[test]
fn layer_norm_around_its_lanes_and_blocks() {
    let _turn = with(Kernels::Auto);
    for (rows, c) in [(1, 2), (2, 15), (63, 16), (64, 17), (65, 33), (130, 67), (3, 1031)] {
        for bias in [true, false] {
            let what = |part: &str| format!("({rows}, {c}) bias {bias} {part}");
            let mut random = Random(c as u64);
            let (x, w, b, dy) = (random.vec(rows * c), random.vec(c), random.vec(c), random.vec(rows * c));
            let (xt, wt, bt) = (leaf(&x, [rows, c]), leaf(&w, [c]), bias.then(|| leaf(&b, [c])));
            let y = layer_norm(xt.clone(), wt.clone(), bt.clone());
            let (want, _, _) = twins::layer_norm(&x, &w, bias.then_some(&b[..]), c);
            assert_close_tensor(&what("y"), y.clone().inner(), &want, TOLERANCE);
            let grads = backward(y, &dy);
            let [dx, dw, db] = twins::layer_norm_backward(&dy, &x, &w, c);
            // Two elements cancel: their gradient is a small difference.
            assert_close_tensor(&what("dx"), xt.grad(&grads).unwrap(), &dx, if c == 2 { 1e-3 } else { TOLERANCE });
            assert_close_tensor(&what("dw"), wt.grad(&grads).unwrap(), &dw, TOLERANCE);
            if let Some(bt) = bt {
                assert_close_tensor(&what("db"), bt.grad(&grads).unwrap(), &db, TOLERANCE);
            }
        }
    }
}

/// Of values from -14 to 14, in f64 around them: to a few units in the last place of max(1, |h|).
#[test]
fn gelu_and_its_slope_everywhere() {
    let _turn = with(Kernels::Auto);
    let h: Vec<f64> = (-5600..=5600).map(|i| f64::from(i as f32 / 400.0)).collect();
    for kind in [Gelu::Erf, Gelu::Tanh] {
        let (x, one) = (leaf(&h, [h.len(), 1]), leaf(&[1.0], [1, 1]));
        let y = linear_gelu(x.clone(), one, None, kind);
        let want: Vec<f64> = h.iter().map(|&h| twins::gelu(h, kind)).collect();
        assert_close_tensor(&format!("{kind:?}"), y.clone().inner(), &want, 3e-7);
        let want: Vec<f64> = h.iter().map(|&h| twins::gelu_slope(h, kind)).collect();
        assert_close_tensor(&format!("{kind:?} slope"), x.grad(&y.sum().backward()).unwrap(), &want, 1e-6);
    }
}

#[test]
fn dropout_draws_the_definition_s_bits() {
    let _turn = with(Kernels::Auto);
    for (rows, columns) in [(1, 1), (3, 3), (2, 63), (5, 64), (2, 65), (70, 130), (3, 1025)] {
        let ones = tensor(&vec![1.0; rows * columns], [rows, columns], &Device::flex());
        let factors: Vec<f64> = DROPOUT.factors(rows, columns).into_iter().map(f64::from).collect();
        assert_eq!(values(dropout(ones, DROPOUT)), factors, "({rows}, {columns})");
    }
}

/// A view's elements do not stand in their order.
#[test]
fn views_are_read_in_their_order() {
    let _turn = with(Kernels::Auto);
    let (rows, k, n) = (5, 6, 7);
    let mut random = Random(1);
    let (x, w, r) = (random.vec(rows * k), random.vec(n * k), random.vec(rows * n));
    let turned = |values: &[f64], rows: usize, columns: usize| {
        let turned: Vec<f64> = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
        tensor(&turned, [columns, rows], &Device::flex()).transpose()
    };
    let y = linear_residual(turned(&x, rows, k), turned(&w, n, k), None, turned(&r, rows, n), Dropout::OFF);
    let product = twins::linear(&x, &w, None, rows, k, n);
    let want: Vec<f64> = product.iter().zip(&r).map(|(product, r)| product + r).collect();
    assert_close_tensor("turned", y, &want, TOLERANCE);
    let sliced = linear(tensor(&x, [rows, k], &Device::flex()).slice([2..4, 0..k]), turned(&w, n, k), None);
    assert_close_tensor("sliced", sliced, &product[2 * n..4 * n], TOLERANCE);
}

#[test]
fn what_is_no_number_stays_none() {
    let _turn = with(Kernels::Auto);
    let device = Device::flex();
    let mut x = vec![0.5; 40];
    x[21] = f64::NAN;
    let x = |shape| tensor(&x, shape, &device);
    let one = tensor(&[1.0], [1, 1], &device);
    for kind in [Gelu::Erf, Gelu::Tanh] {
        assert!(values(linear_gelu(x([40, 1]), one.clone(), None, kind))[21].is_nan(), "{kind:?}");
    }
    let normed = values(layer_norm(x([2, 20]), tensor(&[1.0; 20], [20], &device), None));
    assert!(!normed[0].is_nan() && normed[20].is_nan());
    // Of a logit that is not the target's, the loss knows by its exponential alone; so do the outputs of a key's score.
    let targets = int_tensor(&[1; 40], [1, 40], &device);
    let loss = |other| {
        let (x, w) = (tensor(&[0.5; 40], [1, 40, 1], &device), tensor(&[other, 2.0], [2, 1], &device));
        values(cross_entropy(x, w, targets.clone()))[0]
    };
    assert!(loss(1.0).is_finite() && loss(f64::NAN).is_nan());
    let mut qkv = vec![0.5; 3 * 3];
    qkv[4] = f64::NAN; // the second token's key
    let out = values(causal_attention(tensor(&qkv, [1, 3, 3], &device), 1, Dropout::OFF));
    assert!(!out[0].is_nan() && out[1].is_nan() && out[2].is_nan(), "{out:?}");
}

/// Values of the parameters, in their order.
#[derive(Default)]
struct Values(Vec<f32>);

impl Visit for Values {
    fn parameter<const D: usize>(&mut self, _: &str, tensor: &Tensor<D>) {
        self.0.extend(read(tensor.clone().inner()).unwrap());
    }
}

/// Losses and parameters of three steps of a model with everything in it, large enough for threads.
fn three_steps() -> Vec<f32> {
    const VOCABULARY: usize = 61;
    let mut config = Config::default();
    (config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size) = (2, 3, 96, 70);
    (config.model.dropout, config.model.bias, config.data.batch_size) = (0.1, true, 5);
    config.data.gradient_accumulation_steps = 2;
    let inner = Device::flex();
    let device = inner.clone().autodiff();
    let batch = |position: u64| {
        let (mut random, count) = (Random(position + 1), config.data.batch_size * config.model.block_size);
        let mut draw = || (0..count).map(|_| random.below(VOCABULARY) as i32).collect();
        Ok(Batch { x: draw(), y: draw() })
    };
    let step = Step { config: &config, device: &device, batch: &batch };
    let mut model = Gpt::init(&config.gpt(VOCABULARY), 7, &device);
    let (mut optimizer, mut position, mut values) = (Optimizer::new(false, &inner), 0, Values::default());
    for _ in 0..3 {
        let (updated, loss_sum) = step.run(model, &mut optimizer, &mut position, 1e-3).unwrap();
        model = updated;
        values.0.extend(read(loss_sum).unwrap());
    }
    parameters::visit(&model, &mut values);
    values.0
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let _turn = with(Kernels::Auto);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(three_steps).into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let alone = run(1);
    for threads in [2, 3, 7] {
        assert!(alone == run(threads), "{threads} threads make other bits");
    }
}

#[test]
fn training_is_that_of_burn_s_primitives() {
    let composed = {
        let _turn = with(Kernels::Composed);
        let steps = three_steps();
        kernel::choose(Kernels::Auto);
        steps
    };
    let _turn = with(Kernels::Auto);
    let ours = three_steps();
    assert!(ours != composed, "the loops did not run");
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
    assert_close("three steps", &wide(ours), &wide(composed), 1e-4);
}
