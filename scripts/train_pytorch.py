#!/usr/bin/env python3
"""Trains in PyTorch as `gpt-wgpu train` does: the same weights at the start, the same batches, the same optimizer and schedule.

    pip install torch numpy
    gpt-wgpu prepare shakespeare_char
    gpt-wgpu train configs/shakespeare_char.toml --dropout 0 --max-iters 99 --log-interval 1 --out-dir ours
    python scripts/train_pytorch.py configs/shakespeare_char.toml --dropout 0 --max-iters 99 --log-interval 1 --out-dir theirs
    python scripts/compare_losses.py ours theirs

The configuration is gpt-wgpu's, with flags over it. Weights and batches are functions of the seed (philox.py), so nothing has
to be carried from one program to the other. Masks of dropout are not the same: a comparison sets dropout to 0.
out_dir/metrics.jsonl has gpt-wgpu's fields. Its times are no benchmark, for PyTorch's deterministic kernels are asked for:
that is bench_pytorch.py's work. No checkpoint is written.
--check CHECKPOINT needs `safetensors`: it compares the initial weights with those of a checkpoint that
`gpt-wgpu train --max-iters 0 --learning-rate 0 --min-lr 0` wrote, and trains nothing.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: without it cuBLAS may sum in any order

import argparse
import json
import math
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

import philox
from bench_common import add_keys
from gpt_torch import GPT, GPTConfig, decay_groups, hf_layout
from torch_common import add_torch_arguments, fused_adamw, precision, settle, synchronise

# src/config.rs's keys and defaults; what has no meaning here is left out.
DEFAULTS = {
    "model": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=0, dropout=0.0, bias=False, gelu="erf"),
    "data": dict(dataset="openwebtext", data_dir="data", batch_size=12, gradient_accumulation_steps=40),
    "optim": dict(learning_rate=6e-4, decay_lr=True, warmup_iters=2000, lr_decay_iters=600_000, min_lr=6e-5, weight_decay=0.1,
                  beta1=0.9, beta2=0.95, grad_clip=1.0),
    "train": dict(out_dir="out", seed=1337, max_iters=600_000, eval_interval=2000, eval_iters=200, log_interval=1),
}  # fmt: skip
IGNORED = ["device", "kernels", "eval_only", "always_save_checkpoint", "sample_tokens"]

NANOGPT_PEAK = 312e12  # what nanoGPT's mfu refers to: an A100's bf16 matrix peak, FLOP/s
EVALUATION = 1 << 63  # keeps the evaluation's batches of train apart from the training's


def parse_args():
    """The flags, and the configuration: the defaults, then the file, then the flags."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("config", type=Path, metavar="TOML", help="a configuration of gpt-wgpu")
    ap.add_argument("--check", type=Path, metavar="CHECKPOINT", help="compare the initial weights, and exit with 0 or 1")
    add_torch_arguments(ap)
    flat = {key: default for table in DEFAULTS.values() for key, default in table.items()}
    add_keys(ap, flat)
    args = ap.parse_args()
    settle(ap, args)
    config = dict(flat)
    try:
        doc = tomllib.loads(args.config.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        ap.error(f"{args.config}: {error}")
    for table, keys in doc.items():
        if table not in DEFAULTS or not isinstance(keys, dict):
            ap.error(f"{args.config}: `{table}` is none of the tables {', '.join(DEFAULTS)}")
        for key, value in keys.items():
            if key in DEFAULTS[table]:
                config[key] = type(flat[key])(value)
            elif (key, value) != ("init_from", "scratch") and key not in IGNORED:
                ap.error(f"{args.config}: {key} = {value} in [{table}] has no meaning here")
    if args.out_dir is None:
        config["out_dir"] += "-pytorch"  # gpt-wgpu's own run may lie in the folder that the file names
    config |= {key: value for key, value in vars(args).items() if key in flat and value is not None}
    return args, config


class Data:
    """train.bin and val.bin of a dataset's folder."""

    def __init__(self, config):
        folder = Path(config["dataset"])
        if not (folder / "train.bin").exists():
            folder = Path(config["data_dir"]) / folder
        try:
            self.files = {site: np.memmap(folder / f"{name}.bin", "<u2", "r")
                          for site, name in [(philox.DATA_TRAIN, "train"), (philox.DATA_VAL, "val")]}  # fmt: skip
        except OSError as error:
            sys.exit(f"{folder} is no dataset ({error}); make it with `gpt-wgpu prepare`")
        meta = folder / "meta.json"
        known = json.loads(meta.read_text())["vocab_size"] if meta.exists() else 50304
        self.vocab_size = config["vocab_size"] or known
        self.config = config

    def batch(self, site, position, device):
        """Tokens and targets of the `position`-th batch, each (B, T) of int64."""
        B, T = self.config["batch_size"], self.config["block_size"]
        tokens = self.files[site]
        if len(tokens) <= T:
            sys.exit(f"{tokens.filename} holds {len(tokens)} tokens: too few for block_size {T}")
        starts = philox.batch_starts(site, self.config["seed"], position, B, len(tokens) - T)
        text = tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)  # (B, T + 1)
        if text.max() >= self.vocab_size:
            sys.exit(f"{tokens.filename} holds token {text.max()}, yet vocab_size is {self.vocab_size}")
        text = torch.from_numpy(text).to(device)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def initial_model(config, vocab_size):
    """The model with the weights that gpt-wgpu's `Gpt::init` draws from the seed, on the CPU."""
    keys = {f.name for f in fields(GPTConfig)}
    model = GPT(GPTConfig(**{k: v for k, v in config.items() if k in keys} | {"vocab_size": vocab_size}))
    residual_std = 0.02 / math.sqrt(2.0 * config["n_layer"])
    drawn = 0
    for name, p in model.named_parameters():
        if p.dim() == 2:  # biases are 0 and the norms' scales 1 already
            std = residual_std if "c_proj" in name else 0.02
            p.data = torch.from_numpy(philox.normals(config["seed"], drawn, p.numel(), std)).view(p.shape)
            drawn += p.numel()
    return model


