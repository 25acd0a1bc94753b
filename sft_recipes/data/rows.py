"""Tokenized rows of all sources: on disk and memory-mapped, so that only their index is in memory."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy
import pyarrow

# Lengths are tokens after truncation to `max_length`; `full_…` before it. `supervised_tokens` are those in the loss.
# `lost_answers`: truncation removed an answer, and with it its question. The digests are hashes of the row's text and
# of its first user turn. `outcome` is a number of the outcomes of the chunk or the store.
_INTEGERS = ("outcome", "location_bytes", "length", "full_length", "supervised_tokens", "full_supervised_tokens")
_OTHERS = [("row_digest", numpy.uint64), ("prompt_digest", numpy.uint64), ("lost_answers", numpy.bool_)]
NUMBERS = numpy.dtype([*((name, numpy.int32) for name in _INTEGERS), *_OTHERS])
_TYPES = {"numbers": NUMBERS, "locations": numpy.uint8, "input_ids": numpy.int32, "labels": numpy.int32}


class Outcome(NamedTuple):
    """What was done to rows; few differ. Rejected rows have a reason, others what their rendering showed.

    Attributes:
        columns: the row's columns that have a value; None if it could not be converted.
        ignored_keys: keys of its messages that are not read.
        conventions: what was applied to make the row a conversation, and to render it.
        rejected: why the row was rejected, without its numbers; empty if it was not.
        note: how the text differs from the text at inference.
        stop_ids: ids of the tokens that end the assistant's turns, ascending.
    """

    columns: tuple[str, ...] | None = None
    ignored_keys: tuple[str, ...] = ()
    conventions: tuple[str, ...] = ()
    rejected: str = ""
    note: str = ""
    stop_ids: tuple[int, ...] = ()


Outcomes = dict[Outcome, list[Any]]  # number of rows and the location of the first, in its order


class Chunk(NamedTuple):
    """The tokenized rows of a part of a source, without the rejected ones.

    Attributes:
        numbers: [rows] of NUMBERS.
        locations: the rows' locations without separators, UTF-8.
        input_ids: of all rows, [tokens].
        labels: the token ids in the loss, IGNORED elsewhere, [tokens].
        outcomes: of all rows, the rejected ones too.
        error: of the first rejected row.
    """

    numbers: numpy.ndarray
    locations: bytes
    input_ids: numpy.ndarray
    labels: numpy.ndarray
    outcomes: Outcomes
    error: str | None


@dataclass(frozen=True)
class Rows:
    """Some rows of a store, in order.

    Attributes:
        numbers: of all rows, [rows in the store] of NUMBERS.
        tokens: `location`, `input_ids` and `labels` of all rows, each in one chunk.
        outcomes: of all rows.
        maps: of the tokens.
        index: numbers of these rows in the store, [rows].
    """

    numbers: numpy.ndarray
    tokens: pyarrow.Table
    outcomes: Sequence[Outcome]
    maps: Sequence[mmap.mmap]
    index: numpy.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> numpy.ndarray:
        """Return a column of NUMBERS, [rows]."""
        return self.numbers[name][self.index]

    def select(self, which: Any) -> "Rows":
        """Return the rows at these positions, or where a mask is true."""
        return replace(self, index=self.index[which])

    def take(self, name: str, first: int = 0, last: int | None = None) -> pyarrow.Array:
        """Return a copy of `location`, `input_ids` or `labels` of the rows from first to last."""
        taken = self.tokens[name].take(pyarrow.array(self.index[first:last])).combine_chunks()
        for each in self.maps:
            each.madvise(mmap.MADV_DONTNEED)  # else the resident memory is that of all rows
        return taken

    def location(self, position: int) -> str:
        """Return file and line of a row."""
        return str(self.tokens["location"][int(self.index[position])])

    def count_outcomes(self) -> Iterator[tuple[Outcome, int]]:
        """Yield the outcomes in order of their first row, with their rows."""
        codes, first, counts = numpy.unique(self["outcome"], return_index=True, return_counts=True)
        for each in numpy.argsort(first):
            yield self.outcomes[codes[each]], int(counts[each])


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, of one store, in order."""
    return replace(parts[0], index=numpy.concatenate([part.index for part in parts]))


def ends_of(lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the sums of the first 0, 1, … lengths, int64 [lengths + 1]."""
    return numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])


class RowStore:
    """Appends chunks to files in `folder` (default: the system's) that vanish with the process."""

    def __init__(self, folder: Path | None = None):
        """Create the files."""
        self._files: dict[str, IO[bytes]] = {name: tempfile.TemporaryFile(dir=folder) for name in _TYPES}  # noqa: SIM115
        self._outcomes: dict[Outcome, int] = {}
        self.rows = 0

    def append(self, chunk: Chunk) -> None:
        """Append the rows of a chunk."""
        codes = [self._outcomes.setdefault(outcome, len(self._outcomes)) for outcome in chunk.outcomes]
        chunk.numbers["outcome"] = numpy.array(codes, numpy.int32)[chunk.numbers["outcome"]]
        for name, file in self._files.items():
            file.write(getattr(chunk, name))
        self.rows += len(chunk.numbers)

    def read(self) -> Rows:
        """Return all rows, memory-mapped."""
        data, maps = {name: numpy.empty(0, kind) for name, kind in _TYPES.items()}, []
        for name, file in self._files.items():
            file.flush()
            if file.tell():
                maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                data[name] = numpy.frombuffer(maps[-1], _TYPES[name])
        numbers = data["numbers"]
        location_ends, ends = (pyarrow.array(ends_of(numbers[name])) for name in ("location_bytes", "length"))
        texts = (location_ends.buffers()[1], pyarrow.py_buffer(data["locations"]))
        columns = {"location": pyarrow.LargeStringArray.from_buffers(len(numbers), *texts)}
        for name in ("input_ids", "labels"):
            columns[name] = pyarrow.LargeListArray.from_arrays(ends, pyarrow.array(data[name]))
        return Rows(numbers, pyarrow.table(columns), [*self._outcomes], maps, numpy.arange(len(numbers)))
