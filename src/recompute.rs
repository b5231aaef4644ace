//! The loss and the gradients of one micro-step, with the activations kept or computed again.
//!
//! Computed again means in segments: the forward runs without autodiff and keeps each segment's input; the backward takes the
//! segments from last to first, runs each once more with autodiff, and hands the gradient of its input on to the one before. One
//! segment's graph is alive at a time. The arithmetic is that of the whole graph, dropout included, so the gradients are the
//! same to the bit.

use anyhow::{Context, Result};
use burn::module::Module;
use burn::tensor::{Gradients, Int, Tensor};
use serde::{Deserialize, Serialize};

use crate::model::{Gpt, Part, Scale};
use crate::ops::cotangent::cotangent;
use crate::ops::dropout::Dropout;
use crate::optim::GradientSum;

/// What the backward computes again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing: every activation is kept.
    #[default]
    None,
    /// Each half of a block, from its input. Keeps 2 tensors (B, T, C) a block, and half a block's activations at a time.
    AttentionMlp,
    /// Each block, from its input. Keeps 1 tensor (B, T, C) a block, and a block's activations at a time.
    Block,
}

impl Recompute {
    /// Its word in a configuration; none where nothing is computed again.
    pub fn word(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::AttentionMlp => Some("attention_mlp"),
            Self::Block => Some("block"),
        }
    }

    /// What a block is cut into.
    fn parts(self) -> &'static [Part] {
        match self {
            Self::None => &[],
            Self::AttentionMlp => &[Part::Attention, Part::Mlp],
            Self::Block => &[Part::Both],
        }
    }
}

/// Forward and backward of one micro-batch: tokens, targets (B, T) on the model's device. Adds the scaled gradients to `sum` and
/// returns the loss (1), without autodiff and as it is.
///
/// # Errors
/// When the graph gives no gradient of a segment's input, which would be a fault of this program.
pub fn gradients(
    model: &Gpt,
    tokens: Tensor<2, Int>,
    targets: Tensor<2, Int>,
    dropout: Dropout,
    scale: Scale,
    recompute: Recompute,
    sum: &mut GradientSum,
) -> Result<Tensor<1>> {
    let parts = recompute.parts();
    if parts.is_empty() {
        let loss = model.scaled_loss(tokens, targets, dropout, scale);
        sum.add(model, &mut loss.backward());
        return Ok(loss.inner());
    }

    let (last, kept) = forward(&model.valid(), tokens.clone().inner(), dropout, parts);

    let x = Tensor::from_inner(last).require_grad();
    let loss = model.head_loss(x.clone(), targets, Some(scale));
    let mut found = loss.backward();
    let mut dx = input_gradient(x, &mut found)?;
    // The tied weight's second gradient comes from the embedding. Both are one term of the sum, as they are in the whole graph.
    let wte = model.wte.weight.val();
    let head = wte.grad_remove(&mut found).context("the head gave no gradient of wte.weight")?;
    sum.add_part("ln_f", &model.ln_f, &mut found);

    for Segment { block, part, x } in kept.into_iter().rev() {
        let x = Tensor::from_inner(x).require_grad();
        let y = model.block(block, part, x.clone(), dropout);
        let mut found = cotangent(y, dx).backward();
        dx = input_gradient(x, &mut found)?;
        sum.add_part(&format!("h.{block}"), &model.h[block], &mut found);
    }

    let mut found = cotangent(model.embed(tokens, dropout), dx).backward();
    let embedding = wte.grad_remove(&mut found).context("the embedding gave no gradient of wte.weight")?;
    wte.grad_replace(&mut found, embedding + head);
    sum.add_part("wte", &model.wte, &mut found);
    sum.add_part("wpe", &model.wpe, &mut found);
    Ok(loss.inner())
}

/// One step of the forward, to be taken again.
struct Segment {
    block: usize,
    part: Part,
    /// Its input (B, T, C), without autodiff.
    x: Tensor<3>,
}

/// The last block's output (B, T, C) for tokens (B, T), and what the backward needs to compute the rest again; no autodiff.
fn forward(model: &Gpt, tokens: Tensor<2, Int>, dropout: Dropout, parts: &[Part]) -> (Tensor<3>, Vec<Segment>) {
    let mut x = model.embed(tokens, dropout);
    let mut kept = Vec::with_capacity(model.h.len() * parts.len());
    for block in 0..model.h.len() {
        for &part in parts {
            let y = model.block(block, part, x.clone(), dropout);
            kept.push(Segment { block, part, x });
            x = y;
        }
    }
    (x, kept)
}

/// Takes the gradient of `x`, and drops `x`.
fn input_gradient(x: Tensor<3>, found: &mut Gradients) -> Result<Tensor<3>> {
    x.grad_remove(found).context("a segment gave no gradient of its input")
}
