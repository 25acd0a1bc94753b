"""Plot a run's metrics as SVGs that the report embeds."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from sft_recipes.monitor import stats
from sft_recipes.monitor.metrics_log import Points, Run
from sft_recipes.runtime.units import GIB

# Okabe and Ito's palette, safe for color-blind readers (https://jfly.uni-koeln.de/color/).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8f98", "#000000")
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY, BLACK = COLORS

_FEW = 60  # points that are drawn with markers


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        unit: label of the y axis.
        curves: metric by label.
        thresholds: key of `monitor:` by label.
    """

    title: str
    caption: str
    unit: str
    curves: Mapping[str, str]
    thresholds: Mapping[str, str] = field(default_factory=dict)


PLOTS = (
    Plot(
        "Loss",
        "Cross-entropy of the completions. A rising validation loss with a falling training loss is overfitting.",
        "nats per token",
        {"training": "loss", "validation": "eval_loss", "retention set": "eval_retention_loss"},
    ),
    Plot(
        "Gap between validation and training loss",
        "Above the line and growing: overfitting. A constant gap only shows that the two sets differ.",
        "nats per token",
        {"validation minus training": "train_eval_gap"},
        {"overfitting if it grows": "overfitting_gap"},
    ),
    Plot(
        "Learning rate",
        "Rises during warm-up, then falls. The logged curve should be on the planned one.",
        "learning rate",
        {"planned": "scheduled_learning_rate", "logged": "learning_rate"},
    ),
    Plot(
        "Gradient norm",
        "Before clipping. Single peaks are harmless; gradients that stay above the line explode.",
        "norm",
        {"gradient norm": "grad_norm"},
        {"exploding": "grad_norm_above"},
    ),
    Plot(
        "Token accuracy",
        "The share of the completion tokens that the model predicts as the most likely token.",
        "share",
        {"training": "mean_token_accuracy", "validation": "eval_mean_token_accuracy"},
    ),
    Plot(
        "Throughput",
        "Without padding, and of tokens in the loss. A lasting drop has a cause outside of the training code.",
        "tokens/s",
        {"tokens": "tokens_per_second", "supervised tokens": "supervised_tokens_per_second"},
    ),
    Plot(
        "Waiting for data",
        "The share of each step that waits for the data loader. It should be near zero.",
        "share of step time",
        {"waiting": "data_wait_fraction"},
        {"input bound": "data_wait"},
    ),
    Plot(
        "Memory",
        "Per GPU, and of the process on the host. Jumps at evaluations are usual; steady growth is a leak.",
        "GiB",
        {"allocated": "memory_allocated_bytes", "peak": "memory_peak_bytes", "host": "host_memory_bytes"},
    ),
    Plot(
        "FLOPs utilization",
        "The share of the GPU's peak FLOP/s used by the model (MFU), and including activation recomputation (HFU).",
        "share of peak",
        {"MFU": "mfu", "HFU": "hfu"},
    ),
)


def svg(plot: Plot, run: Run) -> str:
    """The plot of a run as an SVG document; empty if the run has none of its metrics."""
    curves = {label: run.points(key) for label, key in plot.curves.items()}
    if plot.title == "Loss":
        curves |= {f"validation: {key[5:-5]}": run.points(key) for key in run.source_losses}
    if not any(curves.values()):
        return ""
    with drawing((8.4, 3.1)) as (canvas, axes):
        for (label, points), color in zip(curves.items(), itertools.cycle(COLORS), strict=False):
            if points:
                scale = GIB if plot.unit == "GiB" else 1
                _draw_curve(axes, label, [(step, value / scale) for step, value in points], color)
        for label, key in plot.thresholds.items():
            height = getattr(run.monitor, key)
            axes.axhline(height, color=GREY, linestyle="dashed", label=f"{label} ({height:g})")
        if plot.unit == "norm":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        elif plot.unit != "nats per token":
            axes.set_ylim(bottom=0)
        axes.set_xlim(0, max(run.last_step, run.plan.get("optimizer_steps") or 1) * 1.01)
        axes.set_ylabel(plot.unit)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.17), ncols=5, frameon=False, fontsize=9, borderaxespad=0)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


@contextlib.contextmanager
def drawing(size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Yield a canvas with axes over optimizer steps, in the style of all plots."""
    import matplotlib
    from matplotlib.figure import Figure  # language: ok

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "sft_recipes",  # ids are reproducible
        "axes.formatter.useoffset": False,
        "text.parse_math": False,  # a data source may have $ in its name
    }
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=size, layout="constrained", facecolor="white")  # language: ok
        axes = canvas.add_subplot()
        axes.set_xlabel("optimizer step")
        axes.grid(color="#e6e8eb", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        yield canvas, axes


def _draw_curve(axes: Any, label: str, points: Points, color: str) -> None:
    """Draw few points with markers; many as their lowest and highest per stretch, with a moving median."""
    if len(points) <= _FEW:
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)
        return
    width, stretch = max(len(points) // 20, 5), math.ceil(len(points) / 400)
    values, extremes, medians = stats.values(points), [], []
    for start in range(0, len(points), stretch):
        part = sorted(points[start : start + stretch], key=lambda point: point[1])
        extremes += sorted({part[0], part[-1]})
        half = min(width // 2, start, len(points) - 1 - start)
        medians.append((points[start][0], median(values[start - half : start + half + 1 : math.ceil(width / 100)])))
    axes.plot(*zip(*extremes, strict=True), color=color, linewidth=0.8, alpha=0.3)
    axes.plot(*zip(*medians, strict=True), color=color, linewidth=1.8, label=label)
