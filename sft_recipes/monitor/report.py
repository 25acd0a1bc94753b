"""Render a run as one self-contained HTML page: diagnosis, metrics, completions, plan, environment."""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import source_paths
from sft_recipes.monitor import plots
from sft_recipes.monitor.diagnose import MAX_ALERTS, alerts_without_finding, skipped_rules
from sft_recipes.monitor.metrics_log import Line, Run
from sft_recipes.monitor.rules import RULES, Finding
from sft_recipes.runtime.text import escape_unprintable, flatten
from sft_recipes.runtime.units import GIB, format_duration

_MAX_PROMPTS, _MAX_COMPLETIONS = 12, 8  # per prompt the first completion and the latest


def page(run: Run, findings: Sequence[Finding]) -> str:
    """Return the page as HTML; all text that comes from data is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=_printable
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        findings=findings,
        metrics=_metrics(run),
        titles={rule.name: rule.title for rule in RULES},
        skipped=skipped_rules(run),
        alerts=alerts_without_finding(run, findings)[:MAX_ALERTS],
        draw=lambda *plot: base64.b64encode(plots.svg(run, *plot).encode()).decode(),
        samples=list(_samples(run)),
        plan=_plan(run),
        environment=[
            (f"attempt {number}: {key}", value)
            for number, attempt in enumerate(run.manifest.get("starts") or [], 1)
            for key, value in flatten(attempt, keep_empty=True).items()
        ],
    )


def _printable(value: Any) -> str:
    return escape_unprintable(str(value), keep="\n\t")


def _metrics(run: Run) -> Iterator[tuple[str, str, str]]:
    """Label, value and note of the main results."""
    plan, manifest = run.plan, run.manifest
    yield "optimizer steps", f"{run.last_step:,}", f"of {plan.optimizer_steps or '?'} planned"
    for label, key in (("validation loss", "eval_loss"), ("training loss", "loss")):
        if points := run.points(key):
            step, lowest = min(points, key=lambda point: point[1])
            note = f"best, at step {step:,}; first {points[0][1]:.4g}, last {points[-1][1]:.4g}"
            yield label, f"{lowest:.4g}", note
    if isinstance(after := manifest.get("exact_match_after"), float):
        yield "exact match", f"{after:.1%}", f"before training: {manifest.get('exact_match_before')}"
    if seconds := manifest.get("training_seconds"):
        total = format_duration(manifest.get("wall_seconds", seconds))
        yield "training time", format_duration(seconds), f"{total} in total"
    for _, tokens in run.points("supervised_tokens_seen")[-1:]:
        yield "supervised tokens seen", f"{tokens:,.0f}", "tokens in the loss, all epochs"
    if peak := manifest.get("peak_memory_bytes"):
        yield "peak memory per GPU", f"{peak / GIB:.1f} GiB", plan.gpu_type or ""
    yield "data", ", ".join(map(str, source_paths(plan.sections.data.train))), f"{plan.examples} examples"


def _samples(run: Run) -> Iterator[tuple[str, list[Line]]]:
    """Completions of the same prompts over the steps."""
    samples = sorted(run.samples, key=lambda sample: (str(sample.get("prompt")), sample["step"]))
    groups = itertools.groupby(samples, key=lambda sample: str(sample.get("prompt")))
    for prompt, group in itertools.islice(groups, _MAX_PROMPTS):
        first, *others = group
        yield prompt, [first, *others[1 - _MAX_COMPLETIONS :]]


def _plan(run: Run) -> Iterator[tuple[str, Any, str]]:
    """Key, value and origin of each number of the plan."""
    values = dataclasses.asdict(run.plan)
    origins = values.pop("origins")
    for key, value in flatten(values, keep_empty=True).items():
        short = key.removeprefix("sections.")
        yield short, value, origins.get(short) or origins.get(f"trainer.{short}") or ""
