"""Draws a run's curves as small SVGs that stand inside a page: few points, text as text, nothing to load."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sft_recipes.monitor import stats
from sft_recipes.monitor.metrics_log import Points, Run, number
from sft_recipes.runtime.units import GIB

# Okabe and Ito's colours, which people of every colour vision tell apart (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8f98",
)  # fmt: skip
MOST_POINTS = 800  # of a curve: more than a screen has columns to show them in


@dataclass(frozen=True)
class Curve:
    """Figures over steps, drawn as a `line`, `dots` on one, `marks` without, or `smoothed` over the raw ones."""

    label: str
    points: Points
    colour: str
    kind: str = "line"


@dataclass(frozen=True)
class Plot:
    """One drawing: what it shows, how to read it, its curves, `lines` that are thresholds, `marks` that are steps."""

    title: str
    reading: str
    unit: str
    curves: Sequence[Curve]
    lines: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[int, str, str]] = ()
    log: bool = False
    from_zero: bool = False


def plots(run: Run) -> list[Plot]:
    """What can be drawn of a run; a plot whose figures it does not have is left out."""
    found = [_loss(run), _gap(run), _rate(run), _gradients(run), _accuracy(run), _speed(run), _waiting(run)]
    return [plot for plot in [*found, _memory(run), _utilisation(run)] if any(curve.points for curve in plot.curves)]


def _loss(run: Run) -> Plot:
    evaluations = run.points("eval_loss")
    curves = [Curve("training", run.points("loss"), BLUE, "smoothed"), Curve("validation", evaluations, RED, "dots")]
    for key, colour in zip(run.sources, (GREEN, PURPLE, ORANGE, SKY, GREY) * len(run.sources), strict=False):
        curves.append(Curve(f"validation: {key[5:-5]}", run.points(key), colour, "dots"))
    curves.append(Curve("retained rows", run.points("eval_retention_loss"), "#000000", "dots"))
    best = min(evaluations, key=lambda point: point[1], default=None)
    values = stats.values(curves[0].points)
    return Plot(
        "Loss",
        "How badly the model predicts the answers, on rows that it is trained on and on rows that it never sees. Both "
        "should fall; where validation rises while training falls, the rows are learnt by heart. The best step is what "
        "final/ holds.",
        "nats a token",
        curves,
        marks=[(best[0], f"best: {best[1]:.4g} at step {best[0]:,}", RED), *_broken(run)] if best else _broken(run),
        log=bool(values) and min(values) > 0 and max(values) > 30 * min(values),
    )


def _gap(run: Run) -> Plot:
    return Plot(
        "Gap between validation and training loss",
        "Above the line and growing, the model learns the rows by heart. Standing still it only says that the two sets "
        "differ.",
        "nats a token",
        [Curve("validation minus training", run.gaps(), PURPLE, "dots")],
        [(run.monitor.overfitting_gap, f"{run.monitor.overfitting_gap:g}: too much where it grows"), (0.0, "")],
    )


def _rate(run: Run) -> Plot:
    logged, steps = run.points("learning_rate"), run.planned("optimizer_steps") or 0
    shown = sorted({1 + round(part * (steps - 1) / 400) for part in range(401)}) if steps > 1 else []
    planned = [(step, rate) for step in shown if (rate := run.scheduled(step)) is not None]
    return Plot(
        "Learning rate",
        "How far each step moves the weights: it rises while the run warms up, then falls. The dots, as logged, should "
        "lie on the line, as planned.",
        "learning rate",
        [Curve("planned", planned, ORANGE), Curve("logged", logged, BLUE, "marks")] if logged else [],
        from_zero=True,
    )


def _gradients(run: Run) -> Plot:
    points = [(step, norm) for step, norm in run.points("grad_norm") if norm > 0]
    lines = [(run.monitor.grad_norm_above, f"{run.monitor.grad_norm_above:g}: they explode")]
    if points and min(stats.values(points)) < 1e-4:
        lines.append((run.monitor.grad_norm_below, f"{run.monitor.grad_norm_below:g}: they vanish"))
    return Plot(
        "Gradient norm",
        "How strongly a step's rows pull at the weights, before clipping. Single peaks are harmless; staying above the "
        f"upper line they explode, below {run.monitor.grad_norm_below:g} they vanish.",
        "norm",
        [Curve("gradient norm", points, BLUE, "smoothed")],
        lines,
        marks=_broken(run),
        log=True,
    )


def _accuracy(run: Run) -> Plot:
    return Plot(
        "Token accuracy",
        "The share of the answers' tokens that the model would have chosen itself.",
        "share",
        [
            Curve("training", run.points("mean_token_accuracy"), BLUE, "smoothed"),
            Curve("validation", run.points("eval_mean_token_accuracy"), RED, "dots"),
        ],
    )


def _speed(run: Run) -> Plot:
    return Plot(
        "Throughput",
        "Places in the batches, tokens in them, and tokens that the loss looks at, each a second. The first two differ "
        "by padding, the last two by prompts. A lasting fall means that something else holds the run up.",
        "a second",
        [
            Curve("places", run.points("padded_tokens_per_second"), GREY, "smoothed"),
            Curve("tokens", run.points("tokens_per_second"), BLUE, "smoothed"),
            Curve("supervised tokens", run.points("supervised_tokens_per_second"), GREEN, "smoothed"),
        ],
        from_zero=True,
    )


def _waiting(run: Run) -> Plot:
    return Plot(
        "Waiting for data",
        "The share of each step in which the processors had no rows to work on. It should be near zero.",
        "share of a step",
        [Curve("waiting", run.points("data_wait_fraction"), ORANGE, "smoothed")],
        [(run.monitor.data_wait, f"{run.monitor.data_wait:g}: too much")],
        from_zero=True,
    )


def _memory(run: Run) -> Plot:
    names = {"peak": RED, "reserved": GREY, "allocated": BLUE}
    curves = [Curve(name, _gib(run.points(f"memory_{name}_bytes")), colour) for name, colour in names.items()]
    return Plot(
        "Memory",
        "What a GPU holds, and what the process holds on the host. Level is good, steps at evaluations are usual; a "
        "steady climb is a leak.",
        "GiB",
        [*curves, Curve("host", _gib(run.points("host_memory_bytes")), GREEN)],
        from_zero=True,
    )


def _utilisation(run: Run) -> Plot:
    names = {"mfu": ("MFU", BLUE), "mfu_palm": ("MFU by PaLM's formula", SKY), "hfu": ("HFU", ORANGE)}
    return Plot(
        "Use of the GPUs' arithmetic",
        "The share of the card's peak that the model's own arithmetic takes (MFU), and with what checkpointing "
        "computes twice (HFU). 0.3 to 0.5 is usual for full fine-tuning.",
        "share of the peak",
        [Curve(label, run.points(key), colour, "smoothed") for key, (label, colour) in names.items()],
        from_zero=True,
    )


def _gib(points: Points) -> Points:
    return [(step, value / GIB) for step, value in points]


def _broken(run: Run) -> list[tuple[int, str, str]]:
    """Where the loss or the gradient norm stopped being a number."""
    for line in run.training:
        if any(
            not math.isfinite(value) for key in ("loss", "grad_norm") if (value := number(line.get(key))) is not None
        ):
            return [(line["step"], f"not a number from step {line['step']:,}", "#000000")]
    return []


def thinned(points: Points) -> Points:
    """At most MOST_POINTS of them: of each stretch its lowest and its highest, so that peaks stay."""
    if len(points) <= MOST_POINTS:
        return points
    stretch, found = math.ceil(2 * len(points) / MOST_POINTS), []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        found += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return found


def svg(plot: Plot, last_step: int) -> str:
    """The drawing as an `<svg>` element, `last_step` optimizer steps wide."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.title,  # ids that two drawings of one page do not share
        "font.family": "sans-serif",
        "font.size": 10,
        "path.simplify": True,
        "path.simplify_threshold": 0.5,
        "axes.formatter.useoffset": False,
        "text.parse_math": False,  # a source may be named after a price
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.1), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        _draw(figure.add_subplot(), plot, last_step)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _stand_alone(written.getvalue(), plot.title)


