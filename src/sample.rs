//! Text from a model: one token at a time, with temperature and top-k, reproducible by its seed.

use anyhow::{Result, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::checkpoint::read;
use crate::model::Gpt;
use crate::rng;

/// How the next token is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only this many of the most likely tokens are drawn from; 0 is all.
    pub top_k: usize,
    /// The seed of the draws.
    pub seed: u64,
}

/// Continues `prompt` by `count` tokens and hands each to `on_token` as it comes; stops early when that returns false.
///
/// The context is the last `block_size` tokens, as in nanoGPT. An empty prompt is refused: a GPT predicts from something.
///
/// # Errors
/// When the prompt is empty or holds a token the model does not have, when the vocabulary is larger than tokens can tell apart,
/// when the logits are no numbers, or the device fails.
pub fn generate(
    model: &Gpt,
    prompt: &[u16],
    count: usize,
    sampling: Sampling,
    device: &Device,
    mut on_token: impl FnMut(u16) -> bool,
) -> Result<()> {
    ensure!(!prompt.is_empty(), "the prompt is empty; give at least one character");
    let vocab = model.config.vocab_size;
    ensure!(vocab <= 1 << 16, "the model's vocabulary has {vocab} tokens, and text is made of at most 65536");
    if let Some(token) = prompt.iter().find(|&&t| usize::from(t) >= vocab) {
        anyhow::bail!("token {token} of the prompt is outside the model's vocabulary of {vocab}");
    }
    let mut stream = rng::Stream::new(sampling.seed, rng::site::SAMPLE);
    let mut tokens = prompt.to_vec();
    let model = model.rounded();
    for _ in 0..count {
        let start = tokens.len().saturating_sub(model.config.block_size);
        let window: Vec<i32> = tokens[start..].iter().map(|&t| i32::from(t)).collect();
        let shape = [1, window.len()];
        let window = Tensor::<2, Int>::from_data(TensorData::new(window, shape), device);
        let logits = read(model.last_logits(window))?;
        ensure!(
            logits.iter().all(|logit| logit.is_finite()),
            "the model's logits are no numbers: its weights are damaged, or its training diverged"
        );
        let token = draw(&logits, sampling, stream.next_f64()) as u16;
        tokens.push(token);
        if !on_token(token) {
            break;
        }
    }
    Ok(())
}

/// The index drawn from softmax(logits / temperature) among the top k, by `uniform` in [0, 1).
fn draw(logits: &[f32], sampling: Sampling, uniform: f64) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.temperature <= 0.0 {
        return order.first().copied().unwrap_or(0);
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let max = order.first().map_or(0.0, |&i| f64::from(logits[i]));
    let weights: Vec<f64> =
        order.iter().map(|&i| ((f64::from(logits[i]) - max) / sampling.temperature).exp()).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    for (&index, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return index;
        }
    }
    order.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [0.0, 3.0, 2.0, -1.0];

    fn with(temperature: f64, top_k: usize) -> Sampling {
        Sampling { temperature, top_k, seed: 0 }
    }

    #[test]
    fn temperature_zero_is_greedy() {
        assert_eq!(draw(&LOGITS, with(0.0, 0), 0.999), 1);
    }

    #[test]
    fn top_k_cuts_the_tail() {
        for i in 0..100 {
            let token = draw(&LOGITS, with(5.0, 2), f64::from(i) / 100.0);
            assert!(token == 1 || token == 2);
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let draws = 10_000;
        let hits = (0..draws).filter(|&i| draw(&LOGITS, with(1.0, 0), f64::from(i) / f64::from(draws)) == 1).count();
        let sum: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        let expected = f64::from(draws) * 3f64.exp() / sum;
        assert!((hits as f64 - expected).abs() < 2.0, "{hits} {expected}");
    }
}
