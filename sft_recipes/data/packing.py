"""Packs whole examples into rows of `max_length` tokens, and writes the trainer's rows as a dataset."""

import array
import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pyarrow

from sft_recipes.data.rows import Rows, ends_of

_TOKENS_PER_BATCH = 2**19  # written at once


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
        space, first = capacity, len(order)
        while fitting := bisect.bisect_right(available, space):
            length = available[fitting - 1]
            order.append(first_left[length])
            first_left[length] += 1
            left[length] -= 1
            if not left[length]:
                del available[fitting - 1]
            space -= length
        sizes.append(len(order) - first)
    return by_length[numpy.array(order, numpy.int64)], numpy.array(sizes, numpy.int64)


def rows_per_epoch(weights: Iterable[tuple[int, float]]) -> int:
    """Return the number of rows that an epoch uses of sources with these numbers of rows and weights."""
    return sum(count * int(weight) + round(count * (weight % 1)) for count, weight in weights)


@dataclass(frozen=True)
class TrainerRows:
    """Examples arranged in the trainer's rows, whose tokens are read when they are written.

    Attributes:
        examples: in row order.
        ends: number of examples before each row and in total, [rows + 1].
        packing: rows have `seq_lengths`, and a list of locations.
    """

    examples: Rows
    ends: numpy.ndarray
    packing: bool

    @classmethod
    def arrange(cls, examples: Rows, max_length: int, packing: bool) -> "TrainerRows":
        """Return one row per example, or packed rows. No example is split: each has at most `max_length` tokens."""
        if not packing:
            return cls(examples, numpy.arange(len(examples) + 1), packing)
        order, sizes = pack(examples["length"], max_length)
        return cls(examples.select(order), ends_of(sizes), packing)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def tables(self) -> Iterator[pyarrow.Table]:
        """Yield `input_ids`, `labels` and `source` (the location) in batches of rows, at least one batch.

        Packed rows also have `seq_lengths` (tokens per example), and `source` is a list.
        """
        tokens = ends_of(self.examples["length"])[self.ends]
        cuts = numpy.searchsorted(tokens, numpy.arange(0, tokens[-1], _TOKENS_PER_BATCH))
        for first, last in itertools.pairwise(numpy.unique([*cuts, len(self)]) if len(self) else (0, 0)):
            bounds, ends = (self.ends[first], self.ends[last]), self.ends[first : last + 1] - self.ends[first]
            ids, labels, source = (self.examples.take(name, *bounds) for name in ("input_ids", "labels", "location"))
            columns, row_ends = {"source": source.cast(pyarrow.string())}, pyarrow.array(ends, pyarrow.int32())
            if self.packing:
                columns["seq_lengths"] = ids.value_lengths().cast(pyarrow.int32())
                columns = {name: pyarrow.ListArray.from_arrays(row_ends, each) for name, each in columns.items()}
            token_ends = pyarrow.array(tokens[first : last + 1] - tokens[first])
            for name, values in {"labels": labels, "input_ids": ids}.items():
                columns = {name: pyarrow.LargeListArray.from_arrays(token_ends, values.flatten()), **columns}
            yield pyarrow.table(columns)


def write_dataset(folder: Path, tables: Iterator[pyarrow.Table]) -> Path:
    """Write tables one at a time as `Dataset.save_to_disk` does, and return the file with their rows."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    first = next(tables)
    Dataset(InMemoryTable(first.slice(0, 0))).save_to_disk(folder, num_shards=1)  # writes its description
    file = folder / "data-00000-of-00001.arrow"
    with pyarrow.ipc.new_stream(str(file), first.schema) as stream:
        for table in itertools.chain([first], tables):
            stream.write_table(table)
    return file
