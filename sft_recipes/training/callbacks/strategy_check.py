"""Check strategy, dtypes and packing isolation before the first step: they must be as planned."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import manifest, packing_isolation, strategy


class StrategyCheckCallback(TrainerCallback):
    """Checks the prepared model, and the first gradients.

    Attributes:
        gradients_checked: whether the first gradients were checked.
    """

    def __init__(self, plan: Plan, folder: RunDir):
        self.plan = plan
        self.folder = folder
        self.trainer: Any = None
        self.gradients_checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the model on every rank, since each rank prepares its own."""
        dtypes = strategy.check(self.plan, self.trainer)
        strategy.restore_cpu_adam_steps(self.trainer)
        if state.is_world_process_zero:
            manifest.update(self.folder, dtypes=dtypes)
        if self.plan.packing or getattr(self.trainer.data_collator, "padding_free", False):  # rows are concatenated
            packing_isolation.check(self.plan, self.trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the first gradients before they change a weight."""
        if not self.gradients_checked:
            strategy.check_gradients(self.plan, self.trainer)
            self.gradients_checked = True
