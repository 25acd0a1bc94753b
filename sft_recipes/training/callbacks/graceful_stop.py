"""Graceful stop: a signal on any rank becomes one decision of all ranks, to save this step and stop."""

from typing import Any

import torch

from sft_recipes.training import stop_signal
from sft_recipes.training.callbacks import RunCallback


class StoppedAtStartError(Exception):
    """This attempt takes no step: a stop was requested, or the run ended, before the first."""


class EvaluationStoppedError(Exception):
    """All ranks leave an evaluation at the same forward pass; the next attempt repeats it."""


class GracefulStopCallback(RunCallback):
    """All-reduces the stop request at every step, since ranks receive a signal at different steps.

    A rank that saved alone would wait indefinitely for the others, which wait in the next step's all-reduce
    (transformers' `enable_jit_checkpoint` does, with signals 0.13 s apart).

    Attributes:
        stopped: whether a stop was requested before the last step.
        first_step: the step at which this attempt started; not 0 in a resumed run.
    """

    stopped = False
    first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the step at which this attempt starts."""
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop at this step if a stop was requested; stop the step's clock after the collective."""
        if self.stop_requested():
            control.should_save = control.should_training_stop = True
        self.trainer.meter.end_step()

    def stop_requested(self) -> bool:
        """Whether a stop was requested on any rank, and the run has steps left. Collective: call on every rank."""
        requested = torch.tensor(float(stop_signal.requested()), device=self.trainer.accelerator.device)
        on_any_rank = bool(self.trainer.accelerator.reduce(requested, "sum").item())
        stop = on_any_rank and self.trainer.state.global_step < self.trainer.plan.optimizer_steps
        self.stopped = self.stopped or stop
        return stop