def _draw(axes: Any, plot: Plot, last_step: int) -> None:
    from matplotlib.ticker import LogFormatter

    for curve in plot.curves:
        _draw_curve(axes, curve)
    for height, label in plot.lines:
        axes.axhline(height, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
        place = {"xy": (0.995, height), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(label, **place, xytext=(0, 3), textcoords="offset points", fontsize=8.5, color="#444444")
    for step, label, colour in plot.marks:
        axes.axvline(step, color=colour, linewidth=1.2, linestyle=(0, (1, 2)), label=label)
    axes.margins(y=0.1)
    if plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # labels where there is room
    elif plot.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(last_step, 1) * 1.01)
    axes.set_xlabel("optimizer steps")
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
        axes.plot(steps, values, color=curve.colour, linewidth=1.2, marker="o", markersize=size, label=curve.label)
    elif curve.kind == "marks":
        axes.plot(steps, values, color=curve.colour, linestyle="", marker="o", markersize=3, label=curve.label)
    elif curve.kind == "smoothed" and len(curve.points) >= 12:
        axes.plot(steps, values, color=curve.colour, linewidth=0.8, alpha=0.3)
        axes.plot(*zip(*_smoothed(curve.points), strict=True), color=curve.colour, linewidth=1.8, label=curve.label)
    else:
        axes.plot(steps, values, color=curve.colour, linewidth=1.6, label=curve.label)


def _smoothed(points: Points) -> Points:
    """The medians of twentieths of the run, moving; of a long run first those of its stretches."""
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    medians = [(part[len(part) // 2][0], median(stats.values(part))) for part in parts]
    width = max(len(medians) // 20, 5)
    smoothed = stats.smooth(stats.values(medians), width)
    return list(zip([step for step, _ in medians[width // 2 :]], smoothed, strict=False))


def _stand_alone(written: str, title: str) -> str:
    """Without what a page does not need: prolog, metadata, namespaces, and ids that nothing refers to."""
    inner = written[written.index("<svg") :]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", inner).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w-]+)", inner))
    inner = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in used else "", inner)
    inner = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", inner, count=1)
    inner = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", inner, count=1)
    return inner.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).replace("\n", " ").strip()
