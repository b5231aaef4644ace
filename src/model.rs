//! GPT-2, with GPT-2's names: token and position embeddings, pre-norm blocks of attention and MLP, a tied head.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::ops::block::{Layer, Parameters, attention_block, mlp_block};
use crate::ops::cast::{all_as_multiplied, all_to_f16, to_f16};
use crate::ops::cross_entropy::{cross_entropy, cross_entropy_scaled};
use crate::ops::dropout::Dropout;
use crate::ops::embedding::embedding;
use crate::ops::layer_norm::layer_norm;
use crate::ops::linear::{Gelu, linear};
use crate::rng;

/// The numbers that fix the model's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GptConfig {
    /// Blocks.
    pub n_layer: usize,
    /// Attention heads in a block.
    pub n_head: usize,
    /// Channels C.
    pub n_embd: usize,
    /// Longest sequence T.
    pub block_size: usize,
    /// Tokens V.
    pub vocab_size: usize,
    /// Whether linear layers and layer norms have a bias.
    pub bias: bool,
    /// Which GELU.
    pub gelu: Gelu,
}

impl GptConfig {
    /// Parameters without the position embedding, as nanoGPT counts them.
    pub fn parameters(&self) -> usize {
        let c = self.n_embd;
        let bias = usize::from(self.bias);
        let norm = c + c * bias;
        let block = 12 * c * c + 9 * c * bias + 2 * norm;
        self.vocab_size * c + self.n_layer * block + norm
    }

    /// Floating-point operations per token, forward and backward: nanoGPT's 6N + 12 L C T.
    pub fn flops_per_token(&self) -> f64 {
        (6 * self.parameters() + 12 * self.n_layer * self.n_embd * self.block_size) as f64
    }
}

/// A matrix whose rows are looked up.
#[derive(Module, Debug)]
pub struct Embedding {
    /// (entries, C).
    pub weight: Param<Tensor<2>>,
}

/// Scale and shift of a layer norm.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// (C).
    pub weight: Param<Tensor<1>>,
    /// (C).
    pub bias: Option<Param<Tensor<1>>>,
}

/// A matrix product with an optional bias.
#[derive(Module, Debug)]
pub struct Linear {
    /// (out, in).
    pub weight: Param<Tensor<2>>,
    /// (out).
    pub bias: Option<Param<Tensor<1>>>,
    /// The weight in f16, in a [`Gpt::rounded`] model.
    #[module(skip)]
    rounded: Option<Tensor<2>>,
}

/// Attention with its packed projection and its output projection.
#[derive(Module, Debug)]
pub struct CausalSelfAttention {
    /// C -> 3C: q, k, v.
    pub c_attn: Linear,
    /// C -> C.
    pub c_proj: Linear,
}

/// The feed-forward half of a block.
#[derive(Module, Debug)]
pub struct Mlp {
    /// C -> 4C.
    pub c_fc: Linear,
    /// 4C -> C.
    pub c_proj: Linear,
}

/// x + attention(norm(x)), then x + mlp(norm(x)).
#[derive(Module, Debug)]
pub struct Block {
    /// Before the attention.
    pub ln_1: LayerNorm,
    /// Attention.
    pub attn: CausalSelfAttention,
    /// Before the MLP.
    pub ln_2: LayerNorm,
    /// MLP.
    pub mlp: Mlp,
}

/// The whole model. The head is `wte`'s weight.
#[derive(Module, Debug)]
pub struct Gpt {
    /// Token embedding (V, C).
    pub wte: Embedding,
    /// Position embedding (block_size, C).
    pub wpe: Embedding,
    /// Blocks.
    pub h: Vec<Block>,
    /// Before the head.
    pub ln_f: LayerNorm,
    /// What the tensors were made from.
    #[module(skip)]
    pub config: GptConfig,
    /// Whether activations are f16 (docs/precision.md), else f32. The weights are f32 either way.
    #[module(skip)]
    pub f16: bool,
}

impl LayerNorm {
    fn init(channels: usize, bias: bool, device: &Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::ones([channels], device)),
            bias: bias.then(|| Param::from_tensor(Tensor::zeros([channels], device))),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        layer_norm(x, self.weight.val(), value(&self.bias)) // (B, T, C)
    }
}

/// A weight for products with `x`, in x's type.
fn weight_for<const D: usize>(weight: &Param<Tensor<2>>, x: &Tensor<D>) -> Tensor<2> {
    let weight = weight.val();
    if x.dtype() == DType::F16 { to_f16(weight) } else { weight }
}

impl Linear {
    fn init(inputs: usize, outputs: usize, bias: bool, normal: &mut Normal) -> Self {
        Self {
            weight: normal.matrix(outputs, inputs),
            bias: bias.then(|| Param::from_tensor(Tensor::zeros([outputs], normal.device))),
            rounded: None,
        }
    }

    fn layer(&self) -> Layer {
        Layer { weight: self.weight.val(), rounded: self.rounded.clone(), bias: value(&self.bias) }
    }
}

