"""Keeps the weights of the three best steps, and sees that the last step is evaluated too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft_recipes.planning.run_folder import RunFolder
from sft_recipes.training import checkpoint


class KeepBest(TrainerCallback):
    """Saves `best-N/` after an evaluation that is among the three best, and marks checkpoints that are whole."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer saves at the last step but evaluates only at multiples of eval_steps."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """All ranks take part in a save: sharded weights are gathered from each."""
        if not state.global_step:
            return
        if checkpoint.among_the_best(checkpoint.validation_losses(state.log_history), state.global_step):
            self.trainer.save_weights(self.folder.best(state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer calls this when rank 0 has written; the others' files are awaited."""
        mark_when_all_have_written(self.trainer, state)
        if state.is_world_process_zero:
            # Only now: until this checkpoint was whole, an interrupted run went on from one that remembers others.
            checkpoint.forget_all_but_the_best(self.folder, checkpoint.validation_losses(state.log_history))


def mark_when_all_have_written(trainer: Any, state: Any) -> None:
    """Marks the checkpoint of this step as whole once every rank's files are there. All ranks take part."""
    trainer.accelerator.wait_for_everyone()
    if state.is_world_process_zero:
        folder = RunFolder(Path(trainer.args.output_dir)).checkpoint(state.global_step)
        checkpoint.mark_complete(folder, state.global_step, trainer.supervised_tokens_seen)
