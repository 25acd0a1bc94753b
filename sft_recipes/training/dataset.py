"""Prepared rows for the trainer: sampling of effective batches, collation, and validation in complete passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.data.packing import rows_per_epoch
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.planner.plan import Plan
from sft_recipes.training import attention
from sft_recipes.training.integrity import data_order

RETENTION = "retention"  # the source that measures forgetting (data.retention_eval); its loss decides nothing


class EffectiveBatchSampler(Sampler[int]):
    """Row indices in a seeded order per epoch, cut to complete effective batches.

    The Trainer would take a smaller last step in an epoch, and accelerate would repeat rows to fill a rank. Here each
    row is used at most once per epoch, every step has a complete effective batch, and a step has the same rows on any
    number of ranks. The dropped tail differs between epochs.

    With source weights, each row of a source is used floor(weight) times per epoch, and a seeded part of them once
    more, a different one each epoch.
    """

    def __init__(
        self,
        rows: int,
        effective_batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        weights: Sequence[tuple[int, float]] = (),
    ):
        """Set up; `epoch` is called when an epoch begins: accelerate does not pass the epoch to the sampler of a loader
        that skips rows after a resume (https://github.com/huggingface/accelerate/issues/2823).

        Args:
            weights: rows and weight of each source in order; empty if each row is used once per epoch.
        """
        self.weights = list(weights) or [(rows, 1.0)]
        self.rows = rows_per_epoch(self.weights)
        self.effective_batch_size = effective_batch_size
        self.used = self.rows // effective_batch_size * effective_batch_size
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()).tolist())

    def order(self, epoch: int) -> torch.Tensor:
        """Return the rows of an epoch in order, [rows used]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return self._weighted_rows(epoch)[torch.randperm(self.rows, generator=generator)[: self.used]]

    def _weighted_rows(self, epoch: int) -> torch.Tensor:
        """Return the rows that an epoch uses, each as often as it is used, [self.rows]."""
        parts, first = [], 0
        for count, weight in self.weights:
            rows = torch.arange(first, first + count)
            again = rows_per_epoch([(count, weight % 1)])
            permuted = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)) if again else rows
            window = (epoch * again + torch.arange(again)) % count  # consecutive epochs take consecutive parts
            parts += [rows.repeat(int(weight)), rows[permuted[window]]]
            first += count
        return torch.cat(parts)

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of an optimizer step; the first step is 0."""
        epoch, offset = divmod(step * self.effective_batch_size, self.used)
        rows: list[int] = self.order(epoch)[offset : offset + self.effective_batch_size].tolist()
        return rows

    def __len__(self) -> int:
        return self.used


class NumberedRowsCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the row numbers added to the batch (integrity/data_order.py)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return TRL's batch and `row`, [rows]."""
        return data_order.keep_row_numbers(examples, super().torch_call(examples))


class PackedRowsCollator(DataCollatorForLanguageModeling):
    """Collate packed rows as [batch, length], with the examples separated by `position_ids` only.

    For attention implementations that build a mask, which would have (batch x length) squared elements if all rows were
    concatenated. The batch has no attention mask: an all-ones mask would bring attention across examples back
    (transformers derives the isolation from `position_ids` only without one).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids`, each [batch, longest row], and `row`, [batch]."""
        longest = max(len(example["input_ids"]) for example in examples)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for example in examples:
            labels, positions = list(example["labels"]), []
            for length in example["seq_lengths"]:
                labels[len(positions)] = IGNORED  # no token of the same example predicts its first token
                positions += range(length)
            padding = longest - len(positions)
            batch["input_ids"].append([*example["input_ids"], *[self.pad_token_id] * padding])
            batch["labels"].append([*labels, *[IGNORED] * padding])
            batch["position_ids"].append([*positions, *[0] * padding])  # each padding token is a separate example
        return data_order.keep_row_numbers(examples, {name: torch.tensor(rows) for name, rows in batch.items()})


def make_collator(plan: Plan, pad_token_id: int, attention_name: str) -> NumberedRowsCollator | PackedRowsCollator:
    """Return the collator for a model with this attention implementation (transformers' name).

    Implementations that take sequence boundaries get TRL's padding-free collator, packed or not: it concatenates rows,
    so nothing is padded, and no layer waits for the GPU to find where an example begins.
    """
    if attention.takes_boundaries(attention_name):
        return NumberedRowsCollator(pad_token_id, padding_free=True)
    return PackedRowsCollator(pad_token_id) if plan.packing else NumberedRowsCollator(pad_token_id)


def fill_last_pass(validation: Any, rows_per_pass: int) -> Any:
    """Fill validation rows to complete passes of all ranks, with rows that have no tokens in the loss.

    accelerate would fill them with rows from the beginning, which would then count twice.

    Args:
        validation: a datasets.Dataset with `input_ids`, `labels` and, if packed, `seq_lengths`.
        rows_per_pass: micro-batch x ranks.
    """
    from datasets import concatenate_datasets

    missing = -len(validation) % rows_per_pass
    if not missing:
        return validation
    filler = validation.select([0] * missing).map(
        lambda row: {"labels": [IGNORED] * len(row["labels"])}, features=validation.features
    )
    return concatenate_datasets([validation, filler])


def split_into_passes(
    validation: Any, rows_by_source: dict[str, int], rows_per_pass: int
) -> tuple[Any, dict[str, int]]:
    """Fill each source of the validation rows to complete passes; return the rows and the passes per source.

    No pass then has rows of two sources, so the loss of a pass belongs to one source.

    Args:
        rows_by_source: number of rows per source, in their order.
        rows_per_pass: micro-batch x ranks.
    """
    from datasets import concatenate_datasets

    filled, first = {}, 0
    for source, count in rows_by_source.items():
        filled[source] = fill_last_pass(validation.select(range(first, first + count)), rows_per_pass)
        first += count
    passes = {source: len(rows) // rows_per_pass for source, rows in filled.items()}
    return concatenate_datasets(list(filled.values())), passes


def read_rows(prepared: Path, details: dict[str, Any], rows_per_pass: int) -> tuple[Any, Any, dict[str, int]]:
    """Read the training rows, the validation rows, and the validation passes per source.

    The retention eval set comes last, as a separate source.

    Args:
        details: counts from data preparation (`details.json`).
        rows_per_pass: micro-batch x ranks.
    """
    from datasets import concatenate_datasets, load_from_disk

    train, validation = (
        load_from_disk(str(prepared / part)).remove_columns("source") for part in ("train", "validation")
    )
    rows_by_source = dict(details["validation_rows"])
    if details.get("retention_eval_rows"):
        retention = load_from_disk(str(prepared / "retention_eval")).remove_columns("source")
        validation = concatenate_datasets([validation, retention])
        rows_by_source[RETENTION] = details["retention_eval_rows"]
    return train, *split_into_passes(validation, rows_by_source, rows_per_pass)


def tokens_digest(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a digest of a batch's supervised tokens and their positions, [1], int64.

    It is a wrapping sum, so it does not depend on how rows are distributed over batches and ranks, or padded.
    """
    labels = batch["labels"].long()
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)
    mixed = (labels + 1) * 0x1E3779B97F4A7C15 + (positions.long() + 1) * 0x3F58476D1CE4E5B9
    mixed = mixed * (mixed ^ (mixed >> 29))
    return mixed[labels != IGNORED].sum().reshape(1)
