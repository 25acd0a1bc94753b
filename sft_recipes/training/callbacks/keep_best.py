"""Keeps what a run can go on from and be used with: the two newest checkpoints, the weights of the three best steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import manifest
from sft_recipes.training.callbacks.metrics import append
from sft_recipes.training.checkpoint import checkpoint_format, retention

CHECKPOINTS_KEPT = 2


class RetentionCallback(TrainerCallback):
    """Saves `best-N/` after an evaluation that is among the three best, and sees that the last step is evaluated."""

    def __init__(self, folder: RunDir):
        self.folder = folder
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer saves at the last step but evaluates only at multiples of eval_steps; a save that the disk
        refused is tried again."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        if state.global_step == self.trainer.saving.try_again_at:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """All ranks take part in a save: sharded weights are gathered from each."""
        step = state.global_step
        if not step or not retention.is_among_the_best(retention.validation_losses(state.log_history), step):
            return
        refused = self.trainer.save_weights(self.folder.best(step))
        if refused:
            self.trainer.say(f"step {step}  the weights of this step, one of the best, are NOT SAVED: {refused}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once the newest checkpoint is whole, older ones go; until then a start went on from one of them."""
        saving = self.trainer.saving
        if not state.is_world_process_zero or saving.try_again_at is not None:
            return
        with saving.tolerated():  # the checkpoint is there; this says so where all of them are lost
            manifest.note(self.folder, saved_step=state.global_step)
        figures = {"save_seconds": round(saving.seconds, 3), "save_bytes": saving.bytes_at_most}
        seen = {"supervised_tokens_seen": self.trainer.supervised_tokens_seen}
        append(self.folder.metrics, {"step": state.global_step, **figures, **seen})
        run_id = self.trainer.plan.run_id
        retention.forget_all_others(
            self.folder, retention.validation_losses(state.log_history), run_id, self.trainer.say
        )
        for step in checkpoint_format.of_this_run(self.folder, run_id)[:-CHECKPOINTS_KEPT]:
            checkpoint_format.remove(self.folder.checkpoint(step), self.folder.removing, self.trainer.say)
