#!/usr/bin/env python3
"""Writes tests/golden/*.safetensors: a tiny GPT's logits, loss, gradients and ten training steps, from PyTorch.

    pip install torch numpy && python scripts/make_golden.py

The mathematics is float64 on the CPU; every weight is rounded to float32 first, so that both sides start from equal
numbers, and every result is stored as float32. Names and layouts are those of Hugging Face's GPT-2 (gpt_torch.py).

    tokens, targets    (B, T) i32     a target of -1 is ignored
    param.NAME, grad.NAME             the weights, and the gradient of the mean cross-entropy
    logits             (B, T, V)
    loss               (1)
    steps.tokens, steps.targets       (10, B, T) i32: the batch of each step
    steps.lr, .loss, .grad_norm       (10): the loss before the update, the norm before the clip
    steps.param.NAME                  some weights after the tenth step

gpt_bias has biases and one ignored target, gpt_nobias neither. gpt_tanh is gpt_bias with the tanh GELU: its weights are in
the file that its metadata names as `params_from`, and it has no steps. The metadata holds every hyperparameter as a string.

The gradient of the keys' third of c_attn.bias is zero in exact arithmetic, as a softmax does not see a constant added to
all scores; compare it by an absolute tolerance.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from gpt_torch import GPT, GPTConfig, decay_groups, hf_layout

B, T, STEPS = 2, 7, 10  # T is below block_size: the last row of wpe gets no gradient
OPTIM = dict(learning_rate=1e-2, min_lr=1e-3, warmup_iters=3, lr_decay_iters=10, weight_decay=0.1,
             beta1=0.9, beta2=0.99, eps=1e-8, grad_clip=1.0)  # nanoGPT's names
STEP_PARAMS = ["wte.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"]


def build(cfg, seed):
    """A float64 model with weights far from their usual small values, so that no term of the gradient hides."""
    torch.manual_seed(seed)
    model = GPT(cfg).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, dtype=torch.float64)
            if name.endswith("bias"):
                value = 0.1 * noise
            elif p.dim() == 1:
                value = 1 + 0.2 * noise
            else:
                value = 0.2 * noise
            p.copy_(value.float())
    return model


def lr_at(it):
    """nanoGPT's schedule: linear warm-up, then a cosine from learning_rate down to min_lr."""
    lr, low, warmup, end = (OPTIM[k] for k in ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters"))
    if it < warmup:
        return lr * (it + 1) / (warmup + 1)
    if it > end:
        return low
    return low + 0.5 * (1 + math.cos(math.pi * (it - warmup) / (end - warmup))) * (lr - low)


def one_batch(model, tokens, targets):
    """The tensors of one forward and backward."""
    logits, loss = model(tokens, targets)
    loss.backward()
    out = {"tokens": tokens, "targets": targets, "logits": logits, "loss": loss.reshape(1)}
    out |= {f"grad.{name}": hf_layout(name, p.grad) for name, p in model.named_parameters()}
    model.zero_grad()
    return out


def ten_steps(model, tokens, targets):
    """Trains `model` on tokens, targets (10, B, T) and returns what a trainer must reproduce."""
    optim = torch.optim.AdamW(decay_groups(model, OPTIM["weight_decay"]), betas=(OPTIM["beta1"], OPTIM["beta2"]),
                              eps=OPTIM["eps"], foreach=False)
    lrs, losses, norms = [lr_at(it) for it in range(STEPS)], [], []
    for x, y, lr in zip(tokens, targets, lrs):
        _, loss = model(x, y)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["grad_clip"]).item())
        for group in optim.param_groups:
            group["lr"] = lr
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
    out = {"steps.tokens": tokens, "steps.targets": targets}
    out |= {"steps.lr": torch.tensor(lrs), "steps.loss": torch.tensor(losses), "steps.grad_norm": torch.tensor(norms)}
    params = dict(model.named_parameters())
    return out | {f"steps.param.{n}": hf_layout(n, params[n]) for n in STEP_PARAMS if n in params}


def save(path, tensors, metadata):
    """safetensors, by hand: the library writes the metadata in a random order, and these files are to be reproducible."""
    header, blobs, at = {"__metadata__": {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}}, [], 0
    for name, tensor in sorted(tensors.items()):
        dtype, code = ("<i4", "I32") if tensor.dtype == torch.int64 else ("<f4", "F32")
        blob = np.ascontiguousarray(tensor.detach().numpy().astype(dtype)).tobytes()
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


def main():
    root = Path(__file__).resolve().parent.parent
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", type=Path, default=root / "tests" / "golden", help="folder (%(default)s)")
    out = ap.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the order of every sum is then fixed

    for name, bias, gelu, seed in [("gpt_bias", True, "erf", 1), ("gpt_nobias", False, "erf", 2), ("gpt_tanh", True, "tanh", 1)]:
        cfg = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13, dropout=0.0, bias=bias, gelu=gelu)
        model = build(cfg, seed)
        text = torch.randint(cfg.vocab_size, (1 + STEPS, B, T + 1))
        tokens, targets = text[..., :-1], text[..., 1:].clone()
        if bias:
            targets[0, 1, 3] = -1
        tensors = one_batch(model, tokens[0], targets[0])
        metadata = {"format": "pt", "schema": "gpt-wgpu-golden", "version": 1, **asdict(cfg), "batch_size": B, "seq_len": T}
        if gelu == "tanh":
            metadata["params_from"] = "gpt_bias.safetensors"
        else:
            metadata |= OPTIM
            tensors |= {f"param.{n}": hf_layout(n, p.detach().clone()) for n, p in model.named_parameters()}
            tensors |= ten_steps(model, tokens[1:], targets[1:])
        save(out / f"{name}.safetensors", tensors, metadata)


if __name__ == "__main__":
    main()
