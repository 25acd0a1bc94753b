"""Read the metrics of a run directory; lines may be incomplete, keys absent, and values NaN or Inf."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from sft_recipes.config.schema import Monitor
from sft_recipes.monitor.detectors import Alert
from sft_recipes.monitor.stats import Points
from sft_recipes.planner.lr_schedule import Schedule
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json

Line = dict[str, Any]

# NaN and Inf are written as text, so that each line is valid JSON.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FINAL = "final/"
_CHANGES_THE_SCHEDULE = {
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "num_train_epochs",
    "max_steps",
    "warmup_ratio",
    "effective_batch_size",
}


@dataclass(frozen=True)
class Run:
    """A run directory's files, lines ordered by step; of lines with the same step the last counts.

    Attributes:
        training: lines of `metrics.jsonl` that have `loss`.
        validation: lines that have `eval_loss` or another validation loss, such as `eval_retention_loss` at step 0.
        samples: `step`, `prompt`, `reference`, `completion`.
        alerts: what the alert callback recorded while the run trained.
        final: the summary of a finished run; empty before.
    """

    folder: RunDir
    plan: dict[str, Any]
    manifest: dict[str, Any]
    training: list[Line]
    validation: list[Line]
    samples: list[Line]
    alerts: list[Alert]
    final: Line

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe in the plan; empty if the plan has none."""
        return _dict(_dict(self.plan.get("sections")).get(name))

    @cached_property
    def monitor(self) -> Monitor:
        """The thresholds of the plan, and the defaults where it has none."""
        defaults, stored = Monitor(), self.section("monitor")
        known = [field.name for field in dataclasses.fields(Monitor) if as_float(stored.get(field.name)) is not None]
        return dataclasses.replace(defaults, **{name: stored[name] for name in known})

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps over which the learning rate rises; 0 if not recorded."""
        return self.planned("warmup_steps") or 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the complete run; if not recorded, the latest step."""
        return self.planned("optimizer_steps") or self.last_step

    def points(self, key: str) -> Points:
        """The finite values of a metric with their steps.

        `scheduled_learning_rate` is the plan's, at the steps at which a learning rate was logged.
        """
        if key == "scheduled_learning_rate":
            logged = (step for step, _ in self.points("learning_rate"))
            return [(step, rate) for step in logged if (rate := self.scheduled_learning_rate(step)) is not None]
        if key not in self._points:
            lines = self.validation if key.startswith("eval_") else self.training
            self._points[key] = [(line["step"], float(line[key])) for line in lines if _is_finite(line.get(key))]
        return self._points[key]

    @cached_property
    def _points(self) -> dict[str, Points]:
        """Series already read: rules and plots request the same ones of runs with up to a hundred thousand lines."""
        return {}

    def planned(self, key: str) -> Any:
        """A number that depends on the prepared data, such as `optimizer_steps`: the plan's, else the manifest's."""
        recorded = self.manifest.get(key)
        return self.plan.get(key) if self.plan.get("data_prepared", True) or recorded is None else recorded

    @property
    def last_step(self) -> int:
        """The latest optimizer step that was logged."""
        return max((lines[-1]["step"] for lines in (self.training, self.validation) if lines), default=0)

    @property
    def log_interval(self) -> int:
        """The usual number of steps between two log lines."""
        steps = [line["step"] for line in self.training]
        return int(median(after - before for before, after in itertools.pairwise(steps))) if steps[1:] else 1

    @property
    def state(self) -> str:
        """The manifest's state: running, stopped, failed, finished, diverged."""
        return str(self.manifest.get("state", "new"))

    @cached_property
    def source_losses(self) -> list[str]:
        """The metrics `eval_NAME_loss` of single data sources, without that of the retention set."""
        keys = dict.fromkeys(key for line in self.validation for key in line)
        return [key for key in keys if _is_loss(key) and key not in ("eval_loss", "eval_retention_loss")]

    def scheduled_learning_rate(self, step: int) -> float | None:
        """The plan's learning rate for what is logged at `step`: the schedule after `step` - 1 optimizer steps.

        None if the schedule follows the loss, or the run was resumed under another plan.
        """
        peak, steps, warmup = (self.planned(key) for key in ("learning_rate", "optimizer_steps", "warmup_steps"))
        options = self.section("trainer").get("lr_scheduler_kwargs") or {}
        changed = {str(key).split(".")[-1] for key in self.plan.get("allowed_changes") or []}
        if peak is None or steps is None or warmup is None or changed & _CHANGES_THE_SCHEDULE:
            return None
        try:
            options = _dict(json.loads(options) if isinstance(options, str) else options)
            schedule = Schedule(str(self.plan.get("lr_scheduler_type")), peak, warmup, steps, options)
            return schedule.learning_rate(step - 1)
        except (ValueError, UserError):
            return None

    def train_eval_gaps(self) -> Points:
        """Validation loss minus the latest training loss logged up to that step."""
        losses, gaps, index, latest = self.points("loss"), [], 0, None
        for step, eval_loss in self.points("eval_loss"):
            while index < len(losses) and losses[index][0] <= step:
                latest, index = losses[index][1], index + 1
            if latest is not None:
                gaps.append((step, eval_loss - latest))
        return gaps


def read(folder: RunDir) -> Run:
    """Read a run directory.

    Raises:
        UserError: nothing has been logged yet, or a file is not readable.
    """
    lines = list(_lines(folder.metrics))
    run = Run(
        folder=folder,
        plan=read_json(folder.plan),
        manifest=read_json(folder.manifest),
        training=_by_step(line for line in lines if "loss" in line),
        validation=_by_step(line for line in lines if any(_is_loss(key) for key in line)),
        samples=list(_lines(folder.samples)),
        alerts=[
            Alert(str(line.get("rule")), line["step"], str(line.get("evidence"))) for line in _lines(folder.warnings)
        ],
        final=next((line for line in reversed(lines) if any(key.startswith(_FINAL) for key in line)), {}),
    )
    if not run.training and not run.validation and run.state not in ("diverged", "failed"):
        raise UserError(
            f"{folder.path}: nothing logged yet: {folder.metrics.name} has no line with a loss. "
            f"Wait for the first log step, or read {folder.log}"
        )
    return run


def as_float(value: Any) -> float | None:
    """A metric as a float, NaN and Inf included; None if it is not a number."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_loss(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("_loss")


def _is_finite(value: Any) -> bool:
    number = as_float(value)
    return number is not None and math.isfinite(number)


def _lines(path: Path) -> Iterator[Line]:
    """The JSON objects that have a step; an incomplete line (interrupted write) is skipped."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Read it as the user who owns the run") from error
    for json_line in text.split("\n"):
        try:
            line = json.loads(json_line)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            yield {
                key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in line.items()
            }


def _by_step(lines: Iterator[Line]) -> list[Line]:
    merged: dict[int, Line] = {}
    for line in lines:
        merged[line["step"]] = {**merged.get(line["step"], {}), **line}
    return [merged[step] for step in sorted(merged)]
