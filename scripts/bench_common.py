"""What the benchmarks of the peers share: the shapes, the names of machine and system, and the report of docs/bench-schema.md."""

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

# GPT-2 124M's.
SHAPES = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, dropout=0.0, bias=False, batch_size=12)

# What gpt-wgpu's bench takes for a dataset whose configuration leaves vocab_size out; for others GPT-2's, padded.
VOCABULARIES = dict(shakespeare_char=65, builtin=60)


def boolean(text):
    """argparse's type for --bias, --bias true, --bias=False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_keys(ap, defaults):
    """A flag for every key of a configuration, with _ or with -; None where it is not given."""
    for name, default in defaults.items():
        kind = dict(type=boolean, nargs="?", const=True) if type(default) is bool else dict(type=type(default))
        ap.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), dest=name, **kind, help=f"({default})")


def add_arguments(ap):
    """The flags that every peer has: shapes, iterations, files."""
    ap.add_argument("--config", type=Path, metavar="TOML", help="nanoGPT's names, in whatever tables; other keys are ignored")
    add_keys(ap, SHAPES)
    ap.add_argument("--warmup", type=int, default=5, help="iterations before the timed ones, at least 1 (%(default)s)")
    ap.add_argument("--iters", type=int, default=20, help="timed iterations (%(default)s)")
    ap.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    ap.add_argument("--check", type=Path, metavar="GOLDEN", help="compare with a golden file, and exit with 0 or 1")


def shapes(args):
    """The model's keys and batch_size: defaults, then the config file, then the flags."""
    out = dict(SHAPES)
    if args.config:
        doc = tomllib.loads(args.config.read_text())
        for table in [doc, *(v for v in doc.values() if isinstance(v, dict))]:
            if table.get("dataset") in VOCABULARIES:
                out["vocab_size"] = VOCABULARIES[table["dataset"]]
            out |= {k: type(SHAPES[k])(v) for k, v in table.items() if k in SHAPES}
    return out | {k: v for k, v in vars(args).items() if k in SHAPES and v is not None}


def cpu_name():
    """The processor as its system calls it; the standard library often knows no more than the architecture."""
    try:
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        if sys.platform == "darwin":
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    except (OSError, StopIteration, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def os_name():
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def report(args, samples, losses, **known):
    """The report of the timed iterations, in the schema's order; `known` are the keys that only the peer knows."""
    if not all(map(math.isfinite, losses)):
        sys.exit(f"a loss is not finite, so the times mean nothing: {losses}")
    config = shapes(args) | {"gelu": "erf", "gradient_accumulation_steps": 1}
    median = statistics.median(samples)
    order = ["program", "program_version", "commit", "machine", "device", "date", "dtype", "products", "kernels",
             "recompute", "compiled"]
    known["machine"] = {"os": os_name(), "arch": platform.machine(), "cpu": cpu_name(), "threads": known.pop("threads")}
    known["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "schema": "gpt-wgpu-bench",
        "version": 1,
        **{key: known.get(key) for key in order},
        "data": "random tokens",
        "config": config,
        "warmup": args.warmup,
        "samples_ms": samples,
        "median_ms": median,
        "min_ms": min(samples),
        "max_ms": max(samples),
        "tokens_per_s": config["batch_size"] * config["block_size"] / median * 1e3,
        "mfu_measured": None,
        "mfu_published": None,
        "time_to_first_step_s": known["time_to_first_step_s"],
        "peak_memory_bytes": known["peak_memory_bytes"],
        "energy": None,
        "energy_reason": f"{Path(sys.argv[0]).name} does not measure it",
        "ops": None,
        "timer": "host clock",
        "losses": losses,  # of the timed iterations
    }


def tell(r, path):
    """Prints the report in a line, and writes it to `path` if there is one."""
    memory = f", peak {r['peak_memory_bytes'] / 2**30:.2f} GiB" if r["peak_memory_bytes"] is not None else ""
    print(f"{r['program']} {r['program_version']} {r['device']['name']} {r['dtype']}{' compiled' if r['compiled'] else ''}: "
          f"{r['median_ms']:.2f} ms/iter (min {r['min_ms']:.2f}, max {r['max_ms']:.2f}), {r['tokens_per_s']:,.0f} tokens/s, "
          f"first step after {r['time_to_first_step_s']:.1f} s{memory}")
    if path:
        path.write_text(json.dumps(r, indent=1) + "\n")


def verdict(worst, golden, device, tolerance):
    """Prints how far the results are from the golden's, by name, and whether all are within the tolerance."""
    ok = all(diff <= tolerance for diff in worst.values())  # false for nan
    for name, diff in worst.items():
        print(f"{name:6} differs by {diff:.2e} at most (allowed {tolerance:.0e})")
    print(f"{'PASS' if ok else 'FAIL'} {golden} on {device}")
    return ok
