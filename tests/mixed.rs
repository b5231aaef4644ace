//! Half blocks of f32 that store what only products read in f16: the same to the bit where products round to it, and as near as that
//! where they do not. The choice of kernels is the process's, so this file has one test.

mod common;

use burn::tensor::{Device, Tensor};
use common::*;
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::ops::block::{Layer, Parameters, attention_block, mlp_block};
use gpt_wgpu::ops::cast::{all_as_multiplied, to_f16};
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::ops::linear::Gelu;

const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc, step: 7, site: 0x105 };

/// A half block of random numbers.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    time: usize,
    heads: usize,
    head_dim: usize,
    /// Attention's, else the MLP's.
    is_attention: bool,
    has_bias: bool,
    dropout: Dropout,
}

/// y and its gradients with respect to x, the weights, the norm and, where there are biases, these.
fn run(case: Case, device: &Device, is_rounded: bool) -> Vec<Vec<f64>> {
    let Case { batch, time, heads, head_dim, is_attention, has_bias, dropout } = case;
    let c = heads * head_dim;
    let (inner, outer) = if is_attention { (3 * c, c) } else { (4 * c, 4 * c) };
    let mut random = Random((time * 31 + head_dim) as u64);
    let autodiff = device.clone().autodiff();
    let mut leaf = |rows: usize, columns: usize, scale: f64| {
        let values: Vec<f64> = random.vec(rows * columns).iter().map(|v| v * scale).collect();
        tensor(&values, [rows, columns], &autodiff).require_grad()
    };
    let x = leaf(batch * time, c, 1.0);
    let (w_in, w_out) = (leaf(inner, c, (c as f64).powf(-0.5)), leaf(c, outer, (outer as f64).powf(-0.5)));
    let vectors = [c, c, inner, c].map(|count| leaf(1, count, 1.0));
    // As small as gradients of a mean are: of what attention makes of them, f16 alone would have little left.
    let dy = leaf(batch * time, c, 1e-4).detach().reshape([batch, time, c]);
    let [norm, b_norm, b_in, b_out] = vectors.each_ref().map(|v| v.clone().reshape([v.dims()[1]]));
    let bias = |b: Tensor<1>| has_bias.then_some(b);
    let layer = |weight: &Tensor<2>, b| Layer {
        weight: weight.clone(),
        rounded: is_rounded.then(|| to_f16(weight.clone().inner())),
        bias: bias(b),
    };
    let parameters = Parameters { norm: (norm, bias(b_norm)), inner: layer(&w_in, b_in), outer: layer(&w_out, b_out) };
    let input = x.clone().reshape([batch, time, c]);
    let y = if is_attention {
        attention_block(input, parameters, heads, [dropout, dropout.at(8)])
    } else {
        mlp_block(input, parameters, Gelu::Erf, dropout)
    };
    let grads = (y.clone() * dy).sum().backward();
    let biases = if has_bias { &vectors[1..] } else { &[] };
    let leaves = [&x, &w_in, &w_out, &vectors[0]].into_iter().chain(biases);
    let gradients: Vec<_> = leaves.map(|leaf| values(leaf.grad(&grads).unwrap())).collect();
    [vec![values(y.inner())], gradients].concat()
}

#[test]
fn what_only_products_read_is_stored_as_they_round_it() {
    kernel::choose(Kernels::Coop);
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let weights = [tensor::<2>(&[1.0], [1, 1], &device)];
    let rounds = all_as_multiplied(weights).count() > 0;
    if !rounds {
        eprintln!("SKIPPED to the bit: the adapter's products do not round f32 to f16");
    }
    // Whole tiles; ragged ones of eight; rows of any length, and a head that has no kernel.
    for (batch, time, heads, head_dim) in [(2, 64, 2, 64), (3, 41, 1, 80), (2, 9, 3, 5)] {
        for (is_attention, has_bias, dropout) in
            [(true, false, DROPOUT), (true, true, Dropout::OFF), (false, false, Dropout::OFF), (false, true, DROPOUT)]
        {
            let case = Case { batch, time, heads, head_dim, is_attention, has_bias, dropout };
            let [whole, rounded] = [false, true].map(|is_rounded| run(case, &device, is_rounded));
            assert_eq!(whole.len(), rounded.len());
            for (i, (whole, rounded)) in whole.iter().zip(&rounded).enumerate() {
                let what = format!("{case:?}, result {i}");
                assert!(rounded.iter().any(|v| *v != 0.0), "{what}: all zeros");
                // The last two are the biases' of the products, sums of what is rounded; and composed attention does not round.
                if rounds && i < 6 && !(is_attention && head_dim == 5) {
                    assert_eq!(whole, rounded, "{what}");
                } else {
                    let distance = twins::distance(rounded, whole);
                    assert!(distance < 2e-2, "{what}: {distance}");
                }
            }
        }
    }
}
