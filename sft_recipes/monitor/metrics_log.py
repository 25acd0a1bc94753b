"""Reads a run's folder into figures; knows that lines may be cut short, keys absent, and numbers no numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import Monitor
from sft_recipes.planner.lr_schedule import Schedule
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json

Line = dict[str, Any]
Points = list[tuple[int, float]]

# How a figure that is no number is written, so that each line stays valid JSON.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FINAL = "final/"
_SETS_THE_SCHEDULE = {
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
    """What a run's folder says, ordered by step; of equal steps the last stands.

    Attributes:
        training: lines of `metrics.jsonl` that have `loss`.
        validation: lines that have `eval_loss` or another validation loss, such as `eval_retention_loss` at step 0.
        samples: `step`, `prompt`, `reference`, `completion`.
        warnings: what the guards saw while it trained: `step`, `rule`, `evidence`.
        final: the summary of a finished run; empty before.
    """

    folder: RunDir
    plan: dict[str, Any]
    manifest: dict[str, Any]
    training: list[Line]
    validation: list[Line]
    samples: list[Line]
    warnings: list[Line]
    final: Line

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe as the plan holds it; empty where the plan has none."""
        found = _object(self.plan.get("sections")).get(name)
        return _object(found)

    @cached_property
    def monitor(self) -> Monitor:
        """The thresholds: the plan's, and the defaults where it has none."""
        defaults, stored = Monitor(), self.section("monitor")
        known = [field.name for field in dataclasses.fields(Monitor) if number(stored.get(field.name)) is not None]
        return dataclasses.replace(defaults, **{name: stored[name] for name in known})

    def points(self, key: str) -> Points:
        """The finite values of a figure with their steps; `scheduled_rate` is the plan's where a rate was logged."""
        if key == "scheduled_rate":
            return [
                (step, rate) for step, _ in self.points("learning_rate") if (rate := self.scheduled(step)) is not None
            ]
        if key not in self._points:
            lines = self.validation if key.startswith("eval_") else self.training
            self._points[key] = [(line["step"], float(line[key])) for line in lines if _is_finite(line.get(key))]
        return self._points[key]

    @cached_property
    def _points(self) -> dict[str, Points]:
        """What has been asked for: rules and plots ask for the same of runs that may have a hundred thousand lines."""
        return {}

    def planned(self, key: str) -> Any:
        """A number that the data settles, such as `optimizer_steps`: the plan's, else what the manifest recorded."""
        recorded = self.manifest.get(key)
        return self.plan.get(key) if self.plan.get("data_prepared", True) or recorded is None else recorded

    @property
    def last_step(self) -> int:
        """The newest optimizer step that was logged."""
        return max((lines[-1]["step"] for lines in (self.training, self.validation) if lines), default=0)

    @property
    def state(self) -> str:
        """What the manifest says: running, stopped, failed, finished, diverged."""
        return str(self.manifest.get("state", "new"))

    @cached_property
    def sources(self) -> list[str]:
        """The figures `eval_NAME_loss`, each the validation loss of one source; the retained rows' is none of them."""
        keys = dict.fromkeys(key for line in self.validation for key in line)
        return [key for key in keys if _is_loss(key) and key not in ("eval_loss", "eval_retention_loss")]

    def scheduled(self, step: int) -> float | None:
        """The learning rate that the plan has for what is logged at `step`: the schedule's after `step` - 1 of them.

        None if the schedule follows the loss, or the run was resumed under another plan.
        """
        peak, steps, warmup = (self.planned(key) for key in ("learning_rate", "optimizer_steps", "warmup_steps"))
        options = self.section("trainer").get("lr_scheduler_kwargs") or {}
        changed = {str(key).split(".")[-1] for key in self.plan.get("allowed_changes") or []}
        if peak is None or steps is None or warmup is None or changed & _SETS_THE_SCHEDULE:
            return None
        try:
            options = _object(json.loads(options) if isinstance(options, str) else options)
            schedule = Schedule(str(self.plan.get("lr_scheduler_type")), peak, warmup, steps, options)
            return schedule.learning_rate(step - 1)
        except (ValueError, UserError):
            return None

    def warned(self, rule: str) -> list[int]:
        """The steps at which a guard gave this warning."""
        return sorted(line["step"] for line in self.warnings if line.get("rule") == rule)

    def gaps(self) -> Points:
        """Validation loss minus the training loss logged last before or at that step."""
        losses, found, place, newest = self.points("loss"), [], 0, None
        for step, value in self.points("eval_loss"):
            while place < len(losses) and losses[place][0] <= step:
                newest, place = losses[place][1], place + 1
            if newest is not None:
                found.append((step, value - newest))
        return found


def read(folder: RunDir) -> Run:
    """What lies in a run's folder.

    Raises:
        UserError: nothing has been logged yet, or a file may not be read.
    """
    lines = list(_lines(folder.metrics))
    run = Run(
        folder=folder,
        plan=read_json(folder.plan),
        manifest=read_json(folder.manifest),
        training=_by_step(line for line in lines if "loss" in line),
        validation=_by_step(line for line in lines if any(_is_loss(key) for key in line)),
        samples=list(_lines(folder.samples)),
        warnings=list(_lines(folder.warnings)),
        final=next((line for line in reversed(lines) if any(key.startswith(_FINAL) for key in line)), {}),
    )
    if not run.training and not run.validation and run.state not in ("diverged", "failed"):
        raise UserError(
            f"RUN: {folder.path} has logged nothing yet ({folder.metrics.name} has no line with a loss); "
            f"wait for its first log step, or read {folder.log.name} there"
        )
    return run


def number(value: Any) -> float | None:
    """A figure as a number, not a number included; None where it is none of them."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _object(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _is_loss(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("_loss")


def _is_finite(value: Any) -> bool:
    found = number(value)
    return found is not None and math.isfinite(found)


def _lines(path: Path) -> Iterator[Line]:
    """Objects with a step, line by line; a line that a kill cut short is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is it another user's run?") from error
    for written in text.split("\n"):
        try:
            line = json.loads(written)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            yield {
                key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in line.items()
            }


def _by_step(lines: Iterator[Line]) -> list[Line]:
    found: dict[int, Line] = {}
    for line in lines:
        found[line["step"]] = {**found.get(line["step"], {}), **line}
    return [found[step] for step in sorted(found)]
