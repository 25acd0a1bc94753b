"""Read the metrics of a run directory; lines may be incomplete, keys absent, and values NaN or Inf."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import Monitor
from sft_recipes.planner import lr_schedule
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
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
    """The metrics of a run up to now, added while it trains."""

    plan: Plan
    _points: dict[str, Points] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    def monitor(self) -> Monitor:
        """The thresholds."""
        return self.plan.sections.monitor

    def points(self, key: str) -> Points:
        """The finite values of a metric with their steps."""
        return self._points.setdefault(key, [])

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the finite numbers among the metrics of a step."""
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.points(key).append((step, float(value)))


@dataclass
class Run(MetricSeries):
    """A run directory's files.

    The metric `scheduled_learning_rate` is the plan's, at the steps at which a learning rate was logged; it is empty
    after a resume with another plan.

    Attributes:
        lines: of `metrics.jsonl`, one per step; of values with the same step and key the last counts.
        samples: `step`, `prompt`, `reference`, `completion`.
        alerts: what the alert callback recorded while the run trained.
    """

    folder: RunDir
    manifest: dict[str, Any]
    lines: list[Line]
    samples: list[Line]
    alerts: list[Alert]

    @property
    def last_step(self) -> int:
        """The latest optimizer step that was logged."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def source_losses(self) -> dict[str, str]:
        """The metrics `eval_NAME_loss` of single data sources by label, without that of the retention set."""
        keys = [key for key in self._points if re.fullmatch("eval_.+_loss", key) and key != "eval_retention_loss"]
        return {f"validation: {key[5:-5]}": key for key in keys}


def read(folder: RunDir) -> Run:
    """Read a run directory.

    Raises:
        UserError: nothing has been logged yet, or a file is not readable.
    """
    merged: dict[int, Line] = {}
    for line in read_lines(folder.metrics):
        merged.setdefault(line["step"], {}).update(line)
    manifest, lines = read_json(folder.manifest), [merged[step] for step in sorted(merged)]
    if not lines and manifest.get("state") not in ("diverged", "failed"):
        raise UserError(f"{folder.path}: nothing logged yet. Wait for the first log step, or read {folder.log}")
    recorded = read_lines(folder.warnings)
    alerts = [Alert(str(line.get("rule")), line["step"], str(line.get("evidence"))) for line in recorded]
    run = Run(plans.read(folder.plan), folder, manifest, lines, list(read_lines(folder.samples)), alerts)
    for line in lines:
        run.add(line["step"], line)
    if run.points("learning_rate") and not run.plan.allowed_changes:
        rates = lr_schedule.curves(run.plan)[run.plan.lr_scheduler_type]  # of step s after s - 1 optimizer steps
        run.points("scheduled_learning_rate").extend((step, rates[step - 1]) for step, _ in run.points("learning_rate"))
    return run


def read_lines(path: Path) -> Iterator[Line]:
    """The JSON objects that have a step; an incomplete line (interrupted write) is skipped."""
    for json_line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(json_line)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield {key: _NOT_FINITE.get(str(value), value) for key, value in line.items()}