impl Block {
    fn init(config: &GptConfig, normal: &mut Normal) -> Self {
        let GptConfig { n_embd: c, bias, .. } = *config;
        // Residual projections are scaled down by the depth, so that the residual stream keeps its variance.
        let residual_std = INIT_STD / (2.0 * config.n_layer as f64).sqrt();
        Self {
            ln_1: LayerNorm::init(c, bias, normal.device),
            attn: CausalSelfAttention {
                c_attn: Linear::init(c, 3 * c, bias, normal),
                c_proj: Linear::init(c, c, bias, &mut normal.with_std(residual_std)),
            },
            ln_2: LayerNorm::init(c, bias, normal.device),
            mlp: Mlp {
                c_fc: Linear::init(c, 4 * c, bias, normal),
                c_proj: Linear::init(4 * c, c, bias, &mut normal.with_std(residual_std)),
            },
        }
    }

    /// x + attention(norm(x)): x (B, T, C) -> (B, T, C); `site` is the block's first dropout.
    fn attention(&self, x: Tensor<3>, config: &GptConfig, dropout: Dropout, site: u32) -> Tensor<3> {
        let attn = &self.attn;
        let parameters = half(&self.ln_1, &attn.c_attn, &attn.c_proj);
        attention_block(x, parameters, config.n_head, [dropout.at(site), dropout.at(site + 1)]) // (B, T, C)
    }

    /// x + mlp(norm(x)): x (B, T, C) -> (B, T, C); `site` is the block's first dropout.
    fn mlp(&self, x: Tensor<3>, config: &GptConfig, dropout: Dropout, site: u32) -> Tensor<3> {
        let parameters = half(&self.ln_2, &self.mlp.c_fc, &self.mlp.c_proj);
        mlp_block(x, parameters, config.gelu, dropout.at(site + 2)) // (B, T, C)
    }
}

/// The parameters of half a block.
fn half(norm: &LayerNorm, inner: &Linear, outer: &Linear) -> Parameters {
    Parameters { norm: (norm.weight.val(), value(&norm.bias)), inner: inner.layer(), outer: outer.layer() }
}

/// A block, or half of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// x + attention(norm(x)).
    Attention,
    /// x + mlp(norm(x)).
    Mlp,
    /// The one, then the other.
    Both,
}

impl Gpt {
    /// A model with nanoGPT's initial weights: N(0, 0.02), residual projections N(0, 0.02 / √(2L)), biases 0. The weights are
    /// drawn on the host, so a seed gives the same model on every device.
    ///
    /// On an autodiff device every parameter requires a gradient.
    pub fn init(config: &GptConfig, seed: u64, device: &Device) -> Self {
        let mut stream = rng::Stream::new(seed, rng::site::INIT);
        let mut normal = Normal { stream: &mut stream, std: INIT_STD, device };
        Self {
            wte: Embedding { weight: normal.matrix(config.vocab_size, config.n_embd) },
            wpe: Embedding { weight: normal.matrix(config.block_size, config.n_embd) },
            h: (0..config.n_layer).map(|_| Block::init(config, &mut normal)).collect(),
            ln_f: LayerNorm::init(config.n_embd, config.bias, device),
            config: *config,
            f16: false,
        }
    }

    /// The same parameters, and the weights of the blocks' products once more in f16 where these multiply f16, cast in a few launches:
    /// for all passes that are made before the parameters change. Where activations are f16, each pass casts for itself without
    /// them, as it does for the head. Where they are f32 and products round them, the blocks store what only products read as these
    /// would round it.
    pub fn rounded(&self) -> Self {
        let mut model = self.clone();
        let mut linears: Vec<&mut Linear> = Vec::new();
        for Block { attn, mlp, .. } in &mut model.h {
            linears.extend([&mut attn.c_attn, &mut attn.c_proj, &mut mlp.c_fc, &mut mlp.c_proj]);
        }
        let weights: Vec<_> = linears.iter().map(|linear| linear.weight.val().inner()).collect();
        if weights.is_empty() {
            return model;
        }
        let rounded: Vec<_> =
            if self.f16 { all_to_f16(weights).collect() } else { all_as_multiplied(weights).collect() };
        linears.into_iter().zip(rounded).for_each(|(linear, rounded)| linear.rounded = Some(rounded));
        model
    }

    /// The first block's input for tokens (B, T), T <= block_size -> (B, T, C).
    pub fn embed(&self, tokens: Tensor<2, Int>, dropout: Dropout) -> Tensor<3> {
        embedding(tokens, self.wte.weight.val(), self.wpe.weight.val(), dropout.at(rng::site::DROPOUT), self.f16)
    }

    /// One block or half of it: x (B, T, C) -> (B, T, C).
    ///
    /// # Panics
    /// When there is no block `index`.
    pub fn block(&self, index: usize, part: Part, x: Tensor<3>, dropout: Dropout) -> Tensor<3> {
        let (block, config) = (&self.h[index], &self.config);
        let site = rng::site::DROPOUT + 1 + SITES_PER_BLOCK * index as u32;
        match part {
            Part::Attention => block.attention(x, config, dropout, site),
            Part::Mlp => block.mlp(x, config, dropout, site),
            Part::Both => block.mlp(block.attention(x, config, dropout, site), config, dropout, site),
        }
    }

