"""Plot the results files, as `plots/NAME-MACHINE.svg` and `.png`.

    .venv/bin/python benchmarks/plots.py

Throughput of training (bench), forecast and measured memory (memory), attention implementations (attention), this
project compared with other trainers (comparison), and losses of every strategy compared with one process (engines).
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
from matplotlib.figure import Figure as Canvas  # noqa: E402  # language: ok
from matplotlib.ticker import LogLocator, MaxNLocator  # noqa: E402

from sft_recipes.monitor.plots import BLUE, GREEN, GREY, ORANGE, RED  # noqa: E402

IMPLEMENTATIONS = {"eager": GREY, "sdpa": ORANGE, "varlen": BLUE, "flash_attention_2": GREEN}


def main() -> int:
    """Plot every results file of a known kind, and print the paths."""
    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})  # text stays text
    drawn = 0
    for kind, draw in PLOTS.items():
        for file in sorted((HERE / "results").glob(f"{kind}-*.json")):
            canvas = Canvas(figsize=(9, 3.6), layout="constrained")
            draw(canvas, json.loads(file.read_text()))
            for ending in ("svg", "png"):
                target = HERE / "plots" / f"{file.stem}.{ending}"
                target.parent.mkdir(exist_ok=True)
                canvas.savefig(target, dpi=110, metadata={"Date": None} if ending == "svg" else None)
                print(target.relative_to(HERE.parent))
            drawn += 1
    return 0 if drawn else 1


def _bars(axes: Any, labels: list[str], values: list[float], colors: list[str] | str, form: str) -> None:
    bars = axes.barh(labels, values, color=colors)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.spines[["top", "right"]].set_visible(False)


def _measured(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows without a failure."""
    return {name: row for name, row in content["rows"].items() if "failed" not in row}


def throughput(canvas: Canvas, content: dict[str, Any]) -> None:
    """Throughput and MFU of each case."""
    left, right = canvas.subplots(1, 2, sharey=True)
    rows = _measured(content)
    _bars(left, list(rows), [row["tokens_per_second"] for row in rows.values()], BLUE, "{:,.0f}")
    left.invert_yaxis()
    left.set_title("tokens/s, without padding", fontsize=9)
    shares = [row["mfu"]["causal, matrix product, measured"] for row in rows.values()]
    _bars(right, list(rows), shares, GREEN, "{:.1%}")
    right.set_title("MFU (causal), of a large matrix product", fontsize=9)


def memory(canvas: Canvas, content: dict[str, Any]) -> None:
    """Forecast and measured peaks."""
    axes = canvas.subplots()
    rows = _measured(content)
    for shift, key, color, label in (
        (-0.2, "planned_bytes", ORANGE, "forecast"), (0.2, "peak_bytes", BLUE, "measured"),
    ):  # fmt: skip
        at = [place + shift for place in range(len(rows))]
        axes.barh(at, [row[key] / 2**20 for row in rows.values()], height=0.38, color=color, label=label)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("MiB per rank, peak of training")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def attention(canvas: Canvas, content: dict[str, Any]) -> None:
    """Time and memory of a forward and backward pass by row length, packed rows and rows of one example."""
    panels = canvas.subplots(1, 4)
    for panel, (packed, key, scale) in zip(
        panels, [(packed, *of) for packed in (False, True) for of in (("seconds", 1e3), ("bytes", 2**-20))], strict=True
    ):
        for name, color in IMPLEMENTATIONS.items():
            points = [
                (row["tokens"], row[key] * scale)
                for row in content["rows"]
                if row["way"] == name and row["packed"] == packed and row[key]
            ]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=color, label=name, markersize=3, linewidth=1.2)
        lengths = sorted({row["tokens"] for row in content["rows"]})
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_minor_formatter("")
        panel.set_xlabel("tokens per row", fontsize=8)
        what = "ms" if key == "seconds" else "MiB"
        panel.set_title(f"{'packed' if packed else 'one example'}: {what}", fontsize=9)
        panel.tick_params(labelsize=7, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)


def comparison(canvas: Canvas, content: dict[str, Any]) -> None:
    """Seconds of complete jobs and of steps."""
    left, right = canvas.subplots(1, 2, sharey=True)
    rows = _measured(content)
    colors = [BLUE if name.startswith("sft-recipes") else GREY for name in rows]
    for axes, key, title, form in (
        (left, "seconds", f"seconds from command to saved model, {content['steps']} steps", "{:.0f}"),
        (right, "step", "seconds per step", "{:.2f}"),
    ):
        _bars(axes, list(rows), [row[key] for row in rows.values()], colors, form)
        axes.set_title(title, fontsize=9)
    left.invert_yaxis()


def losses(canvas: Canvas, content: dict[str, Any]) -> None:
    """Differences of each strategy's losses and weights from those of one process."""
    axes = canvas.subplots()
    rows = content["rows"]
    names = [
        f"{row['engine']}, {row['processes']} {'packed' if row['packing'] else 'padded'} {row['precision']}"
        for row in rows
    ]
    for key, color in (("loss", BLUE), ("eval_loss", ORANGE), ("weight", RED)):
        points = [(max(row[key], 1e-9), name) for row, name in zip(rows, names, strict=True)]
        axes.plot(*zip(*points, strict=True), "o", color=color, label=key, markersize=4)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel("largest difference from one process, relative (0 is plotted at 1e-9)", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


PLOTS: dict[str, Callable[[Canvas, dict[str, Any]], None]] = {
    "bench": throughput,
    "memory": memory,
    "attention": attention,
    "comparison": comparison,
    "engines": losses,
}

if __name__ == "__main__":
    sys.exit(main())
