"""Plot a run's metrics as small inline SVGs: few points, text as text, no external resources."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sft_recipes.monitor import detectors, stats
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.stats import Points
from sft_recipes.runtime.units import GIB

# Okabe and Ito's palette, safe for color-blind readers (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8f98",
)  # fmt: skip
MAX_POINTS = 800  # per curve: more than a screen has columns


@dataclass(frozen=True)
class Curve:
    """A metric over steps: a `line`, one with `dots`, `points` without a line, or `smoothed` over the raw values."""

    label: str
    points: Points
    color: str
    kind: str = "line"


@dataclass(frozen=True)
class Plot:
    """One plot: title, caption, axis label, curves, thresholds (value, label), events (step, label, color)."""

    title: str
    caption: str
    unit: str
    curves: Sequence[Curve]
    thresholds: Sequence[tuple[float, str]] = ()
    events: Sequence[tuple[int, str, str]] = ()
    log: bool = False
    from_zero: bool = False


def plots(run: Run) -> list[Plot]:
    """The plots of a run; those whose metrics it does not have are left out."""
    learning = [_loss(run), _gap(run), _learning_rate(run), _gradient_norm(run), _accuracy(run)]
    system = [_throughput(run), _data_wait(run), _memory(run), _utilization(run)]
    return [plot for plot in [*learning, *system] if any(curve.points for curve in plot.curves)]


def _loss(run: Run) -> Plot:
    evaluations = run.points("eval_loss")
    curves = [Curve("training", run.points("loss"), BLUE, "smoothed"), Curve("validation", evaluations, RED, "dots")]
    for key, color in zip(run.source_losses, (GREEN, PURPLE, ORANGE, SKY, GREY) * len(run.source_losses), strict=False):
        curves.append(Curve(f"validation: {key[5:-5]}", run.points(key), color, "dots"))
    curves.append(Curve("retention set", run.points("eval_retention_loss"), "#000000", "dots"))
    best = min(evaluations, key=lambda point: point[1], default=None)
    values = stats.values(curves[0].points)
    return Plot(
        "Loss",
        "Cross-entropy of the completions, on training rows and on validation rows. Both should fall; a rising "
        "validation loss with a falling training loss is overfitting. final/ is the best step.",
        "nats per token",
        curves,
        events=[(best[0], f"best: {best[1]:.4g} at step {best[0]:,}", RED), *_non_finite(run)]
        if best
        else _non_finite(run),
        log=bool(values) and min(values) > 0 and max(values) > 30 * min(values),
    )


def _gap(run: Run) -> Plot:
    return Plot(
        "Gap between validation and training loss",
        "Above the line and growing: overfitting. A constant gap only shows that the two sets differ.",
        "nats per token",
        [Curve("validation minus training", run.train_eval_gaps(), PURPLE, "dots")],
        [(run.monitor.overfitting_gap, f"{run.monitor.overfitting_gap:g}: overfitting if it grows"), (0.0, "")],
    )


def _learning_rate(run: Run) -> Plot:
    logged, steps = run.points("learning_rate"), run.planned("optimizer_steps") or 0
    shown = sorted({1 + round(part * (steps - 1) / 400) for part in range(401)}) if steps > 1 else []
    planned = [(step, rate) for step in shown if (rate := run.scheduled_learning_rate(step)) is not None]
    return Plot(
        "Learning rate",
        "Rises during warm-up, then falls. The logged points should be on the planned line.",
        "learning rate",
        [Curve("planned", planned, ORANGE), Curve("logged", logged, BLUE, "points")] if logged else [],
        from_zero=True,
    )


def _gradient_norm(run: Run) -> Plot:
    points = [(step, norm) for step, norm in run.points("grad_norm") if norm > 0]
    lines = [(run.monitor.grad_norm_above, f"{run.monitor.grad_norm_above:g}: exploding")]
    if points and min(stats.values(points)) < 1e-4:
        lines.append((run.monitor.grad_norm_below, f"{run.monitor.grad_norm_below:g}: vanishing"))
    return Plot(
        "Gradient norm",
        "Before clipping. Single peaks are harmless; gradients that stay above the upper line explode, below "
        f"{run.monitor.grad_norm_below:g} they vanish.",
        "norm",
        [Curve("gradient norm", points, BLUE, "smoothed")],
        lines,
        events=_non_finite(run),
        log=True,
    )


def _accuracy(run: Run) -> Plot:
    return Plot(
        "Token accuracy",
        "The share of the completion tokens that the model predicts as the most likely token.",
        "share",
        [
            Curve("training", run.points("mean_token_accuracy"), BLUE, "smoothed"),
            Curve("validation", run.points("eval_mean_token_accuracy"), RED, "dots"),
        ],
    )


def _throughput(run: Run) -> Plot:
    return Plot(
        "Throughput",
        "Padded tokens (batch size times length), tokens, and supervised tokens (in the loss). The first two differ by "
        "padding, the last two by prompts. A lasting drop has a cause outside of the training code.",
        "tokens/s",
        [
            Curve("padded tokens", run.points("padded_tokens_per_second"), GREY, "smoothed"),
            Curve("tokens", run.points("tokens_per_second"), BLUE, "smoothed"),
            Curve("supervised tokens", run.points("supervised_tokens_per_second"), GREEN, "smoothed"),
        ],
        from_zero=True,
    )


def _data_wait(run: Run) -> Plot:
    return Plot(
        "Waiting for data",
        "The share of each step that waits for the data loader. It should be near zero.",
        "share of step time",
        [Curve("waiting", run.points("data_wait_fraction"), ORANGE, "smoothed")],
        [(run.monitor.data_wait, f"{run.monitor.data_wait:g}: input bound")],
        from_zero=True,
    )


def _memory(run: Run) -> Plot:
    names = {"peak": RED, "reserved": GREY, "allocated": BLUE}
    curves = [Curve(name, _gib(run.points(f"memory_{name}_bytes")), color) for name, color in names.items()]
    return Plot(
        "Memory",
        "Memory per GPU, and of the process on the host. Jumps at evaluations are usual; steady growth is a leak.",
        "GiB",
        [*curves, Curve("host", _gib(run.points("host_memory_bytes")), GREEN)],
        from_zero=True,
    )


def _utilization(run: Run) -> Plot:
    names = {"mfu": ("MFU", BLUE), "mfu_palm": ("MFU (PaLM)", SKY), "hfu": ("HFU", ORANGE)}
    return Plot(
        "FLOPs utilization",
        "The share of the GPU's peak FLOP/s used by the model (MFU), and including activation recomputation (HFU). 0.3 "
        "to 0.5 is usual for full fine-tuning.",
        "share of peak",
        [Curve(label, run.points(key), color, "smoothed") for key, (label, color) in names.items()],
        from_zero=True,
    )


def _gib(points: Points) -> Points:
    return [(step, value / GIB) for step, value in points]


def _non_finite(run: Run) -> list[tuple[int, str, str]]:
    """The first step with a NaN/Inf loss or gradient norm."""
    step = next((line["step"] for line in run.training if detectors.non_finite(line)), None)
    return [] if step is None else [(step, f"NaN/Inf at step {step:,}", "#000000")]


def thinned(points: Points) -> Points:
    """At most MAX_POINTS points: the lowest and the highest of each stretch, so that peaks stay."""
    if len(points) <= MAX_POINTS:
        return points
    stretch, kept = math.ceil(2 * len(points) / MAX_POINTS), []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def svg(plot: Plot, last_step: int) -> str:
    """The plot as an `<svg>` element, with `last_step` optimizer steps on the x axis."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure  # language: ok

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.title,  # two plots on one page share no id
        "font.family": "sans-serif",
        "font.size": 10,
        "path.simplify": True,
        "path.simplify_threshold": 0.5,
        "axes.formatter.useoffset": False,
        "text.parse_math": False,  # a data source may have $ in its name
    }
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(8.4, 3.1), layout="constrained", facecolor="white")  # language: ok
        FigureCanvasSVG(drawing)
        _draw(drawing.add_subplot(), plot, last_step)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _minimize(buffer.getvalue(), plot.title)


