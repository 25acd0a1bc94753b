"""Packs whole examples into rows of `max_length` tokens, and converts tokenized rows to a dataset."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

import numpy

from sft_recipes.data.tokenize import IGNORED
from sft_recipes.data.tokenize_rows import TokenizedRows

_MAX_TOKENS_PER_CHUNK = 2**28  # Arrow counts a list's elements in 32 bits


def pack(lengths: numpy.ndarray, capacity: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Assign examples to rows by greedy best fit over a histogram of lengths.

    A row begins with the longest example left and takes the longest that still fits until none does. Rows of equal
    lengths are filled at once, so a million examples take a second. No example is split.

    Args:
        lengths: tokens per example, [examples], each at most `capacity`.
        capacity: tokens per row.

    Returns:
        The examples' indices in row order, [examples], and the number of examples per row, [rows].
    """
    by_length = numpy.argsort(lengths, kind="stable")
    distinct, first, count = numpy.unique(lengths[by_length], return_index=True, return_counts=True)
    remaining = {int(length): int(number) for length, number in zip(distinct, count, strict=True)}
    next_index = {int(length): int(start) for length, start in zip(distinct, first, strict=True)}
    available = sorted(remaining)
    orders, sizes = [], []
    while available:
        row: list[int] = []
        uses: dict[int, int] = {}
        space = capacity
        position = len(available) - 1
        while position >= 0:
            length = available[position]
            number = min(space // length if length else remaining[length], remaining[length])
            if number:
                uses[length] = number
                row += [length] * number
                space -= number * length
            position = min(position, bisect.bisect_right(available, space)) - 1
        times = min(remaining[length] // number for length, number in uses.items())
        columns = []
        for length, number in uses.items():
            start = next_index[length]
            columns.append(by_length[start : start + times * number].reshape(times, number))
            next_index[length] += times * number
            remaining[length] -= times * number
            if not remaining[length]:
                del available[bisect.bisect_left(available, length)]
        orders.append(numpy.concatenate(columns, axis=1).ravel())
        sizes.append(numpy.full(times, len(row)))
    empty = numpy.zeros(0, dtype=numpy.int64)
    return numpy.concatenate([empty, *orders]), numpy.concatenate([empty, *sizes])


def rows_per_epoch(weights: Iterable[tuple[int, float]]) -> int:
    """Return the number of rows that an epoch uses of sources with these numbers of rows and weights."""
    return sum(count * int(weight) + round(count * (weight % 1)) for count, weight in weights)


def to_dataset(examples: TokenizedRows, max_length: int, packing: bool) -> Any:
    """Return a dataset with `input_ids`, `labels` and `source` (the location).

    Packed rows also have `seq_lengths` (tokens per example), and `source` is a list. No example is split: each must be
    at most `max_length` tokens long.
    """
    from datasets import Dataset, concatenate_datasets

    count = len(examples.lengths)
    order, sizes = (
        pack(examples.lengths, max_length) if packing else (numpy.arange(count), numpy.ones(count, numpy.int64))
    )
    ends = numpy.cumsum(examples.lengths[order])
    row_ends = numpy.cumsum(sizes)
    chunk_of_row = ends[row_ends - 1] // _MAX_TOKENS_PER_CHUNK if count else numpy.zeros(0, numpy.int64)
    parts = []
    for chunk in range(int(chunk_of_row[-1]) + 1 if count else 1):
        rows = numpy.flatnonzero(chunk_of_row == chunk)
        first = row_ends[rows[0]] - sizes[rows[0]] if len(rows) else 0
        last = row_ends[rows[-1]] if len(rows) else 0
        parts.append(Dataset(_table(examples, order[first:last], sizes[rows], packing)))
    return concatenate_datasets(parts)


def _table(examples: TokenizedRows, order: numpy.ndarray, sizes: numpy.ndarray, packing: bool) -> Any:
    import pyarrow
    from datasets.table import InMemoryTable

    lengths = examples.lengths[order]
    ends = numpy.cumsum(lengths)
    starts = numpy.cumsum(examples.lengths) - examples.lengths
    token = numpy.arange(int(ends[-1]) if len(ends) else 0) + numpy.repeat(starts[order] - (ends - lengths), lengths)
    ids = examples.input_ids[token]
    labels = numpy.where(examples.loss_mask[token], ids, numpy.int32(IGNORED))
    row_of_example = numpy.concatenate([[0], numpy.cumsum(sizes)])
    token_ends = numpy.concatenate([[0], ends])[row_of_example]
    sources = pyarrow.array([examples.locations[number] for number in order], pyarrow.string())

    def lists(values: Any, bounds: numpy.ndarray) -> Any:
        return pyarrow.ListArray.from_arrays(pyarrow.array(bounds, pyarrow.int32()), values)

    columns = {
        "input_ids": lists(pyarrow.array(ids, pyarrow.int32()), token_ends),
        "labels": lists(pyarrow.array(labels, pyarrow.int32()), token_ends),
        "source": lists(sources, row_of_example) if packing else sources,
    }
    if packing:
        columns["seq_lengths"] = lists(pyarrow.array(lengths, pyarrow.int32()), row_of_example)
    return InMemoryTable(pyarrow.table(columns))
