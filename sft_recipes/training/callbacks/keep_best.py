"""Retention: keep the two latest checkpoints, and the weights of the three best steps."""

import logging
from typing import Any

from sft_recipes.training import manifest
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.callbacks.metrics import append
from sft_recipes.training.checkpoint import checkpoint_format, retention

log = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 2


class RetentionCallback(RunCallback):
    """Saves `best-N/` after an evaluation among the three best, and has the last step evaluated."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request an evaluation at the last step, and a new save after a failed one.

        The Trainer saves at the last step, but evaluates only at multiples of eval_steps.
        """
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        if state.global_step == self.trainer.checkpoint_writer.retry_at_step:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Save the weights if the step is among the best. Collective: sharded weights are gathered from every rank."""
        step, losses = state.global_step, retention.validation_losses(state.log_history)
        if step not in retention.rank_steps(losses)[: retention.BEST_KEPT]:
            return
        best = self.trainer.folder.best(step)
        if error := self.trainer.save_weights(best):
            log.warning("step %d: %s was not saved: %s", step, best.name, error)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove older checkpoints once the latest is complete."""
        writer, folder, run_id = self.trainer.checkpoint_writer, self.trainer.folder, self.trainer.plan.run_id
        if not state.is_world_process_zero or writer.retry_at_step is not None:
            return
        log.info("saved %s in %.1f s", folder.checkpoint(state.global_step).name, writer.save_seconds)
        with writer.collect_write_errors():  # the checkpoint is complete; this line reveals the loss of all of them
            manifest.update(folder, saved_step=state.global_step)
        save = {"save_seconds": round(writer.save_seconds, 3), "save_bytes": writer.expected_bytes}
        tokens = {"supervised_tokens_seen": self.trainer.supervised_tokens_seen}
        append(folder.metrics, {"step": state.global_step, **save, **tokens})
        retention.remove_others(folder, retention.validation_losses(state.log_history), run_id)
        for step in checkpoint_format.list_own(folder, "checkpoint", run_id)[:-CHECKPOINTS_KEPT]:
            checkpoint_format.remove(folder.checkpoint(step), folder.removing)