def _draw(axes: Any, plot: Plot, last_step: int) -> None:
    from matplotlib.ticker import LogFormatter

    for curve in plot.curves:
        _draw_curve(axes, curve)
    for height, label in plot.thresholds:
        axes.axhline(height, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
        position = {"xy": (0.995, height), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(label, **position, xytext=(0, 3), textcoords="offset points", fontsize=8.5, color="#444444")
    for step, label, color in plot.events:
        axes.axvline(step, color=color, linewidth=1.2, linestyle=(0, (1, 2)), label=label)
    axes.margins(y=0.1)
    if plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # labels if they fit
    elif plot.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(last_step, 1) * 1.01)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(plot.unit)
    axes.grid(color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.17), ncols=4, frameon=False, fontsize=9, borderaxespad=0)


def _draw_curve(axes: Any, curve: Curve) -> None:
    if not curve.points:
        return
    steps, values = zip(*thinned(curve.points), strict=True)
    if curve.kind == "dots":
        size = 4 if len(steps) <= 60 else 2
        axes.plot(steps, values, color=curve.color, linewidth=1.2, marker="o", markersize=size, label=curve.label)
    elif curve.kind == "points":
        axes.plot(steps, values, color=curve.color, linestyle="", marker="o", markersize=3, label=curve.label)
    elif curve.kind == "smoothed" and len(curve.points) >= 12:
        axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.3)
        axes.plot(*zip(*_smoothed(curve.points), strict=True), color=curve.color, linewidth=1.8, label=curve.label)
    else:
        axes.plot(steps, values, color=curve.color, linewidth=1.6, label=curve.label)


def _smoothed(points: Points) -> Points:
    """The moving median over a twentieth of the run; a long run is first reduced to medians of stretches."""
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    medians = [(part[len(part) // 2][0], median(stats.values(part))) for part in parts]
    width = max(len(medians) // 20, 5)
    smoothed = stats.smooth(stats.values(medians), width)
    return list(zip([step for step, _ in medians[width // 2 :]], smoothed, strict=False))


def _minimize(document: str, title: str) -> str:
    """Remove what an inline SVG does not need: prolog, metadata, namespaces, and unused ids."""
    inner = document[document.index("<svg") :]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", inner).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w-]+)", inner))
    inner = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", inner)
    inner = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", inner, count=1)
    inner = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", inner, count=1)
    return inner.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).replace("\n", " ").strip()
