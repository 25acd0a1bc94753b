"""Learning-rate schedules as a table of characteristic steps, and as a plot of all steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_recipes.monitor import plots
from sft_recipes.planner import render
from sft_recipes.runtime.errors import UserError

_DASHES = ("solid", "dashed", "dashdot", "dotted")  # schedules overlap during warm-up


def table(curves: Mapping[str, Sequence[float]], warmup_steps: int) -> str:
    """The learning rates at the steps that distinguish schedules, one column per schedule.

    Args:
        curves: the learning rate of every optimizer step by schedule, all of equal length.
        warmup_steps: optimizer steps over which the learning rate rises.
    """
    total = len(next(iter(curves.values())))
    steps = (0, warmup_steps // 2, warmup_steps, total // 4, total // 2, total * 3 // 4, total - 1)
    rows = [
        [f"{step:,}", *(f"{rates[step]:.2e}" for rates in curves.values())]
        for step in sorted({min(step, total - 1) for step in steps})
    ]
    return render.format_table([["step", *curves], *rows])


def check_path(path: Path) -> None:
    """Check that a plot can be written, before anything is computed for it.

    Raises:
        UserError: unsupported file type, or no such directory.
    """
    if path.suffix.lower() not in (".png", ".svg") or not path.parent.is_dir():
        raise UserError(f"--plot: found {path}, expected a .png or .svg file in an existing directory")


def plot(curves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Plot the learning rate of every step into a .png or .svg file.

    Args:
        curves: as in `table`.
        title: the recipe; the number of steps is appended.
    """
    total = len(next(iter(curves.values())))
    with plots.drawing((10, 5)) as (canvas, axes):
        for number, (name, rates) in enumerate(curves.items()):
            style = {"color": plots.COLORS[number % len(plots.COLORS)], "linestyle": _DASHES[number % len(_DASHES)]}
            axes.plot(rates, label=name, marker="o" if total <= 30 else None, **style)
        axes.set(title=f"{title}: learning rate over {total:,} optimizer steps", ylabel="learning rate")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        canvas.legend(loc="outside right upper", frameon=False)
        canvas.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
