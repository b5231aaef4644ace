"""GPT-2 in PyTorch, as small as it goes: the reference for the goldens and for the benchmark.

The architecture is GPT-2's (Radford et al. 2019) with the options of nanoGPT: pre-LayerNorm (eps 1e-5), learned token and
position embeddings, a head tied to the token embedding, one packed q-k-v projection, an MLP four times as wide.
Modules carry the names of Hugging Face's GPT-2 safetensors (wte, wpe, h.0.attn.c_attn, ...).
Letters of the shapes: B batch, T tokens, C n_embd, H n_head, V vocab_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


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
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)  # scale 1/sqrt(C/H)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """(B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.dropout, self.approximate = cfg.dropout, {"erf": "none", "tanh": "tanh"}[cfg.gelu]
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        y = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """(B, T, C) -> (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, eps=1e-5, bias=cfg.bias)
        self.attn = CausalSelfAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, eps=1e-5, bias=cfg.bias)
        self.mlp = MLP(cfg)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens (B, T) and targets (B, T) -> logits (B, T, V) and the mean cross-entropy over the targets that are not -1."""

    def __init__(self, cfg):
        super().__init__()
        assert cfg.n_embd % cfg.n_head == 0, "n_embd must be a multiple of n_head"
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, eps=1e-5, bias=cfg.bias)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # the residual projections are scaled by their number, 2 a layer
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * cfg.n_layer) if "c_proj" in name else 1))

    def forward(self, tokens, targets):
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.wte(tokens) + self.wpe(position), self.cfg.dropout, self.training)  # (B, T, C)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


def hf_layout(name, tensor):
    """nn.Linear keeps (out, in), Hugging Face's Conv1D (in, out): transposes such weights, either way; leaves the rest."""
    linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return tensor.t().contiguous() if linear else tensor


def load_hf(model, params):
    """Copies `params`, a dict in Hugging Face's names and layouts, into `model`; the two must hold the same names."""
    model.load_state_dict({name: hf_layout(name, tensor) for name, tensor in params.items()})


def decay_groups(model, weight_decay):
    """AdamW's parameter groups: decay for matrices and embeddings, none for biases and LayerNorms."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
