"""The GPT-2 of gpt_torch.py in MLX: the same architecture, options, module names and letters of the shapes."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50304
    dropout: float = 0.0
    bias: bool = False  # on every linear layer and every LayerNorm
    gelu: str = "erf"  # or "tanh", the approximation of the original GPT-2


class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). The columns of c_attn are q, k, v, each of H heads of C/H."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.drop_weights, self.drop_out = nn.Dropout(cfg.dropout), nn.Dropout(cfg.dropout)
        self.p = cfg.dropout

    def __call__(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        scale = (C // self.n_head) ** -0.5
        if self.training and self.p > 0:  # MLX's fused attention drops nothing
            future = mx.triu(mx.full((T, T), -mx.inf), k=1)
            weights = mx.softmax((q * scale) @ k.swapaxes(-1, -2) + future, axis=-1)
            y = self.drop_weights(weights) @ v
        else:
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return self.drop_out(self.c_proj(y.swapaxes(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """(B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.gelu = {"erf": nn.gelu, "tanh": nn.gelu_approx}[cfg.gelu]
        self.drop = nn.Dropout(cfg.dropout)

    def __call__(self, x):
        return self.drop(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """(B, T, C) -> (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, eps=1e-5, bias=cfg.bias)
        self.attn = CausalSelfAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, eps=1e-5, bias=cfg.bias)
        self.mlp = MLP(cfg)

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens (B, T) and targets (B, T) -> logits (B, T, V) and the mean cross-entropy over the targets that are not -1."""

    def __init__(self, cfg):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.h = [Block(cfg) for _ in range(cfg.n_layer)]
        self.ln_f = nn.LayerNorm(cfg.n_embd, eps=1e-5, bias=cfg.bias)
        self.drop = nn.Dropout(cfg.dropout)
        init = nn.init.normal(std=0.02)  # GPT-2's: a loss of random weights is near ln(V)
        self.wte.weight, self.wpe.weight = init(self.wte.weight), init(self.wpe.weight)

    def __call__(self, tokens, targets):
        x = self.drop(self.wte(tokens) + self.wpe(mx.arange(tokens.shape[1])))  # (B, T, C)
        for block in self.h:
            x = block(x)
        logits = self.wte.as_linear(self.ln_f(x))  # (B, T, V)
        kept = targets >= 0
        losses = nn.losses.cross_entropy(logits, mx.where(kept, targets, 0))  # (B, T)
        return logits, (losses * kept).sum() / kept.sum()


def load_hf(model, params):
    """Copies `params`, a dict in Hugging Face's names and layouts, into `model`; the two must hold the same names."""
    linear = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # (in, out) there, (out, in) here
    model.load_weights([(name, p.T if name.endswith(linear) else p) for name, p in params.items()], strict=True)
