"""Fills rows of `max_length` tokens with whole examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft_recipes.data.chat import Tokenized

# TRL packs each map batch by itself; a large one leaves fewer rows half full.
_EXAMPLES_PACKED_TOGETHER = 100_000


def to_dataset(examples: Sequence[Tokenized], max_length: int, packing: bool) -> Any:
    """Rows with `input_ids` and `labels`, and with `seq_lengths` (tokens of each example in the row) where packed.

    Best-fit decreasing as TRL ships it. No example is cut: each must be at most `max_length` tokens already.
    """
    from datasets import Dataset

    rows = Dataset.from_dict(
        {"input_ids": [one.input_ids for one in examples], "labels": [one.labels for one in examples]}
    )
    if not packing or len(rows) == 0:
        return rows
    from trl import pack_dataset

    return pack_dataset(rows, max_length, "bfd", {"batch_size": _EXAMPLES_PACKED_TOGETHER})