    /// The last block's output for tokens (B, T), T <= block_size -> (B, T, C).
    fn blocks(&self, tokens: Tensor<2, Int>, dropout: Dropout) -> Tensor<3> {
        let x = self.embed(tokens, dropout);
        (0..self.h.len()).fold(x, |x, index| self.block(index, Part::Both, x, dropout))
    }

    /// The last block's normed output for tokens (B, T), T <= block_size -> (B, T, C).
    pub fn hidden(&self, tokens: Tensor<2, Int>, dropout: Dropout) -> Tensor<3> {
        self.ln_f.forward(self.blocks(tokens, dropout))
    }

    /// Mean cross-entropy in nats of tokens (B, T) against targets (B, T), -1 being ignored -> (1).
    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>, dropout: Dropout) -> Tensor<1> {
        self.head_loss(self.blocks(tokens, dropout), targets, None)
    }

    /// [`Gpt::loss`] from the last block's output x (B, T, C), its gradients scaled.
    pub fn head_loss(&self, x: Tensor<3>, targets: Tensor<2, Int>, scale: Option<Scale>) -> Tensor<1> {
        let x = self.ln_f.forward(x);
        let head = weight_for(&self.wte.weight, &x);
        match scale {
            Some(Scale(factor)) => cross_entropy_scaled(x, head, targets, Some(Tensor::from_inner(factor))),
            None => cross_entropy(x, head, targets),
        }
    }

    /// As [`Gpt::loss`], its gradients scaled.
    pub fn scaled_loss(
        &self,
        tokens: Tensor<2, Int>,
        targets: Tensor<2, Int>,
        dropout: Dropout,
        scale: Scale,
    ) -> Tensor<1> {
        self.head_loss(self.blocks(tokens, dropout), targets, Some(scale))
    }

    /// Logits of every position: tokens (B, T) -> (B, T, V) f32.
    pub fn logits(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let x = self.hidden(tokens, Dropout::OFF);
        let head = weight_for(&self.wte.weight, &x);
        linear(x, head, None).cast(DType::F32)
    }

    /// Logits of the last position only: tokens (B, T) -> (B, V) f32.
    pub fn last_logits(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [batch, time] = tokens.dims();
        let channels = self.config.n_embd;
        let last =
            self.hidden(tokens, Dropout::OFF).slice([0..batch, time - 1..time, 0..channels]).reshape([batch, channels]);
        let head = weight_for(&self.wte.weight, &last);
        linear(last, head, None).cast(DType::F32)
    }
}

/// What the gradients of a micro-batch's loss are multiplied by, its first element; the loss itself is not. Without autodiff.
#[derive(Clone, Debug)]
pub struct Scale(pub Tensor<1>);

/// Dropouts in a block: attention probabilities and the two residual branches.
const SITES_PER_BLOCK: u32 = 3;

/// Standard deviation of GPT-2's initial weights.
const INIT_STD: f64 = 0.02;

/// Draws initial weights in the order they are asked for.
struct Normal<'a> {
    stream: &'a mut rng::Stream,
    std: f64,
    device: &'a Device,
}

impl Normal<'_> {
    fn with_std(&mut self, std: f64) -> Normal<'_> {
        Normal { stream: self.stream, std, device: self.device }
    }

    fn matrix(&mut self, rows: usize, columns: usize) -> Param<Tensor<2>> {
        let data = TensorData::new(self.draw(rows * columns), [rows, columns]);
        Param::from_tensor(Tensor::from_data(data, self.device))
    }

    /// The stream's next normals, drawn by all cores: GPT-2's 124 million take one core six seconds.
    fn draw(&mut self, count: usize) -> Vec<f32> {
        /// Words of the stream that one normal takes.
        const WORDS: u64 = 2;
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        let (first, std) = (self.stream.position(), self.std);
        let mut values = vec![0.0; count];
        let part = count.div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            for (i, values) in values.chunks_mut(part).enumerate() {
                let mut stream = self.stream.clone();
                stream.seek(first + WORDS * (i * part) as u64);
                scope.spawn(move || values.iter_mut().for_each(|value| *value = (stream.normal() * std) as f32));
            }
        });
        self.stream.seek(first + WORDS * count as u64);
        values
    }
}

fn value<const D: usize>(param: &Option<Param<Tensor<D>>>) -> Option<Tensor<D>> {
    param.as_ref().map(Param::val)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many threads draw them, the weights are the stream's, in its order.
    #[test]
    fn weights_are_drawn_in_the_order_of_the_stream() {
        let mut stream = rng::Stream::new(7, rng::site::INIT);
        let expected: Vec<f32> = (0..1003).map(|_| (stream.normal() * INIT_STD) as f32).collect();
        let mut shared = rng::Stream::new(7, rng::site::INIT);
        let mut normal = Normal { stream: &mut shared, std: INIT_STD, device: &Device::flex() };
        let drawn = [normal.draw(1), normal.draw(1002)].concat();
        assert_eq!(drawn, expected);
        assert_eq!(shared.position(), stream.position());
    }
}
