#!/usr/bin/env python3
"""Times PyTorch's causal attention, forward and backward, at the shapes of `cargo bench --bench ops`, for a table beside it.

    pip install torch
    python scripts/bench_attention.py --device cuda
    python scripts/bench_attention.py --device cuda 16,12,1024,64

`scaled_dot_product_attention` with each of its fused kernels that the device has, and composed of a product, softmax and a
product. q, k and v (B, H, T, D) lie in memory as heads of one packed tensor (B, T, 3C), as a model has them. Least of 7 rounds
of 20 ms after 200 ms of warm-up; CUDA's events where there are some, else the host's clock. TFLOP/s count 4 B H T^2 D / 2 forward
and 2.5 times that backward.
"""

import argparse
import math
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from torch_common import synchronise

SHAPES = ["64,6,256,64", "16,12,1024,64", "1,12,16384,64"]
COMPOSED_BYTES = 2**31 - 1  # scores in one buffer, as for our composed version
FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def milliseconds(call, device):
    """The least of several rounds, a call."""

    def run(calls):
        synchronise(device)
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(calls):
                call()
            last.record()
            synchronise(device)
            return first.elapsed_time(last)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(device)
        return (time.perf_counter() - start) * 1e3

    run(1)
    calls = max(1, min(200, int(20 / max(run(1), 1e-3))))
    start = time.perf_counter()
    while time.perf_counter() - start < 0.2:
        run(calls)
    return min(run(calls) for _ in range(7)) / calls


def composed(q, k, v):
    time_steps = q.shape[2]
    mask = torch.ones(time_steps, time_steps, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def rows(shape, dtype, device):
    batch, heads, time_steps, dim = shape
    packed = torch.randn(batch, time_steps, 3 * heads * dim, device=device, dtype=dtype, requires_grad=True)
    q, k, v = (x.view(batch, time_steps, heads, dim).transpose(1, 2) for x in packed.split(heads * dim, dim=2))
    flops = 2 * batch * heads * dim * time_steps**2
    ways = {name: lambda: scaled_dot_product_attention(q, k, v, is_causal=True) for name in FUSED}
    if batch * heads * time_steps**2 * packed.element_size() <= COMPOSED_BYTES:
        ways["composed"] = lambda: composed(q, k, v)
    for name, call in ways.items():
        try:
            with sdpa_kernel(FUSED.get(name, SDPBackend.MATH)):
                out = call()
                dout = torch.randn_like(out)
                forward = milliseconds(call, device)
                backward = milliseconds(lambda: torch.autograd.grad(out, packed, dout, retain_graph=True), device)
        except RuntimeError:  # no such kernel for this type or device
            continue
        label = str(dtype).removeprefix("torch.")
        print(
            f"| {','.join(map(str, shape))} | {label} | {name} | {forward:.3f} | {flops / forward / 1e9:.1f} "
            f"| {backward:.3f} | {2.5 * flops / backward / 1e9:.1f} |",
            flush=True,
        )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("shapes", nargs="*", default=SHAPES, metavar="B,H,T,D")
    ap.add_argument("--device", choices=["cpu", "cuda", "mps"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args()
    if not {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}[args.device]:
        ap.error(f"--device {args.device}: this PyTorch ({torch.__version__}) finds none")
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"pytorch {torch.__version__} {name}")
    print("| attention B,H,T,D | dtype | variant | forward ms | TFLOP/s | backward ms | TFLOP/s |\n|---|---|---|---|---|---|---|")
    for text in args.shapes:
        shape = [int(number) for number in text.split(",")]
        if len(shape) != 4 or min(shape) < 1:
            ap.error(f"{text}: a shape is B,H,T,D")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows(shape, dtype, args.device)


if __name__ == "__main__":
    main()
