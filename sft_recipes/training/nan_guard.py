"""Stops every rank before the optimizer step at a NaN/Inf loss or gradient, and names the rows.

The Trainer would log another loss and take the step (`logging_nan_inf_filter`), and DeepSpeed silently skips the step
(`check_grad_overflow`).
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import load_from_disk

_MAX_ROWS_SHOWN = 20


@dataclass(eq=False)
class DivergedError(Exception):
    """The run diverged: exit code 3. Raised on every rank at the same step.

    Attributes:
        rows: of the step, as places in the user's files.
        applied: whether the step was applied.
    """

    step: int
    reason: str
    loss: float
    grad_norm: float | None
    rows: list[str]
    applied: bool = False

    def __str__(self) -> str:
        return self.reason

    def record(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return {key: json_number(value) for key, value in asdict(self).items()}


def json_number(value: Any) -> Any:
    """Return numbers that JSON lacks (NaN, Infinity) as text, and all other values unchanged."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class NanGuard:
    """Checks the losses of a step on all ranks before its last backward pass, and its gradients after it."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._losses: list[torch.Tensor] = []
        self.loss = math.nan
        self.grad_norm: float | None = None

    def check_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's loss; at the last one, reduce the loss over all ranks and check it.

        Under DeepSpeed the following backward pass includes the optimizer step, so it cannot be checked later.

        Raises:
            DivergedError: on all ranks, if it is not finite on one.
        """
        self._losses.append(loss.detach())
        accelerator = self._trainer.accelerator
        if not accelerator.sync_gradients:
            return
        losses, self._losses = torch.stack(self._losses).double(), []
        self.loss = float(accelerator.reduce(losses.sum(), "sum")) / accelerator.num_processes
        if not math.isfinite(self.loss):
            self.grad_norm = None  # this step has none
            raise self.diverged("the loss is NaN or Inf", (~losses.isfinite()).nonzero().flatten().tolist())

    def check_gradients(self, norm: Any) -> None:
        """Check the norm of the step's gradients over all ranks before the step (DeepSpeed: which it then skipped).

        Raises:
            DivergedError: the norm is not finite.
        """
        full_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.grad_norm = None if full_norm is None else float(full_norm)
        skipped = self._trainer.is_deepspeed_enabled and self._trainer.accelerator.optimizer_step_was_skipped
        if skipped or (self.grad_norm is not None and not 0 <= self.grad_norm < math.inf):
            raise self.diverged("the gradients are NaN or Inf")

    def diverged(self, reason: str, micro_batches: Iterable[int] | None = None, applied: bool = False) -> DivergedError:
        """Return the error with the rows of the step. Collective: call on every rank.

        Args:
            micro_batches: those of this rank with a non-finite loss; None for all of them.
            applied: the step was applied, and an alert stops the run.
        """
        trainer = self._trainer
        steps_before = trainer.state.global_step - applied
        prepared, order = load_from_disk(str(trainer.prepared / "train")), trainer.rows_of_step(steps_before)
        size, ranks = trainer.plan.per_device_train_batch_size, trainer.accelerator.num_processes
        places: list[str] = []
        for number in range(trainer.plan.gradient_accumulation_steps) if micro_batches is None else micro_batches:
            first = (number * ranks + trainer.accelerator.process_index) * size
            for row in order[first : first + size]:
                source = prepared[row]["source"]
                places += [source] if isinstance(source, str) else source  # packed rows have several
        rows = list(dict.fromkeys(gather_object(places)))[:_MAX_ROWS_SHOWN]
        return DivergedError(steps_before + 1, reason, self.loss, self.grad_norm, rows, applied)
