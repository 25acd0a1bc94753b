"""Prepared rows for the trainer: sampling of effective batches, collation, and validation in complete passes."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
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

Weight = tuple[int, float]  # rows of a source, and how often an epoch uses each
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
        self, rows: int, effective_batch_size: int, seed: int, epoch: Callable[[], int], weights: Sequence[Weight] = ()
    ):
        """Set up; `epoch` is called when an epoch begins: accelerate does not pass the epoch to the sampler of a loader
        that skips rows after a resume (https://github.com/huggingface/accelerate/issues/2823).

        Args:
            weights: of each source in order; empty if each row is used once per epoch.
        """
        self.weights = list(weights) or [(rows, 1.0)]
        self.rows = rows_per_epoch(self.weights)
        self.effective_batch_size = effective_batch_size
        self.steps_per_epoch = self.rows // effective_batch_size
        self.used = self.steps_per_epoch * effective_batch_size
        self.seed = seed
        self.epoch = epoch
        self.order = lru_cache(maxsize=1)(self._order)  # a long one takes time to draw

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()).tolist())

    def __len__(self) -> int:
        return self.used

    def _order(self, epoch: int) -> torch.Tensor:
        """Return the rows of an epoch in order, [rows used]."""
        parts, first = [], 0
        for count, weight in self.weights:
            rows = torch.arange(first, first + count)
            again = rows_per_epoch([(count, weight % 1)])
            permuted = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)) if again else rows
            window = (epoch * again + torch.arange(again)) % count  # consecutive epochs take consecutive parts
            parts += [rows.repeat(int(weight)), rows[permuted[window]]]
            first += count
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.cat(parts)[torch.randperm(self.rows, generator=generator)[: self.used]]

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of an optimizer step; the first step is 0."""
        epoch, offset = divmod(step * self.effective_batch_size, self.used)
        return self.order(epoch)[offset : offset + self.effective_batch_size].tolist()


class RowsCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the row numbers added to the batch (integrity/data_order.py).

    With `return_position_ids` the examples of packed rows [batch, longest row] are separated by `position_ids` only,
    for attention implementations that build a mask. The batch has no attention mask: an all-ones mask would bring
    attention across examples back (transformers derives the isolation from `position_ids` only without one).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return TRL's batch and `row`, [rows]."""
        batch = super().torch_call(examples)
        if self.return_position_ids:
            del batch["attention_mask"]
            batch["labels"][batch["position_ids"] == 0] = IGNORED  # no token of the same example predicts its first one
        if data_order.ROW in examples[0]:  # validation rows have none
            batch[data_order.ROW] = torch.tensor([example[data_order.ROW] for example in examples])
        return batch


def make_collator(plan: Plan, pad_token_id: int, attention_name: str) -> RowsCollator:
    """Return the collator for a model with this attention implementation (transformers' name).

    Implementations that take sequence boundaries get TRL's padding-free collator, packed or not: it concatenates rows,
    so nothing is padded, and no layer waits for the GPU to find where an example begins.
    """
    concatenates = attention.takes_boundaries(attention_name)
    return RowsCollator(pad_token_id, concatenates, return_position_ids=plan.packing and not concatenates)


def split_into_passes(
    validation: Any, rows_by_source: dict[str, int], rows_per_pass: int
) -> tuple[Any, dict[str, int]]:
    """Fill each source of the validation rows to complete passes of all ranks, with rows without tokens in the loss.

    accelerate would fill them with rows from the beginning, which would then count twice. No pass then has rows of two
    sources, so the loss of a pass belongs to one source.

    Args:
        validation: a datasets.Dataset with `input_ids`, `labels` and, if packed, `seq_lengths`.
        rows_by_source: number of rows per source, in their order.
        rows_per_pass: micro-batch x ranks.

    Returns:
        The rows, and the passes per source.
    """
    from datasets import concatenate_datasets

    parts, passes, first = [], {}, 0
    for source, count in rows_by_source.items():
        missing = -count % rows_per_pass
        filler = validation.select([first] * missing).map(
            lambda row: {"labels": [IGNORED] * len(row["labels"])}, features=validation.features
        )
        parts += [validation.select(range(first, first + count)), filler]
        passes[source] = (count + missing) // rows_per_pass
        first += count
    return concatenate_datasets(parts), passes


def read_rows(prepared: Path, details: dict[str, Any], rows_per_pass: int) -> tuple[Any, Any, dict[str, int]]:
    """Read the training rows, the validation rows, and the validation passes per source.

    The retention eval set comes last, as a separate source.

    Args:
        details: counts from data preparation (`details.json`).
        rows_per_pass: micro-batch x ranks.
    """
    from datasets import concatenate_datasets, load_from_disk

    rows_by_source = dict(details["validation_rows"])
    parts = ["train", "validation"]
    if details.get("retention_eval_rows"):
        parts.append("retention_eval")
        rows_by_source[RETENTION] = details["retention_eval_rows"]
    train, *validation = (load_from_disk(str(prepared / part)).remove_columns("source") for part in parts)
    return train, *split_into_passes(concatenate_datasets(validation), rows_by_source, rows_per_pass)
