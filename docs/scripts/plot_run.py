#!/usr/bin/env python3
"""Draw loss, learning rate and gradient norm of a run: docs/scripts/plot_run.py runs/tiny-1 docs/images/tiny-run.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = (("loss", "eval_loss"), ("learning_rate",), ("grad_norm",))


def main(run: str, image: str) -> None:
    """Draw the metrics of `run` into the file `image`."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    drawing, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3), layout="constrained")
    for axis, names in zip(axes, PANELS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            axis.plot(
                *zip(*points, strict=True), label=name, linewidth=1.2, marker="o" if name == "eval_loss" else None
            )
        axis.set_xlabel("optimizer step")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    drawing.savefig(image, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
