"""Stops every rank before the optimizer step at a NaN/Inf loss or gradient, and names the rows.

The Trainer would log another loss and take the step (`logging_nan_inf_filter`), and DeepSpeed silently skips the step
(`check_grad_overflow`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sft_recipes.planner.plan import Plan

_MAX_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Divergence:
    """Step and reason of a divergence, whether that step was applied, and its rows as places in the user's files."""

    step: int
    reason: str
    loss: float
    grad_norm: float | None
    rows: list[str]
    applied: bool = False


class DivergedError(Exception):
    """The run diverged: exit code 3. Raised on every rank at the same step."""

    def __init__(self, divergence: Divergence):
        super().__init__(divergence.reason)
        self.divergence = divergence

    def record(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return {key: json_number(value) for key, value in asdict(self.divergence).items()}


def json_number(value: Any) -> Any:
    """Return numbers that JSON lacks (NaN, Infinity) as text, and all other values unchanged."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class NanGuard:
    """Checks the losses of a step on all ranks before its last backward pass, and its gradients after it."""

    def __init__(self, plan: Plan, prepared: Path, model: torch.nn.Module):
        self._plan = plan
        self._prepared = prepared
        self._losses: list[torch.Tensor] = []
        self._non_finite: list[torch.Tensor] = []
        self.loss = math.nan
        self.grad_norm: float | None = None
        model.register_forward_hook(self._record_non_finite)

    def _record_non_finite(self, model: torch.nn.Module, _inputs: Any, output: Any) -> None:
        """Record which predictions of a micro-batch are not finite, [batch, length - 1]."""
        log_probs = getattr(output, "log_probs", None)
        if model.training and log_probs is not None:
            self._non_finite.append(~torch.isfinite(log_probs.detach()))

    def check_loss(self, trainer: Any, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's loss; at the last one, reduce the loss over all ranks and check it.

        Under DeepSpeed the following backward pass includes the optimizer step, so it cannot be checked later.

        Raises:
            DivergedError: on all ranks, if it is not finite on one.
        """
        self._losses.append(loss.detach())
        if not trainer.accelerator.sync_gradients:
            return
        losses = torch.stack(self._losses).double()
        sums = torch.stack([losses.sum(), (~torch.isfinite(losses)).sum().double()])
        total, non_finite = trainer.accelerator.reduce(sums, "sum").tolist()
        self.loss = total / trainer.accelerator.num_processes
        if non_finite:
            self.grad_norm = None  # this step has none
            rows = self._rows(trainer, trainer.state.global_step, torch.isfinite(losses).tolist())
            raise self._diverged(trainer.state.global_step + 1, "the loss is NaN or Inf", rows)
        self._losses.clear()
        self._non_finite.clear()

    def check_gradients(self, trainer: Any, norm: Any) -> None:
        """Check the norm of the step's gradients over all ranks before the step (DeepSpeed: which it then skipped).

        Raises:
            DivergedError: the norm is not finite.
        """
        full_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.grad_norm = None if full_norm is None else float(full_norm)
        skipped = trainer.is_deepspeed_enabled and trainer.accelerator.optimizer_step_was_skipped
        if skipped or (self.grad_norm is not None and not (math.isfinite(self.grad_norm) and self.grad_norm >= 0)):
            rows = self._rows(trainer, trainer.state.global_step, [])
            raise self._diverged(trainer.state.global_step + 1, "the gradients are NaN or Inf", rows)

    def stop_by_alert(self, trainer: Any, reason: str) -> DivergedError:
        """Return the error for an alert that stops the run after an applied step. Collective: call on every rank."""
        step = trainer.state.global_step
        return self._diverged(step, reason, self._rows(trainer, step - 1, []), applied=True)

    def _diverged(self, step: int, reason: str, rows_of_rank: list[str], applied: bool = False) -> DivergedError:
        from accelerate.utils import gather_object

        rows = list(dict.fromkeys(gather_object(rows_of_rank)))
        hidden = len(rows) - _MAX_ROWS_SHOWN
        shown = rows[:_MAX_ROWS_SHOWN] + ([f"and {hidden} more"] if hidden > 0 else [])
        return DivergedError(Divergence(step, reason, self.loss, self.grad_norm, shown, applied))

    def _rows(self, trainer: Any, steps_taken: int, finite: Sequence[bool]) -> list[str]:
        """Return the places of this rank's examples with non-finite losses, in the step after `steps_taken` steps; of
        all its rows if their losses are unknown.

        Args:
            finite: per micro-batch, whether its loss is finite.
        """
        from datasets import load_from_disk

        plan = self._plan
        rows = load_from_disk(str(self._prepared / "train"))
        order = trainer.rows_of_step(steps_taken)
        size, ranks = plan.per_device_train_batch_size, trainer.accelerator.num_processes
        places: list[str] = []
        for number in range(plan.gradient_accumulation_steps):
            known = number < len(finite)
            if known and finite[number]:
                continue
            first = (number * ranks + trainer.accelerator.process_index) * size
            mask = self._non_finite[number].cpu() if known and number < len(self._non_finite) else None
            for index, row in enumerate(order[first : first + size]):
                places += _places_in_row(
                    rows[row], None if mask is None else _mask_of_row(mask, rows, order, first, index)
                )
        return places


def _mask_of_row(mask: torch.Tensor, rows: Any, order: Sequence[int], first: int, index: int) -> list[bool]:
    """Return the mask of one row of a micro-batch, whose rows are stacked, or concatenated (padding-free)."""
    if mask.shape[0] > 1 or (index == 0 and len(mask[0]) < len(rows[order[first]]["input_ids"])):
        return list(mask[index].tolist())
    start = sum(len(rows[row]["input_ids"]) for row in order[first : first + index])
    return list(mask[0, start : start + len(rows[order[first + index]]["input_ids"])].tolist())


def _places_in_row(row: dict[str, Any], mask: list[bool] | None) -> list[str]:
    """Return the places of a row's examples; with a mask only of the marked ones."""
    places = [row["source"]] if isinstance(row["source"], str) else list(row["source"])
    if mask is None:
        return places
    if len(places) == 1:
        return places if any(mask) else []
    marked, end = [], 0
    for place, length in zip(places, row["seq_lengths"], strict=True):
        if any(mask[end : end + length]):
            marked.append(place)
        end += length
    return marked
