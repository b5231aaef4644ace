"""What the PyTorch scripts share: the device, the precision of products, waiting, and AdamW."""

from contextlib import nullcontext

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_torch_arguments(ap):
    """The flags that every PyTorch script has."""
    ap.add_argument("--device", choices=["cpu", "cuda", "mps"], help="the best that is there, unless given")
    ap.add_argument("--dtype", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32", help="bf16, fp16: autocast (%(default)s)")
    ap.add_argument("--compile", action="store_true", help="torch.compile the model")
    ap.add_argument("--threads", type=int, help="CPU threads of PyTorch")


def settle(ap, args):
    """Chooses the device where none is given, and refuses what it cannot do."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = args.device or next(d for d, there in available.items() if there)
    if not available[args.device]:
        ap.error(f"--device {args.device}: this PyTorch ({torch.__version__}) finds none")
    if args.dtype == "tf32" and args.device != "cuda":
        ap.error("--dtype tf32 exists on --device cuda only")
    if args.threads:
        torch.set_num_threads(args.threads)


def precision(args):
    """The context of the forward pass and the gradients' scaler, which does nothing but for fp16."""
    # As nanoGPT does, TF32 is allowed beside autocast; fp32 means fp32.
    torch.set_float32_matmul_precision("highest" if args.dtype == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = args.dtype != "fp32"
    autocast = torch.autocast(args.device, AUTOCAST[args.dtype]) if args.dtype in AUTOCAST else nullcontext()
    return autocast, torch.amp.GradScaler(args.device, enabled=args.dtype == "fp16")


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def fused_adamw(groups, **options):
    """AdamW, fused where this PyTorch has it for the device; and whether it is."""
    try:
        return torch.optim.AdamW(groups, **options, fused=True), True
    except RuntimeError:
        return torch.optim.AdamW(groups, **options), False
