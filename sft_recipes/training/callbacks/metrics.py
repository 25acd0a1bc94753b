"""Writes every figure that the Trainer logs to `metrics.jsonl`, one JSON object a log step, on rank 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft_recipes.runtime import append_line
from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.callbacks.graceful_stop import GracefulStopCallback
from sft_recipes.training.checkpoint import retention
from sft_recipes.training.nan_guard import json_number


class MetricsCallback(TrainerCallback):
    """Appends to `metrics.jsonl`; after a resume it goes on behind the checkpoint's step."""

    def __init__(self, folder: RunDir, stopping: GracefulStopCallback):
        self.folder = folder
        self.stopping = stopping
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leaves out what an interrupted start wrote behind the checkpoint that this one goes on from."""
        if state.is_world_process_zero:
            for path in (self.folder.metrics, self.folder.samples, self.folder.warnings):
                forget_behind(path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """On all ranks: the step has ended, they have met (callbacks/stop.py)."""
        self.trainer.meter.step_ends()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line: the step, then whatever was logged."""
        if not state.is_world_process_zero or not logs:
            return
        figures = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if "loss" in logs:
            figures["tokens_digest"] = self.trainer.tokens_digest  # here alone: a curve of it would say nothing
        append(self.folder.metrics, {"step": state.global_step, **figures})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The summary of a run that came to its end."""
        if not self.stopping.stopped:
            self.write_summary(state)

    def write_summary(self, state: Any) -> None:
        """The last line: what a run came to that has taken its last step, now or in an earlier start."""
        if state.is_world_process_zero:
            seen = {"supervised_tokens_seen": self.trainer.supervised_tokens_seen}
            append(self.folder.metrics, {"step": state.global_step, **final(state), **seen})


def final(state: Any) -> dict[str, float]:
    """What a run came to, under the documents' names."""
    losses = [loss for loss in retention.validation_losses(state.log_history).values() if math.isfinite(loss)]
    figures = {"final/total_steps": state.global_step, "final/epochs_completed": state.epoch or 0.0}
    return {**figures, "final/best_eval_loss": min(losses)} if losses else figures


def append(path: Path, line: dict[str, Any]) -> None:
    """One more line; numbers that JSON does not have (NaN, Infinity) are written as text."""
    append_line.add(path, json.dumps({key: json_number(value) for key, value in line.items()}, allow_nan=False))


def forget_behind(path: Path, step: int) -> None:
    """Cuts off the lines behind a step, which an interrupted start wrote."""
    if path.is_file():
        kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= step]
        write_atomic(path, "".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a kill cut short, or a disk made another of
        return float("inf")
