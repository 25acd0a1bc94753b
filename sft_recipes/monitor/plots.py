"""Draw a run's metrics as SVGs; `report.html.j2` lists the plots."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

from sft_recipes.monitor import stats
from sft_recipes.monitor.metrics_log import Points, Run
from sft_recipes.runtime.units import GIB

# Okabe and Ito's palette, safe for color-blind readers (https://jfly.uni-koeln.de/color/).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8f98", "#000000")
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY, BLACK = COLORS

_FEW = 60  # points that are drawn with markers


def svg(run: Run, unit: str, curves: Mapping[str, str], thresholds: Mapping[str, str]) -> str:
    """Return a plot of a run as an SVG document; empty if the run has none of its metrics.

    Args:
        unit: label of the y axis.
        curves: metric by label.
        thresholds: key of `monitor:` by label.
    """
    points = {label: run.points(key) for label, key in curves.items()}
    if not any(points.values()):
        return ""
    with drawing((8.4, 3.1)) as (canvas, axes):
        for number, (label, curve) in enumerate(points.items()):
            if curve:
                _draw_curve(axes, label, curve, GIB if unit == "GiB" else 1, COLORS[number % len(COLORS)])
        for label, key in thresholds.items():
            height = getattr(run.monitor, key)
            axes.axhline(height, color=GREY, linestyle="dashed", label=f"{label} ({height:g})")
        if unit == "norm":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        elif unit != "nats per token":
            axes.set_ylim(bottom=0)
        axes.set_xlim(0, max(run.last_step, run.plan.optimizer_steps or 1) * 1.01)
        axes.set_ylabel(unit)
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
        "path.simplify_threshold": 1.0,  # pixels: long curves stay small
    }
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=size, layout="constrained", facecolor="white")  # language: ok
        axes = canvas.add_subplot()
        axes.set_xlabel("optimizer step")
        axes.grid(color="#e6e8eb", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        yield canvas, axes


def _draw_curve(axes: Any, label: str, points: Points, scale: float, color: str) -> None:
    """Draw few points with markers; many faintly, below the medians of equal parts."""
    steps, values = [step for step, _ in points], [value / scale for _, value in points]
    if len(points) <= _FEW:
        axes.plot(steps, values, color=color, marker="o", markersize=3, label=label)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    medians = stats.blocks(steps, _FEW), stats.blocks(values, _FEW)
    axes.plot(*medians, color=color, linewidth=1.8, label=label)
