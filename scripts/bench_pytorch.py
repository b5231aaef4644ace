#!/usr/bin/env python3
"""Times PyTorch on the training step that gpt-wgpu times: forward, backward, clip, AdamW, without gradient accumulation.

    pip install torch numpy
    python scripts/bench_pytorch.py --device mps --config configs/shakespeare_char.toml --json pytorch.json
    python scripts/bench_pytorch.py --device cuda --dtype bf16 --compile --batch_size 16
    python scripts/bench_pytorch.py --check tests/golden/gpt_bias.safetensors

The device is waited for after every iteration, and each is one sample. The tokens are random, lie on the device before the
clock starts, and so a loss stays near ln(vocab_size). A shape comes from a flag, else from --config, else it is GPT-2 124M's.
The JSON is docs/bench-schema.md's, for `gpt-wgpu compare`.
--check needs `safetensors`: it compares the loss and the logits of a golden file with this model's, and times nothing.
"""

import time

START = time.perf_counter()  # time_to_first_step_s counts the import of torch: a user waits for it too

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import fields

import torch

from bench_common import add_arguments, cpu_name, report, shapes, tell, verdict
from gpt_torch import GPT, GPTConfig, decay_groups, load_hf
from torch_common import add_torch_arguments, fused_adamw, precision, settle, synchronise


def parse_args():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_torch_arguments(ap)
    add_arguments(ap)
    args = ap.parse_args()
    if args.warmup < 1 or args.iters < 1:
        ap.error("--warmup and --iters must be at least 1")
    settle(ap, args)
    return args


def driver(device):
    """What stands between PyTorch and the device, with versions, as far as it tells; None for the CPU."""
    if device == "mps":
        return f"Metal of macOS {platform.mac_ver()[0]}"
    if device == "cuda":
        runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            return f"{runtime}, driver {subprocess.check_output(query, text=True).splitlines()[0].strip()}"
        except (OSError, IndexError, subprocess.SubprocessError):
            return runtime
    return None


def bench(args):
    """Runs warm-up and timed iterations; returns the result as the JSON has it."""
    config, device = shapes(args), args.device
    B = config["batch_size"]
    torch.manual_seed(1337)
    autocast, scaler = precision(args)
    cfg = GPTConfig(**{k: v for k, v in config.items() if k != "batch_size"})
    model = GPT(cfg).to(device).train()
    step_model = torch.compile(model) if args.compile else model
    optim, fused = fused_adamw(decay_groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95))
    text = torch.randint(cfg.vocab_size, (8, B, cfg.block_size + 1)).to(device)  # eight batches, used in turn
    xs, ys = text[..., :-1].contiguous(), text[..., 1:].contiguous()

    def step(it):
        with autocast:
            _, loss = step_model(xs[it % 8], ys[it % 8])
        scaler.scale(loss).backward()
        scaler.unscale_(optim)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optim)
        scaler.update()
        optim.zero_grad(set_to_none=True)
        return loss.detach()

    samples, losses = [], []
    for it in range(args.warmup + args.iters):
        if device == "cuda" and it == args.warmup:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses.append(step(it))
        synchronise(device)
        samples.append(1e3 * (time.perf_counter() - start))
        if it == 0:
            first = time.perf_counter() - START
    samples, losses = samples[args.warmup:], torch.stack(losses[args.warmup:]).tolist()
    cpu = cpu_name()
    gpu = torch.cuda.get_device_properties() if device == "cuda" else None
    products = {
        "tf32": "f32 inputs cut to TF32, f32 sums",
        "bf16": "autocast: bf16 inputs, f32 sums, f32 weights",
        "fp16": "autocast: f16 inputs, f32 sums, f32 weights, loss scaled",
    }
    return report(
        args,
        samples,
        losses,
        program="pytorch",
        program_version=torch.__version__,
        commit=torch.version.git_version,
        threads=torch.get_num_threads(),
        device={
            "backend": device,
            "name": gpu.name if gpu else cpu,
            "driver": driver(device),
            "memory_bytes": gpu.total_memory if gpu else None,
        },
        dtype=args.dtype,
        products=products.get(args.dtype),
        kernels=f"scaled_dot_product_attention, {'fused' if fused else 'unfused'} AdamW",
        compiled=args.compile,
        time_to_first_step_s=first,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,  # of the timed iterations
    )


def check(args, tolerance=1e-5):
    """Whether this model gives the golden's loss and logits in fp32, by absolute difference."""
    from safetensors import safe_open

    def read(path):
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()

    torch.set_float32_matmul_precision("highest")
    golden, meta = read(args.check)
    source = read(args.check.parent / meta["params_from"])[0] if "params_from" in meta else golden
    cfg = GPTConfig(**{f.name: meta[f.name] if f.type is str else json.loads(meta[f.name]) for f in fields(GPTConfig)})
    model = GPT(cfg).eval()
    load_hf(model, {k.removeprefix("param."): v for k, v in source.items() if k.startswith("param.")})
    model.to(args.device)
    with torch.no_grad():
        logits, loss = model(golden["tokens"].long().to(args.device), golden["targets"].long().to(args.device))
    worst = {"loss": (loss.cpu() - golden["loss"]).abs().max(), "logits": (logits.cpu() - golden["logits"]).abs().max()}
    return verdict(worst, args.check, args.device, tolerance)


def main():
    args = parse_args()
    if args.check:
        sys.exit(0 if check(args) else 1)
    tell(bench(args), args.json)


if __name__ == "__main__":
    main()
