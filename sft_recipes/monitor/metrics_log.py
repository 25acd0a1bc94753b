"""Read the metrics of a run directory; lines may be incomplete, keys absent, and values NaN or Inf."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from sft_recipes.config.schema import Monitor
from sft_recipes.planner import lr_schedule
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json

Line = dict[str, Any]
Points = list[tuple[int, float]]  # step and value, steps ascending

# NaN and Inf are written as text, so that each line is valid JSON.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Alert:
    """The first of consecutive steps at which a detector holds."""

    rule: str
    step: int
    evidence: str


@dataclass
class MetricSeries:
    """The metrics of a run up to now, added while it trains.

    Attributes:
        monitor: the thresholds.
        warmup_steps: optimizer steps over which the learning rate rises.
        total_steps: optimizer steps of the complete run.
    """

    monitor: Monitor
    warmup_steps: int
    total_steps: int
    _points: dict[str, Points] = dataclasses.field(default_factory=dict, kw_only=True)

    def points(self, key: str) -> Points:
        """The finite values of a metric with their steps."""
        return self._points.setdefault(key, [])

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the finite numbers among the metrics of a step."""
        for key, value in metrics.items():
            if is_finite(value):
                self.points(key).append((step, float(value)))


@dataclass
class Run(MetricSeries):
    """A run directory's files.

    Attributes:
        lines: of `metrics.jsonl`, one per step; of values with the same step and key the last counts.
        samples: `step`, `prompt`, `reference`, `completion`.
        alerts: what the alert callback recorded while the run trained.
    """

    folder: RunDir
    plan: dict[str, Any]
    manifest: dict[str, Any]
    lines: list[Line]
    samples: list[Line]
    alerts: list[Alert]

    def points(self, key: str) -> Points:
        """The finite values of a metric with their steps, read once.

        `scheduled_learning_rate` is the plan's, at the steps at which a learning rate was logged.
        """
        if key not in self._points:
            logged = [(line["step"], float(line[key])) for line in self.lines if is_finite(line.get(key))]
            self._points[key] = logged if key != "scheduled_learning_rate" else self._scheduled_learning_rates()
        return self._points[key]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe in the plan; empty if the plan has none."""
        return self.plan.get("sections", {}).get(name) or {}

    @property
    def last_step(self) -> int:
        """The latest optimizer step that was logged."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def log_interval(self) -> int:
        """The usual number of steps between two log lines."""
        steps = [step for step, _ in self.points("loss")]
        return int(median(after - before for before, after in itertools.pairwise(steps))) if steps[1:] else 1

    @property
    def state(self) -> str:
        """The manifest's state: running, stopped, failed, finished, diverged."""
        return str(self.manifest.get("state", "new"))

    @cached_property
    def source_losses(self) -> list[str]:
        """The metrics `eval_NAME_loss` of single data sources, without that of the retention set."""
        keys = dict.fromkeys(key for line in self.lines for key in line)
        return [key for key in keys if _is_loss(key) and key not in ("loss", "eval_loss", "eval_retention_loss")]

    def _scheduled_learning_rates(self) -> Points:
        """The schedule after s - 1 optimizer steps for each logged step s; empty after a resume with another plan."""
        peak, steps, warmup = (self.plan.get(key) for key in ("learning_rate", "optimizer_steps", "warmup_steps"))
        name, options = self.plan.get("lr_scheduler_type"), lr_schedule.options_of(self.section("trainer"))
        if None in (peak, steps, warmup) or name not in lr_schedule.SCHEDULES or self.plan.get("allowed_changes"):
            return []
        schedule = lr_schedule.Schedule(name, peak, warmup, steps, options)
        return [(step, schedule.learning_rate(step - 1)) for step, _ in self.points("learning_rate")]


def read(folder: RunDir) -> Run:
    """Read a run directory.

    Raises:
        UserError: nothing has been logged yet, or a file is not readable.
    """
    plan, manifest = read_json(folder.plan), read_json(folder.manifest)
    # Not known to a plan of unprepared data.
    plan |= {key: manifest[key] for key in ("optimizer_steps", "warmup_steps") if manifest.get(key) is not None}
    merged: dict[int, Line] = {}
    for line in _lines(folder.metrics):
        merged.setdefault(line["step"], {}).update(line)
    lines = [merged[step] for step in sorted(merged)]
    if not any(_is_loss(key) for line in lines for key in line) and manifest.get("state") not in ("diverged", "failed"):
        raise UserError(
            f"{folder.path}: nothing logged yet: {folder.metrics.name} has no line with a loss. "
            f"Wait for the first log step, or read {folder.log}"
        )
    stored = plan.get("sections", {}).get("monitor") or {}
    known = {field.name for field in dataclasses.fields(Monitor)}
    return Run(
        Monitor(**{key: value for key, value in stored.items() if key in known}),
        plan.get("warmup_steps") or 0,
        plan.get("optimizer_steps") or (lines[-1]["step"] if lines else 0),
        folder=folder,
        plan=plan,
        manifest=manifest,
        lines=lines,
        samples=list(_lines(folder.samples)),
        alerts=[
            Alert(str(line.get("rule")), line["step"], str(line.get("evidence"))) for line in _lines(folder.warnings)
        ],
    )


def is_finite(value: Any) -> bool:
    """Whether a metric is a number other than NaN and Inf."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_loss(key: str) -> bool:
    return key == "loss" or (key.startswith("eval_") and key.endswith("_loss"))


def _lines(path: Path) -> Iterator[Line]:
    """The JSON objects that have a step; an incomplete line (interrupted write) is skipped."""
    for json_line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(json_line)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield {key: _NOT_FINITE.get(str(value), value) for key, value in line.items()}
