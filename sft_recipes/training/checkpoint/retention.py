"""Retention: rank steps by validation loss, and keep the weights of the best."""

from __future__ import annotations

import logging
import math
from typing import Any

from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.checkpoint_format import CorruptCheckpointError

log = logging.getLogger(__name__)

BEST_KEPT = 3


def validation_losses(log_history: list[dict[str, Any]]) -> dict[int, float]:
    """Return the validation loss of each evaluated step; the Trainer's state keeps them across a resume."""
    return {entry["step"]: entry["eval_loss"] for entry in log_history if "eval_loss" in entry and entry["step"]}


def is_among_best(losses: dict[int, float], step: int) -> bool:
    """Whether a step's validation loss is among the lowest that are kept; an earlier step wins a tie."""
    return step in rank_steps(losses)[:BEST_KEPT]


def remove_others(folder: RunDir, losses: dict[int, float], run_id: str) -> None:
    """Remove this run's `best-N/` that are no longer among the best of those that were saved."""
    saved = [step for step in folder.numbered("best") if checkpoint_format.read_run_id(folder.best(step)) == run_id]
    kept = [step for step in rank_steps(losses) if step in saved][:BEST_KEPT]
    for step in saved:
        if step not in kept:
            checkpoint_format.remove(folder.best(step), folder.removing)


def find_best_step(folder: RunDir, losses: dict[int, float], run_id: str) -> int | None:
    """Return the step with the lowest validation loss whose `best-N/` is valid; the earliest of equal ones."""
    for step in rank_steps(losses):
        directory = folder.best(step)
        if not directory.is_dir():
            continue
        try:
            record = checkpoint_format.read_commit_marker(directory)
            problem = None if record.get("run_id") == run_id else "of another run"
            problem = problem or checkpoint_format.verify_checksums(directory, record)
        except CorruptCheckpointError as error:
            problem = str(error)
        if problem is None:
            return step
        log.info("skipping %s: %s", directory.name, problem)
    return None


def rank_steps(losses: dict[int, float]) -> list[int]:
    """Return the steps from the lowest validation loss to the highest, without NaN and Inf."""
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return sorted(finite, key=lambda step: (finite[step], step))
