"""Packs whole examples into rows of `max_length` tokens, and converts tokenized rows to a dataset."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

import numpy
import pyarrow

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


def to_dataset(examples: pyarrow.Table, max_length: int, packing: bool) -> Any:
    """Return a dataset with `input_ids`, `labels` and `source` (the location).

    Packed rows also have `seq_lengths` (tokens per example), and `source` is a list. No example is split: each must be
    at most `max_length` tokens long.

    Args:
        examples: a table of `tokenize_rows.SCHEMA`.
    """
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable

    lengths = examples["length"].to_numpy()
    order, sizes = pack(lengths, max_length) if packing else (numpy.arange(len(lengths)), numpy.ones_like(lengths))
    row_ends = numpy.cumsum(sizes)
    tokens = numpy.cumsum(lengths[order])[row_ends - 1]
    cuts = numpy.flatnonzero(numpy.diff(tokens // _MAX_TOKENS_PER_CHUNK)) + 1
    chunks = zip(numpy.split(order, row_ends[cuts - 1]), numpy.split(sizes, cuts), strict=True)
    parts = [Dataset(InMemoryTable(_rows(examples.take(order), sizes, packing))) for order, sizes in chunks]
    return concatenate_datasets(parts)


def _rows(examples: pyarrow.Table, sizes: numpy.ndarray, packing: bool) -> pyarrow.Table:
    """Join examples in order to rows of these sizes, in examples."""

    def lists(values: pyarrow.Array, bounds: numpy.ndarray) -> pyarrow.Array:
        return pyarrow.ListArray.from_arrays(pyarrow.array(bounds, pyarrow.int32()), values)

    lengths = examples["length"].to_numpy()
    ends = numpy.concatenate([[0], numpy.cumsum(sizes)])
    token_ends = numpy.concatenate([[0], numpy.cumsum(lengths)])[ends]
    sources = examples["location"].combine_chunks()
    columns = {
        **{name: lists(examples[name].combine_chunks().flatten(), token_ends) for name in ("input_ids", "labels")},
        "source": lists(sources, ends) if packing else sources,
    }
    if packing:
        columns["seq_lengths"] = lists(pyarrow.array(lengths, pyarrow.int32()), ends)
    return pyarrow.table(columns)
