"""Writes every figure that the Trainer logs to `metrics.jsonl`, one JSON object a log step, on rank 0."""

from __future__ import annotations

import json
from typing import Any

from transformers import TrainerCallback

from sft_recipes.planning.run_folder import RunFolder


class WriteMetrics(TrainerCallback):
    """Appends to `metrics.jsonl`; after a resume it goes on behind the checkpoint's step."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leaves out what an interrupted start wrote behind the checkpoint that this one goes on from."""
        path = self.folder.metrics
        if state.is_world_process_zero and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= state.global_step]
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line: the step, then whatever was logged."""
        if not state.is_world_process_zero or not logs:
            return
        figures = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        line = {"step": state.global_step, **figures, "supervised_tokens_seen": self.trainer.supervised_tokens_seen}
        if "loss" in logs:
            line["tokens_digest"] = self.trainer.tokens_digest  # here alone: a curve of it would say nothing
        with self.folder.metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a kill cut short
        return float("inf")
