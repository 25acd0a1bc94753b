"""Learning-rate schedules as a table of characteristic steps, and as a plot of all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.monitor import plots
from sft_recipes.planner import render
from sft_recipes.runtime.errors import UserError

# Dashes distinguish curves without color, and schedules overlap during warm-up.
_COLORS = (plots.BLUE, plots.RED, plots.GREEN, plots.PURPLE, plots.ORANGE, plots.SKY, plots.GREY)
_DASHES = ("solid", "dashed", "dashdot", "dotted")
_MARKER_STEPS = 30  # up to this many are drawn with markers


def table(curves: Mapping[str, Sequence[float]], warmup_steps: int) -> str:
    """The learning rates at the steps that distinguish schedules, one column per schedule.

    Args:
        curves: the learning rate of every optimizer step by schedule, all of equal length.
        warmup_steps: optimizer steps over which the learning rate rises.
    """
    total_steps = _total_steps(curves)
    rows = [["step", *curves]]
    rows += [
        [f"{step:,}", *(f"{rates[step]:.2e}" for rates in curves.values())]
        for step in _table_steps(total_steps, warmup_steps)
    ]
    return render.format_table(rows)


def _table_steps(total_steps: int, warmup_steps: int) -> list[int]:
    """First step, middle and end of the warm-up, quarters of the run, last step."""
    steps = (0, warmup_steps // 2, warmup_steps, total_steps // 4, total_steps // 2, total_steps * 3 // 4)
    return sorted({min(step, total_steps - 1) for step in (*steps, total_steps - 1)})


def plot(curves: Mapping[str, Sequence[float]], warmup_steps: int, peak: float, title: str, path: Path) -> None:
    """Plot the learning rate of every step into a .png or .svg file.

    Args:
        curves: as in `table`.
        title: the recipe; the number of steps is appended.

    Raises:
        UserError: unsupported file type, or no such directory.
    """
    import matplotlib
    from matplotlib.figure import Figure  # language: ok

    check_path(path)
    # Text stays text in an SVG, and ids are reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "schedules", "font.size": 11}):
        drawing = Figure(figsize=(10, 5), layout="constrained")  # language: ok
        _draw(drawing.add_subplot(), curves, warmup_steps, peak, title)
        drawing.legend(loc="outside right upper", frameon=False)
        drawing.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw(axes: Any, curves: Mapping[str, Sequence[float]], warmup_steps: int, peak: float, title: str) -> None:
    total_steps = _total_steps(curves)
    if warmup_steps:
        axes.axvspan(0, min(warmup_steps, total_steps - 1), color="0.92", label=f"warm-up: {warmup_steps:,} steps")
    axes.axhline(peak, color="0.6", linewidth=0.8, label="peak")
    for number, (name, rates) in enumerate(curves.items()):
        axes.plot(
            range(total_steps),
            rates,
            label=name,
            color=_COLORS[number % len(_COLORS)],
            linestyle=_DASHES[number % len(_DASHES)],
            linewidth=2,
            marker="o" if total_steps <= _MARKER_STEPS else None,
            markersize=4,
        )
    axes.set_title(f"{title}: learning rate over {total_steps:,} optimizer steps, peak {peak:g}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _total_steps(curves: Mapping[str, Sequence[float]]) -> int:
    return len(next(iter(curves.values())))


def check_path(path: Path) -> None:
    """Check that a plot can be written, before anything is computed for it.

    Raises:
        UserError: unsupported file type, or no such directory.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--plot: unsupported file type: found {path.name!r}, expected .png or .svg")
    if not path.parent.is_dir():
        raise UserError(f"--plot: no such directory: {path.parent}. Create it, or set another path")
