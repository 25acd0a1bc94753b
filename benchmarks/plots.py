"""Draws what was measured, as `plots/NAME-MACHINE.svg` and `.png`, from the results files alone.

    .venv/bin/python benchmarks/plots.py

Throughput of whole training (bench), memory told beforehand and measured (memory), ways to attend (attention), this
project beside others (beside), and the losses of every engine beside one process's (engines).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator  # noqa: E402

from sft_recipes.monitor.plots import BLUE, GREEN, GREY, ORANGE, RED  # noqa: E402

WAYS = {"eager": GREY, "sdpa": ORANGE, "varlen": BLUE, "flash_attention_2": GREEN}


def main() -> int:
    """Draws every results file that there is a drawing for; the names of what was written."""
    matplotlib.rcParams["svg.hashsalt"] = "the same figures are the same bytes"
    drawn = 0
    for kind, draw in DRAWINGS.items():
        for file in sorted((HERE / "results").glob(f"{kind}-*.json")):
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            draw(figure, json.loads(file.read_text()))
            for ending in ("svg", "png"):
                target = HERE / "plots" / f"{file.stem}.{ending}"
                target.parent.mkdir(exist_ok=True)
                figure.savefig(target, dpi=110, metadata={"Date": None} if ending == "svg" else None)
                print(target.relative_to(HERE.parent))
            drawn += 1
    return 0 if drawn else 1


def _bars(axes: Any, labels: list[str], values: list[float], colours: list[str] | str, form: str) -> None:
    bars = axes.barh(labels, values, color=colours)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.spines[["top", "right"]].set_visible(False)


def _measured(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that did not fail."""
    return {name: row for name, row in content["rows"].items() if "failed" not in row}


def throughput(figure: Figure, content: dict[str, Any]) -> None:
    """Tokens a second, and the share of what the device can, case by case."""
    left, right = figure.subplots(1, 2, sharey=True)
    rows = _measured(content)
    _bars(left, list(rows), [row["tokens_per_second"] for row in rows.values()], BLUE, "{:,.0f}")
    left.invert_yaxis()
    left.set_title("tokens a second, padding not counted", fontsize=9)
    shares = [row["mfu"]["causal, matrix product, measured"] for row in rows.values()]
    _bars(right, list(rows), shares, GREEN, "{:.1%}")
    right.set_title("MFU (causal), of a large matrix product here", fontsize=9)


def memory(figure: Figure, content: dict[str, Any]) -> None:
    """Told and measured peaks side by side."""
    axes = figure.subplots()
    rows = _measured(content)
    for shift, key, colour, label in (
        (-0.2, "planned_bytes", ORANGE, "told by the plan"), (0.2, "peak_bytes", BLUE, "measured"),
    ):  # fmt: skip
        at = [place + shift for place in range(len(rows))]
        axes.barh(at, [row[key] / 2**20 for row in rows.values()], height=0.38, color=colour, label=label)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("MiB a rank, at the peak of training")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def ways(figure: Figure, content: dict[str, Any]) -> None:
    """Time and memory of a pass over the row's length, packed rows and rows of one example."""
    panels = figure.subplots(1, 4)
    for panel, (packed, key, scale) in zip(
        panels, [(packed, *of) for packed in (False, True) for of in (("seconds", 1e3), ("bytes", 2**-20))], strict=True
    ):
        for way, colour in WAYS.items():
            points = [
                (row["tokens"], row[key] * scale)
                for row in content["rows"]
                if row["way"] == way and row["packed"] == packed and row[key]
            ]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=colour, label=way, markersize=3, linewidth=1.2)
        lengths = sorted({row["tokens"] for row in content["rows"]})
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_minor_formatter("")
        panel.set_xlabel("tokens a row", fontsize=8)
        what = "ms" if key == "seconds" else "MiB"
        panel.set_title(f"{'packed' if packed else 'one example'}: {what}", fontsize=9)
        panel.tick_params(labelsize=7, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)


def beside(figure: Figure, content: dict[str, Any]) -> None:
    """Whole jobs and steps."""
    left, right = figure.subplots(1, 2, sharey=True)
    rows = _measured(content)
    colours = [BLUE if name.startswith("sft-recipes") else GREY for name in rows]
    for axes, key, title, form in (
        (left, "seconds", f"seconds from command to saved model, {content['steps']} steps", "{:.0f}"),
        (right, "step", "seconds a step", "{:.2f}"),
    ):
        _bars(axes, list(rows), [row[key] for row in rows.values()], colours, form)
        axes.set_title(title, fontsize=9)
    left.invert_yaxis()


def losses(figure: Figure, content: dict[str, Any]) -> None:
    """How far each engine's losses and weights stray from one process's."""
    axes = figure.subplots()
    rows = content["rows"]
    names = [
        f"{row['engine']}, {row['processes']} {'packed' if row['packing'] else 'padded'} {row['precision']}"
        for row in rows
    ]
    for key, colour in (("loss", BLUE), ("eval_loss", ORANGE), ("weight", RED)):
        points = [(max(row[key], 1e-9), name) for row, name in zip(rows, names, strict=True)]
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=key, markersize=4)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel("largest difference from one process, relative (0 is drawn at 1e-9)", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


DRAWINGS: dict[str, Callable[[Figure, dict[str, Any]], None]] = {
    "bench": throughput,
    "memory": memory,
    "attention": ways,
    "beside": beside,
    "engines": losses,
}

if __name__ == "__main__":
    sys.exit(main())
