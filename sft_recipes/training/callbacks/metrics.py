"""Metrics log: every metric that the Trainer logs, in `metrics.jsonl`, one JSON object per log step, on rank 0."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from sft_recipes.monitor import metrics_log
from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.checkpoint import retention
from sft_recipes.training.nan_guard import json_number

log = logging.getLogger(__name__)


class MetricsCallback(RunCallback):
    """Appends to `metrics.jsonl`; a resumed run continues after the checkpoint's step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what an interrupted attempt logged after the checkpoint."""
        if state.is_world_process_zero:
            folder = self.trainer.folder
            for path in (folder.metrics, folder.samples, folder.warnings):
                drop_lines_after(path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append one line: the step and all numbers."""
        if not state.is_world_process_zero or not logs:
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if "loss" in logs:
            numbers["rows_hash"] = self.trainer.integrity.data_order.rows_hash  # of all rows so far; not for trackers
        append(self.trainer.folder.metrics, {"step": state.global_step, **numbers})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Append the summary of a finished run."""
        if not self.trainer.stopping.stopped:
            write_summary(self.trainer)


def write_summary(trainer: Any) -> None:
    """Append the last line of a run whose last step is taken, by this attempt or an earlier one."""
    if trainer.accelerator.is_main_process:
        step, tokens = trainer.state.global_step, {"supervised_tokens_seen": trainer.supervised_tokens_seen}
        append(trainer.folder.metrics, {"step": step, **final(trainer.state), **tokens})


def final(state: Any) -> dict[str, float]:
    """Return a run's summary, under the SFT guide's names."""
    losses = [loss for loss in retention.validation_losses(state.log_history).values() if math.isfinite(loss)]
    summary = {"final/total_steps": state.global_step, "final/epochs_completed": state.epoch or 0.0}
    return {**summary, "final/best_eval_loss": min(losses)} if losses else summary


def add_to_summary(path: Path, values: dict[str, Any]) -> None:
    """Add values to the last line of a finished run, its summary."""
    *lines, summary = metrics_log.read_lines(path)
    _rewrite(path, [*lines, summary | values])


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line; NaN and Infinity, which JSON lacks, are written as strings. On a full disk the line is
    lost, with a warning: training continues, as after a failed save."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{_to_json(line)}\n")
    except OSError as error:
        log.warning(f"{path} cannot be written ({error.strerror})")


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines after a step, which an interrupted attempt wrote."""
    if path.is_file():
        _rewrite(path, [line for line in metrics_log.read_lines(path) if line["step"] <= step])


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(f"{_to_json(line)}\n" for line in lines))


def _to_json(line: dict[str, Any]) -> str:
    return json.dumps({key: json_number(value) for key, value in line.items()}, allow_nan=False)
