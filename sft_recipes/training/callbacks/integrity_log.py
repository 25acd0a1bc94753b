"""Proves while a run trains: writes `integrity.jsonl`, settles the ledger of rows, and compares copies of the weights.

A step is proved by digests of what each rank held behind it. Those of a save and of the two steps behind it let
`verify-resume` take the same steps again and compare.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import TrainingError
from sft_recipes.runtime.run_dir import STEPS_PROVED, RunDir
from sft_recipes.training.callbacks.metrics import append, forget_behind
from sft_recipes.training.integrity import fingerprint
from sft_recipes.training.integrity.data_order import DataOrderCheck
from sft_recipes.training.integrity.replica_check import ReplicaCheck


class IntegrityCallback(TrainerCallback):
    """What is proved of a run, and where: a trainer has one from its beginning."""

    def __init__(self, plan: Plan, folder: RunDir, ledger: DataOrderCheck):
        self.folder = folder
        self.ledger = ledger
        self.replicas = ReplicaCheck() if plan.strategy.ddp else None
        self.compare_every = plan.sections.monitor.replica_check_steps
        self.trainer: Any = None
        self._taken_up: dict[str, Any] = {}
        self._went_on_from: int | None = None
        self._proved_until = 0

    def restore_state(self, record: dict[str, Any]) -> None:
        """Before a resumed run trains: what `record` gave when its checkpoint was saved; nothing where nothing is known
        of that."""
        self._taken_up = record

    def record(self) -> dict[str, Any]:
        """Proves the step that is about to be saved, before a file of it is written; for the checkpoint to hold. All
        ranks take part.

        Raises:
            TrainingError: ranks hold different weights, or were fed other rows than the epoch's.
        """
        state = self.trainer.state
        if self.replicas:
            self.replicas.compare(self.trainer, state.global_step)
        self._settle(state)
        ranks = self._write(state, saved=True)
        self._proved_until = state.global_step + STEPS_PROVED
        return {"step": state.global_step, "rows": self.ledger.chain, "ranks": ranks}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on behind the checkpoint's step; what an interrupted start proved behind it is left out.

        Raises:
            TrainingError: the checkpoint's proof is another step's.
        """
        record, step = self._taken_up, state.global_step
        if record and record["step"] != step:
            raise TrainingError(f"a checkpoint of step {step} holds the proof of step {record['step']}: is it a copy?")
        self.ledger.restore_state(step, record.get("rows", ""))
        if step:
            self._went_on_from = step
            self._proved_until = step + STEPS_PROVED
        if state.is_world_process_zero:
            forget_behind(self.folder.integrity_log, step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where copies were compared behind the last step, each rank's must still be what they were."""
        if self.replicas:
            self.replicas.compare_with_before(self.trainer, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What the step left.

        Random numbers are compared here, at a step's end: a resumed run restores them only when it has drawn its first
        batch (the Trainer's `_load_rng_state`), so at a step's beginning they are others. An evaluation, which a replay
        does not make, draws none (trainer.evaluation_loop).
        """
        proved = state.global_step <= self._proved_until
        if proved or control.should_log or control.should_save:
            self._settle(state)
        if self.replicas and state.global_step % self.compare_every == 0:
            self.replicas.compare(self.trainer, state.global_step)
        if proved:
            self._write(state, saved=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every row of the epoch was used once."""
        self._settle(state)
        if not control.should_training_stop:
            self.ledger.end_epoch(state.global_step)

    def _settle(self, state: Any) -> None:
        self.ledger.settle()
        if self.ledger.steps != state.global_step:
            raise TrainingError(
                f"{self.ledger.steps} steps were fed rows, but {state.global_step} were taken; report this"
            )

    def _write(self, state: Any, saved: bool) -> list[dict[str, str]]:
        """One line; the digests of every rank. All ranks take part."""
        from accelerate.utils import gather_object

        ranks: list[dict[str, str]] = gather_object([fingerprint.of_rank(self.trainer)])
        if state.is_world_process_zero:
            line = {"step": state.global_step, "saved": saved, "went_on_from": self._went_on_from}
            line |= {"loss": self.trainer.watch.loss, "rows": self.ledger.chain, "ranks": ranks}
            append(self.folder.integrity_log, line)
        return ranks
