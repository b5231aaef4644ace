#!/usr/bin/env python3
"""Times MLX on the training step that gpt-wgpu times: forward, backward, clip, AdamW, without gradient accumulation.

    pip install mlx                    # macOS, Metal; mlx[cpu] elsewhere
    python scripts/bench_mlx.py --config configs/shakespeare_char.toml --json mlx.json
    python scripts/bench_mlx.py --device cpu --compile --batch_size 16
    python scripts/bench_mlx.py --check tests/golden/gpt_bias.safetensors

Every iteration is evaluated and waited for, and is one sample; all is in fp32. The tokens are random, lie on the device before
the clock starts, and so a loss stays near ln(vocab_size). A shape comes from a flag, else from --config, else it is GPT-2
124M's. The JSON is docs/bench-schema.md's, for `gpt-wgpu compare`.
--check compares the loss and the logits of a golden file with this model's, and times nothing.
"""

import time

START = time.perf_counter()  # time_to_first_step_s counts the import of mlx: a user waits for it too

import argparse
import json
import os
import platform
import sys
from dataclasses import fields
from functools import partial
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from bench_common import add_arguments, cpu_name, report, shapes, tell, verdict
from gpt_mlx import GPT, GPTConfig, load_hf


def parse_args():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", choices=["cpu", "gpu"], help="the GPU where there is one, unless given")
    ap.add_argument("--compile", action="store_true", help="mx.compile the step")
    add_arguments(ap)
    args = ap.parse_args()
    if args.warmup < 1 or args.iters < 1:
        ap.error("--warmup and --iters must be at least 1")
    available = {"gpu": mx.metal.is_available(), "cpu": True}
    args.device = args.device or next(d for d, there in available.items() if there)
    if not available[args.device]:
        ap.error(f"--device {args.device}: this MLX ({version('mlx')}) finds no Metal")
    mx.set_default_device(mx.gpu if args.device == "gpu" else mx.cpu)
    return args


def bench(args):
    """Runs warm-up and timed iterations; returns the result as the JSON has it."""
    config = shapes(args)
    B = config["batch_size"]
    mx.random.seed(1337)
    cfg = GPTConfig(**{k: v for k, v in config.items() if k != "batch_size"})
    model = GPT(cfg).train()
    adamw = partial(optim.AdamW, learning_rate=6e-4, betas=[0.9, 0.95], eps=1e-8, bias_correction=True)
    # Decay for matrices and embeddings, none for biases and LayerNorms.
    optimizer = optim.MultiOptimizer([adamw(weight_decay=0.1), adamw(weight_decay=0.0)], [lambda _, p: p.ndim >= 2])
    text = mx.random.randint(0, cfg.vocab_size, (8, B, cfg.block_size + 1))  # eight batches, used in turn
    xs, ys = mx.contiguous(text[..., :-1]), mx.contiguous(text[..., 1:])
    loss_and_grad = nn.value_and_grad(model, lambda x, y: model(x, y)[1])
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    def step(x, y):
        loss, grads = loss_and_grad(x, y)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    run = mx.compile(step, inputs=state, outputs=state) if args.compile else step
    mx.eval(state, xs, ys)
    samples, losses = [], []
    for it in range(args.warmup + args.iters):
        if it == args.warmup:
            mx.reset_peak_memory()
        start = time.perf_counter()
        loss = run(xs[it % 8], ys[it % 8])
        mx.eval(loss, state)
        mx.synchronize()
        samples.append(1e3 * (time.perf_counter() - start))
        losses.append(loss)
        if it == 0:
            first = time.perf_counter() - START
    gpu = args.device == "gpu"
    return report(
        args,
        samples[args.warmup:],
        [loss.item() for loss in losses[args.warmup:]],
        program="mlx",
        program_version=version("mlx"),
        threads=os.cpu_count(),
        device={
            "backend": "mlx" if gpu else "cpu",
            "name": cpu_name(),  # Apple's GPU has the chip's name
            "driver": f"Metal of macOS {platform.mac_ver()[0]}" if gpu else None,
            "memory_bytes": mx.device_info()["memory_size"] if gpu else None,
        },
        dtype="fp32",
        kernels="attention with dropout composed" if cfg.dropout > 0 else "mx.fast.scaled_dot_product_attention",
        compiled=args.compile,
        time_to_first_step_s=first,
        peak_memory_bytes=mx.get_peak_memory(),  # of the timed iterations
    )


def check(args):
    """Whether this model gives the golden's loss and logits in fp32, by absolute difference."""
    golden, meta = mx.load(str(args.check), return_metadata=True)
    source = mx.load(str(args.check.parent / meta["params_from"])) if "params_from" in meta else golden
    cfg = GPTConfig(**{f.name: meta[f.name] if f.type is str else json.loads(meta[f.name]) for f in fields(GPTConfig)})
    model = GPT(cfg).eval()
    load_hf(model, {k.removeprefix("param."): v for k, v in source.items() if k.startswith("param.")})
    logits, loss = model(golden["tokens"], golden["targets"])
    worst = {name: mx.abs(got - golden[name]).max().item() for name, got in [("loss", loss), ("logits", logits)]}
    return verdict(worst, args.check, args.device, 1e-5 if args.device == "cpu" else 1e-4)


def main():
    args = parse_args()
    if args.check:
        sys.exit(0 if check(args) else 1)
    tell(bench(args), args.json)


if __name__ == "__main__":
    main()
