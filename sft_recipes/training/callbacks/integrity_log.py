"""Integrity log: fingerprints of each rank's state, the data-order check, and the replica consistency check.

`integrity.jsonl` has the fingerprints after each save and the next two steps, for `verify-resume` to compare.
"""

from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import FINGERPRINTED_STEPS
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.callbacks.metrics import append, drop_lines_after
from sft_recipes.training.integrity import fingerprint, replica_check
from sft_recipes.training.integrity.data_order import DataOrderCheck


class IntegrityCallback(RunCallback):
    """Writes `integrity.jsonl` and runs the checks; part of every trainer.

    Attributes:
        data_order: the data-order check; its hash is restored before a resumed run trains.
        replica_check_steps: steps between two replica checks; 0 without DDP.
    """

    def __init__(self, plan: Plan, data_order: DataOrderCheck):
        self.data_order = data_order
        self.replica_check_steps = plan.sections.monitor.replica_check_steps if plan.strategy.ddp else 0
        self._resumed_from: int | None = None
        self._fingerprint_until = 0

    def check_before_save(self) -> dict[str, Any]:
        """Check and log the step to be saved, before its first file is written; return what the checkpoint records.

        Collective: call on every rank.

        Raises:
            TrainingError: ranks hold different weights, or were fed other rows than the epoch's.
        """
        step = self.trainer.state.global_step
        if self.replica_check_steps:
            replica_check.compare(self.trainer, step)
        self.data_order.check_pending(step)
        self._fingerprint_until = step + FINGERPRINTED_STEPS
        return {"rows_hash": self.data_order.rows_hash, "fingerprints": self._log_fingerprints(step, saved=True)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Continue after the checkpoint's step; drop what an interrupted attempt logged after it."""
        self.data_order.steps = state.global_step
        if state.global_step:
            self._resumed_from = state.global_step
            self._fingerprint_until = state.global_step + FINGERPRINTED_STEPS
        if state.is_world_process_zero:
            drop_lines_after(self.trainer.folder.integrity_log, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Run the checks that are due, and log fingerprints.

        Random states are compared at the end of a step: a resumed run restores them only after it has drawn its first
        batch (the Trainer's `_load_rng_state`). An evaluation, which a replay skips, draws no random number
        (RecipeTrainer.evaluation_loop).
        """
        fingerprinted = state.global_step <= self._fingerprint_until
        if fingerprinted or control.should_log or control.should_save:
            self.data_order.check_pending(state.global_step)
        if self.replica_check_steps and state.global_step % self.replica_check_steps == 0:
            replica_check.compare(self.trainer, state.global_step)
        if fingerprinted:
            self._log_fingerprints(state.global_step, saved=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that every row of the epoch was used once."""
        self.data_order.check_pending(state.global_step, epoch_ended=not control.should_training_stop)

    def _log_fingerprints(self, step: int, saved: bool) -> list[dict[str, str]]:
        """Append one line; return the fingerprints of every rank. Collective."""
        from accelerate.utils import gather_object

        fingerprints: list[dict[str, str]] = gather_object([fingerprint.of_rank(self.trainer)])
        if self.trainer.accelerator.is_main_process:
            line = {"step": step, "saved": saved, "resumed_from": self._resumed_from}
            line |= {"loss": self.trainer.nan_guard.loss, "rows_hash": self.data_order.rows_hash}
            append(self.trainer.folder.integrity_log, {**line, "fingerprints": fingerprints})
        return fingerprints