def learning_rate(config, step):
    """Linear warmup, cosine decay to min_lr, then constant; steps count from 0."""
    lr, min_lr, warmup, end = (config[k] for k in ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters"))
    if not config["decay_lr"]:
        return lr
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if step > end:
        return min_lr
    ratio = (step - warmup) / max(end - warmup, 1)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - min_lr)


@torch.no_grad()
def evaluate(model, autocast, data, config, step, device):
    """Mean loss over eval_iters batches of train and of val."""
    model.eval()
    means, count = [], config["eval_iters"]
    for site in (philox.DATA_TRAIN, philox.DATA_VAL):
        losses = []
        for i in range(count):
            with autocast:
                losses.append(model(*data.batch(site, EVALUATION | (step * count + i), device))[1].double())
        means.append(torch.stack(losses).mean().item() if device != "mps" else sum(l.item() for l in losses) / count)
    model.train()
    return means


def train(args, config):
    """The loop, with gpt-wgpu's log lines and records."""
    device, accumulation = args.device, config["gradient_accumulation_steps"]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it finds reads of unset memory, and costs time
    torch.manual_seed(config["seed"])  # dropout's
    autocast, scaler = precision(args)
    data = Data(config)
    model = initial_model(config, data.vocab_size).to(device).train()
    step_model = torch.compile(model) if args.compile else model
    betas = (config["beta1"], config["beta2"])
    optim, _ = fused_adamw(decay_groups(model, config["weight_decay"]), lr=config["learning_rate"], betas=betas, eps=1e-8)
    counted = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    per_step = accumulation * config["batch_size"] * config["block_size"]  # tokens
    flops = per_step * (6 * counted + 12 * config["n_layer"] * config["n_embd"] * config["block_size"])
    out_dir = Path(config["out_dir"])
    out_dir.mkdir(parents=True, exist_ok=True)
    metrics = open(out_dir / "metrics.jsonl", "w", buffering=1)

    def tell(line, **record):
        print(line, flush=True)
        # JSON has no infinity: null, as gpt-wgpu writes it.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        metrics.write(json.dumps(finite) + "\n")

    print(f"PyTorch {torch.__version__}, {device}, {args.dtype}: {counted / 1e6:.2f}M parameters, {per_step} tokens per iteration")
    position, since, start = 0, 0, time.perf_counter()
    for step in range(config["max_iters"] + 1):
        lr = learning_rate(config, step)
        if step % config["eval_interval"] == 0:
            synchronise(device)
            began = time.perf_counter()
            train_loss, val_loss = evaluate(model, autocast, data, config, step, device)
            took = time.perf_counter() - began
            start += took
            tell(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f} (evaluated in {took:.1f}s)",
                 step=step, train_loss=train_loss, val_loss=val_loss, eval_ms=took * 1e3)  # fmt: skip
        total = torch.zeros((), device=device)
        for _ in range(accumulation):
            x, y = data.batch(philox.DATA_TRAIN, position, device)
            position += 1
            with autocast:
                loss = step_model(x, y)[1] / accumulation
            scaler.scale(loss).backward()
            total += loss.detach()
        for group in optim.param_groups:
            group["lr"] = lr
        scaler.unscale_(optim)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"] or math.inf)
        scaler.step(optim)
        scaler.update()
        optim.zero_grad(set_to_none=True)
        since += 1
        if step % config["log_interval"] == 0 or step == config["max_iters"]:
            loss, norm = total.item(), norm.item()  # waits for the device
            synchronise(device)
            ms = 1e3 * (time.perf_counter() - start) / since
            since, start = 0, time.perf_counter()
            rate, mfu = per_step / ms * 1e3, flops / (ms / 1e3) / NANOGPT_PEAK
            memory = {"device_memory_bytes": torch.cuda.memory_reserved()} if device == "cuda" else {}
            tell(f"iter {step}: loss {loss:.4f}, time {ms:.2f}ms, mfu {100 * mfu:.2f}%, {rate:.0f} tok/s",
                 step=step, loss=loss, lr=lr, grad_norm=norm, ms=ms, tokens_per_s=rate, mfu=mfu, **memory)  # fmt: skip
            if not math.isfinite(loss):
                sys.exit(f"the loss at iteration {step} is {loss}")


