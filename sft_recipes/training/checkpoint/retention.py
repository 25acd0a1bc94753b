"""Retention: rank steps by validation loss, and keep the weights of the best."""

import logging
import math
from typing import Any

from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.checkpoint import checkpoint_format

log = logging.getLogger(__name__)

BEST_KEPT = 3


def validation_losses(log_history: list[dict[str, Any]]) -> dict[int, float]:
    """Return the validation loss of each evaluated step; the Trainer's state keeps them across a resume."""
    return {entry["step"]: entry["eval_loss"] for entry in log_history if "eval_loss" in entry and entry["step"]}


def rank_steps(losses: dict[int, float]) -> list[int]:
    """Return the steps from the lowest validation loss to the highest, the earlier of equal ones first, without NaN and
    Inf."""
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return sorted(finite, key=lambda step: (finite[step], step))


def remove_others(folder: RunDir, losses: dict[int, float], run_id: str) -> None:
    """Remove this run's `best-N/` that are no longer among the best of those that were saved."""
    saved = checkpoint_format.list_own(folder, "best", run_id)
    kept = [step for step in rank_steps(losses) if step in saved][:BEST_KEPT]
    for step in set(saved) - set(kept):
        checkpoint_format.remove(folder.best(step), folder.removing)


def find_best_step(folder: RunDir, losses: dict[int, float], run_id: str) -> int | None:
    """Return the step with the lowest validation loss whose `best-N/` is valid; the earliest of equal ones."""
    for step in (step for step in rank_steps(losses) if folder.best(step).is_dir()):
        problem = checkpoint_format.verify(folder.best(step), run_id=run_id)
        if problem is None:
            return step
        log.info("skipping %s: %s", folder.best(step).name, problem)
    return None
