"""Stops a run on all ranks before a step whose loss or gradients are no number, and names the rows it came from.

The Trainer would log another loss in place of it and step on (`logging_nan_inf_filter`), and DeepSpeed skips the step
and says nothing (`check_grad_overflow`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sft_recipes.planner.plan import Plan

_PLACES_SHOWN = 20


@dataclass(frozen=True)
class What:
    """What was seen at a step, whether that step had been applied, and places of its rows in the user's files."""

    step: int
    what: str
    loss: float
    grad_norm: float | None
    rows: list[str]
    applied: bool = False


class DivergedError(Exception):
    """The run diverged: exit code 3. Raised on every rank at the same place."""

    def __init__(self, what: What):
        super().__init__(what.what)
        self.what = what

    def record(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {key: json_number(value) for key, value in asdict(self.what).items()}


def json_number(value: Any) -> Any:
    """Numbers that JSON does not have (NaN, Infinity) as text; all else as it is."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class NanGuard:
    """Looks at the losses of a step on all ranks before its last backward pass, and at the gradients behind it."""

    def __init__(self, plan: Plan, prepared: Path, model: torch.nn.Module):
        self._plan = plan
        self._prepared = prepared
        self._losses: list[torch.Tensor] = []
        self._broken: list[torch.Tensor] = []
        self.loss = math.nan
        self.grad_norm: float | None = None
        model.register_forward_hook(self._look)

    def _look(self, model: torch.nn.Module, _inputs: Any, output: Any) -> None:
        """Which predictions of a micro-batch are no numbers, [batch, length - 1]; the only time they are in hand."""
        found = getattr(output, "log_probs", None)
        if model.training and found is not None:
            self._broken.append(~torch.isfinite(found.detach()))

    def saw(self, trainer: Any, loss: torch.Tensor) -> None:
        """A micro-batch's share of the step's loss on this rank; with the last one all ranks learn the step's loss.

        Under DeepSpeed the step itself is taken within the backward pass that follows, so no later place will do.

        Raises:
            DivergedError: on all ranks, where it is no number on one.
        """
        self._losses.append(loss.detach())
        if not trainer.accelerator.sync_gradients:
            return
        losses = torch.stack(self._losses).double()
        mine = torch.stack([losses.sum(), (~torch.isfinite(losses)).sum().double()])
        total, broken = trainer.accelerator.reduce(mine, "sum").tolist()
        self.loss = total / trainer.accelerator.num_processes
        if broken:
            self.grad_norm = None  # there is none of this step
            mine = self._rows(trainer, trainer.state.global_step, torch.isfinite(losses).tolist())
            raise self._stopped(trainer.state.global_step + 1, "the loss is no number", mine)
        self._losses.clear()
        self._broken.clear()

    def gradients(self, trainer: Any, norm: Any) -> None:
        """The norm of the step's gradients over all ranks, before it is applied (DeepSpeed: which it then skipped).

        Raises:
            DivergedError: it is no number.
        """
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.grad_norm = None if whole is None else float(whole)
        skipped = trainer.is_deepspeed_enabled and trainer.accelerator.optimizer_step_was_skipped
        if skipped or (self.grad_norm is not None and not (math.isfinite(self.grad_norm) and self.grad_norm >= 0)):
            mine = self._rows(trainer, trainer.state.global_step, [])
            raise self._stopped(trainer.state.global_step + 1, "the gradients are no numbers", mine)

    def stopped_by_guard(self, trainer: Any, what: str) -> DivergedError:
        """For a guard that stops the run behind a step that was applied. All ranks take part."""
        step = trainer.state.global_step
        return self._stopped(step, what, self._rows(trainer, step - 1, []), applied=True)

    def _stopped(self, step: int, what: str, mine: list[str], applied: bool = False) -> DivergedError:
        from accelerate.utils import gather_object

        rows = list(dict.fromkeys(gather_object(mine)))
        shown = rows[:_PLACES_SHOWN] + ([f"and {len(rows) - _PLACES_SHOWN} more"] if len(rows) > _PLACES_SHOWN else [])
        return DivergedError(What(step, what, self.loss, self.grad_norm, shown, applied))

    def _rows(self, trainer: Any, taken: int, finite: Sequence[bool]) -> list[str]:
        """The places of this rank's examples, in the step behind `taken` steps, whose losses are no numbers; of all its
        rows where nothing is known of their losses."""
        from datasets import load_from_disk

        plan = self._plan
        rows = load_from_disk(str(self._prepared / "train"))
        order = trainer.order_of_step(taken)
        size, ranks = plan.per_device_train_batch_size, trainer.accelerator.num_processes
        places: list[str] = []
        for number in range(plan.gradient_accumulation_steps):
            if number < len(finite) and finite[number]:
                continue
            first = (number * ranks + trainer.accelerator.process_index) * size
            marks = self._broken[number].cpu() if number < len(finite) and number < len(self._broken) else None
            for place, index in enumerate(order[first : first + size]):
                places += _of_row(rows[index], None if marks is None else _of_the_row(marks, rows, order, first, place))
        return places


def _of_the_row(marks: torch.Tensor, rows: Any, order: Sequence[int], first: int, place: int) -> list[bool]:
    """The marks of one row of a micro-batch, whose rows lie below each other, or end to end (flash attention)."""
    if marks.shape[0] > 1 or (place == 0 and len(marks[0]) < len(rows[order[first]]["input_ids"])):
        return list(marks[place].tolist())
    before = sum(len(rows[index]["input_ids"]) for index in order[first : first + place])
    return list(marks[0, before : before + len(rows[order[first + place]]["input_ids"])].tolist())


def _of_row(row: dict[str, Any], marks: list[bool] | None) -> list[str]:
    """The places of a row's examples; of those with a mark where there are marks."""
    places = [row["source"]] if isinstance(row["source"], str) else list(row["source"])
    if marks is None:
        return places
    if len(places) == 1:
        return places if any(marks) else []
    found, end = [], 0
    for place, length in zip(places, row["seq_lengths"], strict=True):
        if any(marks[end : end + length]):
            found.append(place)
        end += length
    return found
