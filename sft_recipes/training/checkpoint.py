"""Says which checkpoint a run goes on from and which steps are best, and lets folders appear whole or not at all."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from sft_recipes.planning.run_folder import RunFolder, read_json, write_json

COMPLETE = "complete.json"
BEST_KEPT = 3
# Of a whole checkpoint, what makes a model's folder; the rest is the training's state.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "token*",
    "*.jinja",
    "special_tokens_map.json",
)


def mark_complete(checkpoint: Path, step: int, supervised_tokens_seen: int) -> None:
    """Written last, when every rank has written its files: without it a checkpoint is not gone on from."""
    write_json(checkpoint / COMPLETE, {"step": step, "supervised_tokens_seen": supervised_tokens_seen})


def supervised_tokens_seen(checkpoint: Path) -> int:
    """Supervised tokens of all steps up to a whole checkpoint's."""
    return int(read_json(checkpoint / COMPLETE)["supervised_tokens_seen"])


def newest_complete(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and the names of newer ones that were passed over."""
    passed_over = []
    for step in reversed(folder.numbered("checkpoint")):
        checkpoint = folder.checkpoint(step)
        if read_json(checkpoint / COMPLETE).get("step") == step:
            return checkpoint, passed_over
        passed_over.append(checkpoint.name)
    return None, passed_over


def validation_losses(log_history: list[dict[str, Any]]) -> dict[int, float]:
    """Validation loss by step, as the Trainer's state remembers it across a resume."""
    return {entry["step"]: entry["eval_loss"] for entry in log_history if "eval_loss" in entry and entry["step"]}


def among_the_best(losses: dict[int, float], step: int) -> bool:
    """Whether this step's validation loss is among the lowest that are kept; an earlier step wins a tie."""
    return step in _best(losses)


def forget_all_but_the_best(folder: RunFolder, losses: dict[int, float]) -> None:
    """Removes the weights of steps that are among the best no more."""
    for step in folder.numbered("best"):
        if step not in _best(losses):
            shutil.rmtree(folder.best(step))


def best_step(folder: RunFolder, losses: dict[int, float]) -> int | None:
    """The step with the lowest validation loss of those whose weights are there; the earliest of equals."""
    return next((step for step in _best(losses) if folder.best(step).is_dir()), None)


def partial(target: Path) -> Path:
    """The name under which `target` is written until it is whole."""
    return target.with_name(target.name + ".partial")


def publish(target: Path) -> None:
    """Gives a folder written as `partial(target)` its name, in place of what an interrupted start left there."""
    shutil.rmtree(target, ignore_errors=True)
    partial(target).replace(target)


def copy_whole(source: Path, target: Path, names: tuple[str, ...] = ("*",)) -> None:
    """Copies the files of a folder whose names match so that `target` is whole or not there."""
    shutil.rmtree(partial(target), ignore_errors=True)
    partial(target).mkdir()
    for name in names:
        for file in source.glob(name):
            shutil.copy2(file, partial(target))
    publish(target)


def _best(losses: dict[int, float]) -> list[int]:
    numbers = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return sorted(numbers, key=lambda step: (numbers[step], step))[:BEST_KEPT]
