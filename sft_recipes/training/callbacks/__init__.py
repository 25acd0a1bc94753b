"""Trainer callbacks, one per file."""

from typing import Any

from transformers import TrainerCallback


class RunCallback(TrainerCallback):
    """A callback that knows the trainer to which `RecipeTrainer.add_callbacks` adds it."""

    trainer: Any = None
