"""Stops every rank before the optimizer step at a NaN/Inf loss or gradient, and names the rows.

The Trainer would log another loss and take the step (`logging_nan_inf_filter`), and DeepSpeed silently skips the step
(`check_grad_overflow`).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

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
        self._non_finite: list[torch.Tensor] = []
        self.loss = math.nan
        self.grad_norm: float | None = None
        trainer.model.register_forward_hook(self._record_non_finite)

    def _record_non_finite(self, model: torch.nn.Module, _inputs: Any, output: Any) -> None:
        """Record which predictions of a micro-batch are not finite, [batch, length - 1]."""
        log_probs = getattr(output, "log_probs", None)
        if model.training and log_probs is not None:
            self._non_finite.append(~torch.isfinite(log_probs.detach()))

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
        total = accelerator.reduce(torch.stack(self._losses).double().sum(), "sum")
        self.loss = float(total) / accelerator.num_processes
        if not math.isfinite(self.loss):
            self.grad_norm = None  # this step has none
            raise self.diverged("the loss is NaN or Inf")
        self._losses.clear()
        self._non_finite.clear()

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

    def diverged(self, reason: str, applied: bool = False) -> DivergedError:
        """Return the error with the rows of the step. Collective: call on every rank.

        Args:
            applied: the step was applied, and an alert stops the run.
        """
        from accelerate.utils import gather_object

        steps_before = self._trainer.state.global_step - applied
        rows = list(dict.fromkeys(gather_object(list(self._find_rows(steps_before)))))
        if len(rows) > _MAX_ROWS_SHOWN:
            rows[_MAX_ROWS_SHOWN:] = [f"and {len(rows) - _MAX_ROWS_SHOWN} more"]
        return DivergedError(steps_before + 1, reason, self.loss, self.grad_norm, rows, applied)

    def _find_rows(self, steps_before: int) -> Iterator[str]:
        """Yield the places of this rank's examples with non-finite predictions in a step; of all that it used if the
        loss was finite."""
        from datasets import load_from_disk

        trainer = self._trainer
        rows, order = load_from_disk(str(trainer.prepared / "train")), trainer.rows_of_step(steps_before)
        size, ranks = trainer.plan.per_device_train_batch_size, trainer.accelerator.num_processes
        for number in range(trainer.plan.gradient_accumulation_steps):
            first = (number * ranks + trainer.accelerator.process_index) * size
            batch = [rows[row] for row in order[first : first + size]]
            yield from find_places(batch, self._non_finite[number].cpu() if self._non_finite else None)


def find_places(batch: list[dict[str, Any]], non_finite: torch.Tensor | None) -> Iterator[str]:
    """Yield the places of a micro-batch's examples; with a mask only of the marked ones.

    Args:
        non_finite: mask of the rows, stacked or concatenated (padding-free), [batch or 1, length - 1].
    """
    start = 0
    for index, row in enumerate(batch):
        packed = not isinstance(row["source"], str)
        lengths = row["seq_lengths"] if packed else [len(row["input_ids"])]
        stacked = non_finite is not None and len(non_finite) > 1
        first = 0 if stacked else start
        for place, length in zip(row["source"] if packed else [row["source"]], lengths, strict=True):
            if non_finite is None or non_finite[index if stacked else 0, first : first + length].any():
                yield place
            first += length
        start += len(row["input_ids"])
