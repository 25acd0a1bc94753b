"""Packs whole examples into rows of `max_length` tokens, and converts tokenized rows to a dataset."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

import numpy
import pyarrow


def pack(lengths: numpy.ndarray, capacity: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Assign examples to rows by greedy best fit.

    A row begins with the longest example left and takes the longest that still fits until none does. No example is
    split.

    Args:
        lengths: tokens per example, [examples], each at most `capacity`.
        capacity: tokens per row.

    Returns:
        The examples' indices in row order, [examples], and the number of examples per row, [rows].
    """
    remaining: dict[int, list[int]] = {}  # examples by length, the first one last
    for index in range(len(lengths) - 1, -1, -1):
        remaining.setdefault(int(lengths[index]), []).append(index)
    available = sorted(remaining)
    order, sizes = [], []
    while available:
        space, size = capacity, 0
        while fitting := bisect.bisect_right(available, space):
            length = available[fitting - 1]
            order.append(remaining[length].pop())
            if not remaining[length]:
                del available[fitting - 1]
            space -= length
            size += 1
        sizes.append(size)
    return numpy.array(order, numpy.int64), numpy.array(sizes, numpy.int64)


def rows_per_epoch(weights: Iterable[tuple[int, float]]) -> int:
    """Return the number of rows that an epoch uses of sources with these numbers of rows and weights."""
    return sum(count * int(weight) + round(count * (weight % 1)) for count, weight in weights)


def to_dataset(examples: pyarrow.Table, max_length: int, packing: bool) -> Any:
    """Return a dataset with `input_ids`, `labels` and `source` (the location).

    Packed rows also have `seq_lengths` (tokens per example), and `source` is a list. No example is split: each must be
    at most `max_length` tokens long.

    Args:
        examples: a table of `tokenize_rows.SCHEMA`.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    lengths = examples["length"].to_numpy()
    order, sizes = pack(lengths, max_length) if packing else (numpy.arange(len(lengths)), numpy.ones_like(lengths))
    examples, ends = examples.take(order), numpy.concatenate([[0], numpy.cumsum(sizes)])
    token_ends = pyarrow.array(numpy.concatenate([[0], numpy.cumsum(lengths[order])])[ends], pyarrow.int64())
    columns = {
        name: pyarrow.LargeListArray.from_arrays(token_ends, examples[name].combine_chunks().flatten())
        for name in ("input_ids", "labels")
    }
    columns["source"] = examples["location"].combine_chunks()
    if packing:
        examples_per_row = {"source": columns["source"], "seq_lengths": pyarrow.array(lengths[order], pyarrow.int32())}
        row_ends = pyarrow.array(ends, pyarrow.int32())
        columns |= {name: pyarrow.ListArray.from_arrays(row_ends, each) for name, each in examples_per_row.items()}
    return Dataset(InMemoryTable(pyarrow.table(columns)))
