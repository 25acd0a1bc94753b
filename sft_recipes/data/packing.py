"""Packs whole examples into rows of `max_length` tokens, and writes the trainer's rows as a dataset."""

from __future__ import annotations

import array
import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from sft_recipes.data.rows import Rows

_TOKENS_PER_BATCH = 2**21  # written at once


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
    by_length = numpy.argsort(lengths, kind="stable")
    unique = numpy.unique(lengths[by_length], return_index=True, return_counts=True)
    available, starts, counts = (values.tolist() for values in unique)
    first_left, left = dict(zip(available, starts, strict=True)), dict(zip(available, counts, strict=True))
    order, sizes = array.array("q"), array.array("q")
    while available:
        space, size = capacity, 0
        while fitting := bisect.bisect_right(available, space):
            length = available[fitting - 1]
            order.append(first_left[length])
            first_left[length] += 1
            left[length] -= 1
            if not left[length]:
                del available[fitting - 1]
            space -= length
            size += 1
        sizes.append(size)
    return by_length[numpy.array(order, numpy.int64)], numpy.array(sizes, numpy.int64)


def rows_per_epoch(weights: Iterable[tuple[int, float]]) -> int:
    """Return the number of rows that an epoch uses of sources with these numbers of rows and weights."""
    return sum(count * int(weight) + round(count * (weight % 1)) for count, weight in weights)


@dataclass(frozen=True)
class TrainerRows:
    """Examples arranged in the trainer's rows, whose tokens are read when they are written.

    Attributes:
        examples: with a token in the loss, of at most `max_length` tokens.
        order: the examples' positions in row order, [examples].
        ends: number of examples up to the end of each row, after a 0, [rows + 1].
        packing: rows have `seq_lengths`, and a list of locations.
    """

    examples: Rows
    order: numpy.ndarray
    ends: numpy.ndarray
    packing: bool

    @classmethod
    def arrange(cls, examples: Rows, max_length: int, packing: bool) -> TrainerRows:
        """Return one row per example, or packed rows. No example is split."""
        count = len(examples)
        order, sizes = (
            pack(examples["length"], max_length) if packing else (numpy.arange(count), numpy.ones(count, numpy.int64))
        )
        return cls(examples, order, numpy.concatenate([[0], numpy.cumsum(sizes)]), packing)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def tables(self) -> Iterator[pyarrow.Table]:
        """Yield `input_ids`, `labels` and `source` (the location) in batches of rows, at least one batch.

        Packed rows also have `seq_lengths` (tokens per example), and `source` is a list.
        """
        tokens = numpy.cumsum(self.examples["length"][self.order])[self.ends[1:] - 1]
        cuts = numpy.searchsorted(tokens, numpy.arange(_TOKENS_PER_BATCH, tokens[-1:].sum(), _TOKENS_PER_BATCH))
        for first, last in itertools.pairwise(numpy.unique([0, *cuts, len(self)]) if len(self) else (0, 0)):
            yield self._table(self.ends[first : last + 1])

    def _table(self, ends: numpy.ndarray) -> pyarrow.Table:
        taken = self.examples.take(self.order[ends[0] : ends[-1]])
        ends = ends - ends[0]
        token_ends = taken["input_ids"].combine_chunks().offsets.take(pyarrow.array(ends))
        columns = {
            name: pyarrow.LargeListArray.from_arrays(token_ends, taken[name].combine_chunks().values)
            for name in ("input_ids", "labels")
        }
        columns["source"] = taken["location"].combine_chunks().cast(pyarrow.string())
        if self.packing:
            lengths = taken["input_ids"].combine_chunks().value_lengths().cast(pyarrow.int32())
            row_ends = pyarrow.array(ends, pyarrow.int32())
            for name, values in {"source": columns["source"], "seq_lengths": lengths}.items():
                columns[name] = pyarrow.ListArray.from_arrays(row_ends, values)
        return pyarrow.table(columns)


def write_dataset(folder: Path, tables: Iterator[pyarrow.Table]) -> Any:
    """Write tables one at a time as `Dataset.save_to_disk` does, and return the dataset, memory-mapped."""
    from datasets import Dataset, load_from_disk
    from datasets.table import InMemoryTable

    first = next(tables)
    Dataset(InMemoryTable(first.slice(0, 0))).save_to_disk(folder, num_shards=1)  # writes its description
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), first.schema) as stream:
        for table in itertools.chain([first], tables):
            stream.write_table(table)
    return load_from_disk(str(folder))
