"""Integrity log: fingerprints of each rank's state, the data-order check, and the replica consistency check.

`integrity.jsonl` has the fingerprints after each save and the next two steps, for `verify-resume` to compare.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import TrainingError
from sft_recipes.runtime.run_dir import FINGERPRINTED_STEPS, RunDir
from sft_recipes.training.callbacks.metrics import append, drop_lines_after
from sft_recipes.training.integrity import fingerprint
from sft_recipes.training.integrity.data_order import DataOrderCheck
from sft_recipes.training.integrity.replica_check import ReplicaCheck


class IntegrityCallback(TrainerCallback):
    """Writes `integrity.jsonl` and runs the checks; part of every trainer.

    Attributes:
        data_order: the data-order check.
        replicas: the replica consistency check, under DDP.
        compare_every: steps between two replica checks (`monitor.replica_check_steps`).
    """

    def __init__(self, plan: Plan, folder: RunDir, data_order: DataOrderCheck):
        self.folder = folder
        self.data_order = data_order
        self.replicas = ReplicaCheck() if plan.strategy.ddp else None
        self.compare_every = plan.sections.monitor.replica_check_steps
        self.trainer: Any = None
        self._restored: dict[str, Any] = {}
        self._resumed_from: int | None = None
        self._fingerprint_until = 0

    def restore_state(self, record: dict[str, Any]) -> None:
        """Restore what `check_before_save` returned for the checkpoint, before a resumed run trains."""
        self._restored = record

    def check_before_save(self) -> dict[str, Any]:
        """Check and log the step to be saved, before its first file is written; return what the checkpoint records.

        Collective: call on every rank.

        Raises:
            TrainingError: ranks hold different weights, or were fed other rows than the epoch's.
        """
        state = self.trainer.state
        if self.replicas:
            self.replicas.compare(self.trainer, state.global_step)
        self._check_rows(state)
        fingerprints = self._log_fingerprints(state, saved=True)
        self._fingerprint_until = state.global_step + FINGERPRINTED_STEPS
        return {"step": state.global_step, "rows_hash": self.data_order.rows_hash, "fingerprints": fingerprints}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Continue after the checkpoint's step; drop what an interrupted attempt logged after it.

        Raises:
            TrainingError: the checkpoint's record is of another step.
        """
        record, step = self._restored, state.global_step
        if record and record["step"] != step:
            raise TrainingError(f"checkpoint of step {step}: its integrity record is of step {record['step']}")
        self.data_order.restore_state(step, record.get("rows_hash", ""))
        if step:
            self._resumed_from = step
            self._fingerprint_until = step + FINGERPRINTED_STEPS
        if state.is_world_process_zero:
            drop_lines_after(self.folder.integrity_log, step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that no rank's weights changed since they were compared after the last step."""
        if self.replicas:
            self.replicas.compare_before_step(self.trainer, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Run the checks that are due, and log fingerprints.

        Random states are compared at the end of a step: a resumed run restores them only after it has drawn its first
        batch (the Trainer's `_load_rng_state`). An evaluation, which a replay skips, draws no random number
        (RecipeTrainer.evaluation_loop).
        """
        fingerprinted = state.global_step <= self._fingerprint_until
        if fingerprinted or control.should_log or control.should_save:
            self._check_rows(state)
        if self.replicas and state.global_step % self.compare_every == 0:
            self.replicas.compare(self.trainer, state.global_step)
        if fingerprinted:
            self._log_fingerprints(state, saved=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that every row of the epoch was used once."""
        self._check_rows(state)
        if not control.should_training_stop:
            self.data_order.check_epoch_end(state.global_step)

    def _check_rows(self, state: Any) -> None:
        self.data_order.check_pending()
        if self.data_order.steps != state.global_step:
            raise TrainingError(
                f"rows were fed to {self.data_order.steps} steps, but {state.global_step} were taken; report this"
            )

    def _log_fingerprints(self, state: Any, saved: bool) -> list[dict[str, str]]:
        """Append one line; return the fingerprints of every rank. Collective."""
        from accelerate.utils import gather_object

        fingerprints: list[dict[str, str]] = gather_object([fingerprint.of_rank(self.trainer)])
        if state.is_world_process_zero:
            line = {"step": state.global_step, "saved": saved, "resumed_from": self._resumed_from}
            line |= {"loss": self.trainer.nan_guard.loss, "rows_hash": self.data_order.rows_hash}
            append(self.folder.integrity_log, {**line, "fingerprints": fingerprints})
        return fingerprints
