#!/usr/bin/env python3
"""Losses of training runs side by side: the first run's, and how far every other one is from it.

    python scripts/compare_losses.py ours theirs [more ...] [--labels "gpt-wgpu,PyTorch fp32"] [--markdown] [--png losses.png]

A run is a metrics.jsonl or the out_dir that holds one, of gpt-wgpu or of train_pytorch.py. Only steps that every run logged are
compared. Nothing but Python is needed; --png needs matplotlib.
"""

import argparse
import json
import math
import sys
from pathlib import Path

STEPS = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
LAST = 10  # steps of the mean at the end: one step's loss is its batch's, more than the model's


def read(path):
    """The training loss by step; an unfinished last line, of a run that still writes, is left out."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    losses = {}
    try:
        text = path.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            record = json.loads(line)
            if "loss" in record:
                losses[record["step"]] = math.nan if record["loss"] is None else record["loss"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        sys.exit(f"{path} is no metrics.jsonl: {error!r}")
    return losses


def mean(values):
    return sum(values) / len(values)


def cell(value, first):
    """A loss, and for all but the first run its distance from the first's."""
    return f"{value:.6f}" if first is None else f"{value:.6f} ({value - first:+.1e})"


def table(runs, labels, steps, shown):
    """Rows of text, the first the head: losses at the shown steps and in the mean of the last ones, then the extremes."""
    first, *others = runs
    rows = [["step", *labels]]
    for step in shown:
        rows.append([str(step), *(cell(run[step], first[step] if i else None) for i, run in enumerate(runs))])
    last = steps[-LAST:]
    means = [mean([run[step] for step in last]) for run in runs]
    rows.append([f"mean of {last[0]}..{last[-1]}", *(cell(m, means[0] if i else None) for i, m in enumerate(means))])
    for name, part in [(f"largest to {STEPS[5]}", [s for s in steps if s <= STEPS[5]]), ("largest", steps)]:
        found = ["-"]
        for run in others:
            # A loss that is not a number is the largest difference there is.
            distance = {step: abs(run[step] - first[step]) for step in part}
            worst = max(part, key=lambda step: math.inf if math.isnan(distance[step]) else distance[step])
            found.append(f"{distance[worst]:.1e} at {worst}")
        if part:
            rows.append([name, *found])
    return rows


def show(rows, markdown):
    if markdown:
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows)


def plot(runs, labels, steps, path):
    """Two charts, one above the other: the losses, and the distances from the first run on a logarithmic axis."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("--png needs matplotlib (pip install matplotlib); the table needs nothing")
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 7), layout="constrained")
    for i, (run, label) in enumerate(zip(runs, labels)):
        above.plot(steps, [run[s] for s in steps], color=f"C{i}", label=label)
        if i:
            below.semilogy(steps, [abs(run[s] - runs[0][s]) for s in steps], color=f"C{i}")
    above.set_ylabel("loss, nats")
    below.set(xlabel="step", ylabel=f"distance from {labels[0]}, nats")
    above.legend()
    figure.savefig(path, dpi=150)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    ap.add_argument("--labels", help="names of the runs, with commas between; without it, those of the files or folders")
    ap.add_argument("--steps", help="the steps to show, with commas between (the last one is always shown)")
    ap.add_argument("--markdown", action="store_true")
    ap.add_argument("--png", type=Path, metavar="FILE")
    args = ap.parse_args()
    labels = args.labels.split(",") if args.labels else [path.stem if path.is_file() else path.name for path in args.runs]
    if len(args.runs) < 2 or len(labels) != len(args.runs):
        ap.error(f"{len(args.runs)} runs and {len(labels)} labels; there must be as many, and two at least")
    runs = [read(path) for path in args.runs]
    steps = sorted(set.intersection(*map(set, runs)))
    if not steps:
        sys.exit("the runs logged no step in common")
    wanted = [int(step) for step in args.steps.split(",")] if args.steps else STEPS
    shown = sorted({step for step in wanted if step in steps} | {steps[-1]})
    print(show(table(runs, labels, steps, shown), args.markdown))
    if args.png:
        plot(runs, labels, steps, args.png)


if __name__ == "__main__":
    main()
