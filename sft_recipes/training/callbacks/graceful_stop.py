"""Turns a signal on any rank into one decision of all ranks: save this step, then stop."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from sft_recipes.training import stop_signal


class StoppedAtStartError(Exception):
    """This start takes no step: all ranks were asked to stop, or the run had come to its end, before the first."""


class CutShortError(Exception):
    """An evaluation that all ranks leave at the same pass; the next start makes it again."""


class GracefulStopCallback(TrainerCallback):
    """Ranks get a signal at different steps, so a rank never acts on its own: the flag is reduced over all, every step.

    A rank that saved alone would wait for ever for the others, which wait in the next step's reduction
    (transformers' own `enable_jit_checkpoint` does, where signals come 0.13 s apart).
    """

    def __init__(self) -> None:
        self.stopped = False
        self.first_step = 0  # where this process's training began; a resumed run is past 0
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Records the step from which this process trains."""
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stops all ranks at this step if any was asked to."""
        if self.asked():
            control.should_save = control.should_training_stop = True

    def asked(self) -> bool:
        """Whether any rank was asked to stop a run that has steps to come; all ranks take part, and learn the same."""
        asked = torch.tensor(float(stop_signal.asked()), device=self.trainer.accelerator.device)
        any_was = bool(self.trainer.accelerator.reduce(asked, "sum").item())
        stops = any_was and self.trainer.state.global_step < self.trainer.plan.optimizer_steps
        self.stopped = self.stopped or stops
        return stops
