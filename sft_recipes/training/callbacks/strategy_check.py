"""Stops a run before its first step where engine, dtypes or the isolation of packed rows are not what was planned."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import manifest, packing_isolation, strategy


class StrategyCheckCallback(TrainerCallback):
    """Looks once the model is prepared for its engine."""

    def __init__(self, plan: Plan, folder: RunDir):
        self.plan = plan
        self.folder = folder
        self.trainer: Any = None
        self.looked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """On every rank, since each prepares its own."""
        got = strategy.check(self.plan, self.trainer)
        strategy.count_up_again(self.trainer)
        if state.is_world_process_zero:
            manifest.note(self.folder, dtypes=got)
        if self.plan.packing:
            packing_isolation.check(self.plan, self.trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first gradients that there are, before they change a weight."""
        if not self.looked:
            strategy.check_gradients(self.plan, self.trainer)
            self.looked = True