def check(args, config):
    """Whether Philox gives the known answers, and the initial weights are a checkpoint's, but for last bits."""
    from safetensors.torch import load_file

    for counter, key, expected in philox.KNOWN:
        assert [int(word) for word in philox.philox4x32(counter, key)] == expected, "Philox4x32-10 is wrong"
    theirs = load_file(args.check / "model.safetensors")
    ours = dict(initial_model(config, len(theirs["wte.weight"])).named_parameters())
    if ours.keys() != theirs.keys():
        sys.exit(f"other parameters: {sorted(ours.keys() ^ theirs.keys())}")
    # Neighbouring floats of one sign are neighbouring integers.
    apart = {k: (p.data.view(torch.int32).long() - hf_layout(k, theirs[k]).view(torch.int32).long()).abs() for k, p in ours.items()}
    count, differ = sum(p.numel() for p in ours.values()), sum(int((d > 0).sum()) for d in apart.values())
    worst = max(int(d.max()) for d in apart.values())
    print(f"{count} weights of {args.check}: {differ} differ, by {worst} units in the last place at most (allowed 1)")
    return worst <= 1


def main():
    args, config = parse_args()
    if args.check:
        sys.exit(0 if check(args, config) else 1)
    train(args, config)


if __name__ == "__main__":
    main()
