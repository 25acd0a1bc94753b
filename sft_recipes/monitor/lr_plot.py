"""Shows learning rates over a run: a table of the steps that matter, and a drawing of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.monitor import plots
from sft_recipes.planner import render
from sft_recipes.runtime.errors import UserError

# Dashes are what paper without colours keeps, and schedules lie on each other while they warm up.
_COLOURS = (plots.BLUE, plots.RED, plots.GREEN, plots.PURPLE, plots.ORANGE, plots.SKY, plots.GREY)
_DASHES = ("solid", "dashed", "dashdot", "dotted")
_FEW_STEPS = 30  # so few are drawn as points too


def table(curves: Mapping[str, Sequence[float]], warmup_steps: int) -> str:
    """The rates at the steps that tell schedules apart, a column a schedule.

    Args:
        curves: of each schedule the rate of every optimizer step, all of one length.
        warmup_steps: optimizer steps over which the rates rise.
    """
    total_steps = _total_steps(curves)
    rows = [["steps taken", *curves]]
    rows += [
        [f"{step:,}", *(f"{rates[step]:.2e}" for rates in curves.values())] for step in _told(total_steps, warmup_steps)
    ]
    return render.format_table(rows)


def _told(total_steps: int, warmup_steps: int) -> list[int]:
    """The first step, half of the warm-up and its end, the quarters of the run, the last step."""
    steps = (0, warmup_steps // 2, warmup_steps, total_steps // 4, total_steps // 2, total_steps * 3 // 4)
    return sorted({min(step, total_steps - 1) for step in (*steps, total_steps - 1)})


def plot(curves: Mapping[str, Sequence[float]], warmup_steps: int, peak: float, title: str, path: Path) -> None:
    """Draws the rates of every step into a .png or .svg file.

    Args:
        curves: as `table` takes them.
        title: the recipe; the number of steps is put behind it.

    Raises:
        UserError: another kind of file, or no such folder.
    """
    import matplotlib
    from matplotlib.figure import Figure

    check_path(path)
    # Text stays text in an SVG, and the same curves make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "schedules", "font.size": 11}):
        figure = Figure(figsize=(10, 5), layout="constrained")
        _draw(figure.add_subplot(), curves, warmup_steps, peak, title)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw(axes: Any, curves: Mapping[str, Sequence[float]], warmup_steps: int, peak: float, title: str) -> None:
    total_steps = _total_steps(curves)
    if warmup_steps:
        axes.axvspan(0, min(warmup_steps, total_steps - 1), color="0.92", label=f"warm-up: {warmup_steps:,}")
    axes.axhline(peak, color="0.6", linewidth=0.8, label="peak")
    for number, (name, rates) in enumerate(curves.items()):
        axes.plot(
            range(total_steps),
            rates,
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_DASHES[number % len(_DASHES)],
            linewidth=2,
            marker="o" if total_steps <= _FEW_STEPS else None,
            markersize=4,
        )
    axes.set_title(f"{title}: learning rate over {total_steps:,} optimizer steps, peak {peak:g}")
    axes.set_xlabel("optimizer steps taken")
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
    """Before anything is worked out for a file that cannot be written.

    Raises:
        UserError: another kind of file, or no such folder.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--plot: {path} is a {path.suffix or 'nameless'} file; wanted .png or .svg")
    if not path.parent.is_dir():
        raise UserError(f"--plot: there is no folder {path.parent} to write {path.name} to; make it, or name another")
