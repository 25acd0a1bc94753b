"""Fills rows of `max_length` tokens with whole examples, and lays prepared examples out as a data set."""

from __future__ import annotations

import bisect
from typing import Any

import numpy

from sft_recipes.data.tokenize import IGNORED
from sft_recipes.data.tokenize_rows import Labelled

_TOKENS_A_CHUNK = 2**28  # Arrow counts a list's elements in 32 bits


def fill(lengths: numpy.ndarray, capacity: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Which examples stand in which row: greedy best fit over a histogram of lengths.

    A row begins with the longest example left and takes the longest that still fits until none does. Rows of the same
    lengths are filled at once, so a million examples take a second. No example is cut.

    Args:
        lengths: tokens of each example, [examples], each at most `capacity`.
        capacity: tokens that a row holds.

    Returns:
        The examples' numbers in the order in which they stand in the rows, [examples], and how many each row has,
        [rows].
    """
    by_length = numpy.argsort(lengths, kind="stable")
    distinct, first, count = numpy.unique(lengths[by_length], return_index=True, return_counts=True)
    left = {int(length): int(many) for length, many in zip(distinct, count, strict=True)}
    taken = {int(length): int(start) for length, start in zip(distinct, first, strict=True)}
    there = sorted(left)
    orders, sizes = [], []
    while there:
        row: list[int] = []
        uses: dict[int, int] = {}
        space = capacity
        place = len(there) - 1
        while place >= 0:
            length = there[place]
            many = min(space // length if length else left[length], left[length])
            if many:
                uses[length] = many
                row += [length] * many
                space -= many * length
            place = min(place, bisect.bisect_right(there, space)) - 1
        times = min(left[length] // many for length, many in uses.items())
        columns = []
        for length, many in uses.items():
            start = taken[length]
            columns.append(by_length[start : start + times * many].reshape(times, many))
            taken[length] += times * many
            left[length] -= times * many
            if not left[length]:
                del there[bisect.bisect_left(there, length)]
        orders.append(numpy.concatenate(columns, axis=1).ravel())
        sizes.append(numpy.full(times, len(row)))
    empty = numpy.zeros(0, dtype=numpy.int64)
    return numpy.concatenate([empty, *orders]), numpy.concatenate([empty, *sizes])


def to_dataset(examples: Labelled, max_length: int, packing: bool) -> Any:
    """Rows with `input_ids`, `labels` and `source` (where they were written), and with `seq_lengths` (tokens of each
    example in the row) where packed; `source` is a list then.

    No example is cut: each must be at most `max_length` tokens already.
    """
    from datasets import Dataset, concatenate_datasets

    many = len(examples.lengths)
    order, sizes = (
        fill(examples.lengths, max_length) if packing else (numpy.arange(many), numpy.ones(many, numpy.int64))
    )
    ends = numpy.cumsum(examples.lengths[order])
    row_ends = numpy.cumsum(sizes)
    chunk_of_row = ends[row_ends - 1] // _TOKENS_A_CHUNK if many else numpy.zeros(0, numpy.int64)
    parts = []
    for chunk in range(int(chunk_of_row[-1]) + 1 if many else 1):
        rows = numpy.flatnonzero(chunk_of_row == chunk)
        first = row_ends[rows[0]] - sizes[rows[0]] if len(rows) else 0
        last = row_ends[rows[-1]] if len(rows) else 0
        parts.append(Dataset(_table(examples, order[first:last], sizes[rows], packing)))
    return concatenate_datasets(parts)


def _table(examples: Labelled, order: numpy.ndarray, sizes: numpy.ndarray, packing: bool) -> Any:
    import pyarrow
    from datasets.table import InMemoryTable

    lengths = examples.lengths[order]
    ends = numpy.cumsum(lengths)
    starts = numpy.cumsum(examples.lengths) - examples.lengths
    token = numpy.arange(int(ends[-1]) if len(ends) else 0) + numpy.repeat(starts[order] - (ends - lengths), lengths)
    ids = examples.ids[token]
    labels = numpy.where(examples.supervised[token], ids, numpy.int32(IGNORED))
    row_of_example = numpy.concatenate([[0], numpy.cumsum(sizes)])
    token_ends = numpy.concatenate([[0], ends])[row_of_example]
    sources = pyarrow.array([examples.where[number] for number in order], pyarrow.string())

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
