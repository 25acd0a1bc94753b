"""Says which steps are best by their validation loss, and which weights of them are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.checkpoint_format import CorruptCheckpointError

KEPT = 3


def validation_losses(log_history: list[dict[str, Any]]) -> dict[int, float]:
    """Validation loss by step, as the Trainer's state remembers it across a resume."""
    return {entry["step"]: entry["eval_loss"] for entry in log_history if "eval_loss" in entry and entry["step"]}


def is_among_the_best(losses: dict[int, float], step: int) -> bool:
    """Whether this step's validation loss is among the lowest that are kept; an earlier step wins a tie."""
    return step in ranked(losses)[:KEPT]


def forget_all_others(folder: RunDir, losses: dict[int, float], run_id: str, say: Callable[[str], None]) -> None:
    """Removes this run's weights of steps that are among the best no more, of those that are there: what a full disk
    refused makes no other go. What cannot be removed stays, which is said."""
    ours = [step for step in folder.numbered("best") if checkpoint_format.run_of(folder.best(step)) == run_id]
    kept = [step for step in ranked(losses) if step in ours][:KEPT]
    for step in ours:
        if step not in kept:
            checkpoint_format.remove(folder.best(step), folder.removing, say)


def step(folder: RunDir, losses: dict[int, float], run_id: str, say: Callable[[str], None]) -> int | None:
    """The step with the lowest validation loss of those whose weights are there and whole; the earliest of equals."""
    for one in ranked(losses):
        if not folder.best(one).is_dir():
            continue
        try:
            record = checkpoint_format.read(folder.best(one))
            harm = None if record.get("run_id") == run_id else "it is another run's"
            harm = harm or checkpoint_format.damage(folder.best(one), record)
        except CorruptCheckpointError as error:
            harm = str(error)
        if harm is None:
            return one
        say(f"passing over {folder.best(one).name}: {harm}")
    return None


def ranked(losses: dict[int, float]) -> list[int]:
    """Steps from the lowest validation loss to the highest; those that are no numbers are left out."""
    numbers = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return sorted(numbers, key=lambda step: (numbers[step], step))
