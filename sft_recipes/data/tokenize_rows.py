"""Labels a source's rows on all cores of the machine, and keeps them as flat arrays.

A row's way is formats, chat, cut to length; what is met on it is counted. Arrays rather than lists of lists: a hundred
thousand rows are one gigabyte as Python integers, and a few seconds to copy.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy

from sft_recipes.data.formats import Conversation, conversation_of, text_of
from sft_recipes.data.sources import RawRow, Source
from sft_recipes.data.tokenize import Chat, Example
from sft_recipes.runtime.errors import DataError
from sft_recipes.runtime.heartbeat import end_with_parent

_ROWS_A_CHUNK = 1000
_SECONDS_BETWEEN_LINES = 5


_PER_EXAMPLE = (
    *("lengths", "whole", "trained", "whole_trained", "unanswered", "said", "asked"),
    *("markers_as_text", "dropped_reasoning", "shares_a_token"),
)


@dataclass(frozen=True)
class Labelled:
    """Examples as flat arrays; those of `lengths` lie one behind the other in `ids` and `supervised`.

    `lengths` are tokens after the cut to `max_length`, `whole` before it, `trained` and `whole_trained` supervised
    tokens likewise. `said` and `asked` are digests of a row's text and of its first user turn. `unanswered` marks rows
    that lost a question whose answer was cut; `markers_as_text`, `dropped_reasoning` and `shares_a_token` mark rows as
    `Example` does, and `notes` says how a row's text differs from inference, where it does.
    """

    ids: numpy.ndarray
    supervised: numpy.ndarray
    lengths: numpy.ndarray
    whole: numpy.ndarray
    trained: numpy.ndarray
    whole_trained: numpy.ndarray
    unanswered: numpy.ndarray
    said: numpy.ndarray
    asked: numpy.ndarray
    markers_as_text: numpy.ndarray
    dropped_reasoning: numpy.ndarray
    shares_a_token: numpy.ndarray
    where: list[str]
    notes: list[str]
    stop_ids: frozenset[int] = frozenset()
    hows: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, chosen: numpy.ndarray) -> Labelled:
        """The examples whose place in `chosen`, a mask, is true."""
        tokens = numpy.repeat(chosen, self.lengths)
        return Labelled(
            ids=self.ids[tokens],
            supervised=self.supervised[tokens],
            where=list(itertools.compress(self.where, chosen)),
            notes=list(itertools.compress(self.notes, chosen)),
            stop_ids=self.stop_ids,
            hows=self.hows,
            **{name: getattr(self, name)[chosen] for name in _PER_EXAMPLE},
        )


def label(source: Source, chat: Chat, max_length: int, key: str, name: str) -> Labelled:
    """All rows of a source, in their order, on all cores where there are many.

    Raises:
        DataError: a row that is no conversation, or that the template cannot render, in the first thousand that hold
            one; or there are no rows.
    """
    rows, progress = source.rows(), _Progress(name)
    chunks = _batched(rows)
    first = list(itertools.islice(chunks, 2))
    if not first:
        raise DataError(f"{key}: {source.named} holds no rows")
    if len(first) < 2:
        return together([label_rows(chunk, chat, max_length) for chunk in first])
    return together(list(_on_all_cores(itertools.chain(first, chunks), chat, max_length, progress)))


def _batched(rows: Iterable[RawRow]) -> Iterator[tuple[RawRow, ...]]:
    """itertools.batched, which Python 3.11 has not."""
    rest = iter(rows)
    while chunk := tuple(itertools.islice(rest, _ROWS_A_CHUNK)):
        yield chunk


def label_rows(rows: Iterable[RawRow], chat: Chat, max_length: int) -> Labelled:
    """Rows as labelled examples, in this process."""
    conversations = [conversation_of(row) for row in rows]
    examples = chat.label(conversations)
    return arrays(conversations, examples, max_length)


# A worker's own tokenizer and length, which it has from its parent by fork, since sending them costs more than a chunk.
_WORKS_WITH: dict[str, Any] = {}


def _on_all_cores(
    chunks: Iterator[tuple[RawRow, ...]], chat: Chat, max_length: int, progress: _Progress
) -> Iterator[Labelled]:
    cores = len(os.sched_getaffinity(0))
    _WORKS_WITH.update(chat=chat, max_length=max_length)
    waiting: collections.deque[Future[Labelled]] = collections.deque()
    start = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, start, initializer=_begin, initargs=(os.getpid(),)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                while len(waiting) > 3 * cores:  # no more than that in memory at once
                    yield progress.counted(waiting.popleft().result())
            while waiting:
                yield progress.counted(waiting.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    progress.end()


def _begin(parent: int) -> None:
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one core


def _work(rows: tuple[RawRow, ...]) -> Labelled:
    return label_rows(rows, _WORKS_WITH["chat"], _WORKS_WITH["max_length"])


class _Progress:
    """Says on standard error how far a long preparation is."""

    def __init__(self, name: str):
        self._name, self._rows = name, 0
        self._started = self._said = time.monotonic()

    def counted(self, chunk: Labelled) -> Labelled:
        self._rows += len(chunk)
        now = time.monotonic()
        if now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            print(f"data: {self._rows:,} rows of {self._name}, {self._speed(now):,.0f} a second", file=sys.stderr)
        return chunk

    def end(self) -> None:
        if self._said > self._started:
            speed = self._speed(time.monotonic())
            print(f"data: all {self._rows:,} rows of {self._name}, {speed:,.0f} a second", file=sys.stderr)

    def _speed(self, now: float) -> float:
        return self._rows / max(now - self._started, 0.001)


def arrays(conversations: list[Conversation], examples: list[Example], max_length: int) -> Labelled:
    """Conversations and their examples, cut to `max_length` tokens, as flat arrays."""
    short = [example.cut(max_length) for example in examples]
    lengths = numpy.array([len(example.input_ids) for example in short], numpy.int64)
    ids = numpy.fromiter(itertools.chain.from_iterable(one.input_ids for one in short), numpy.int32, int(lengths.sum()))
    supervised = numpy.zeros(len(ids), bool)
    start = 0
    for example in short:
        for first, last in example.spans:
            supervised[start + max(first, 1) : start + last] = True
        start += len(example.input_ids)
    return Labelled(
        ids=ids,
        supervised=supervised,
        lengths=lengths,
        whole=numpy.array([len(example.input_ids) for example in examples], numpy.int64),
        trained=numpy.array([example.supervised() for example in short], numpy.int64),
        whole_trained=numpy.array([example.supervised() for example in examples], numpy.int64),
        unanswered=numpy.array([_unanswered(*pair) for pair in zip(examples, short, strict=True)], bool),
        said=_digests(text_of(one) for one in conversations),
        asked=asked_digests(conversations),
        where=[one.where for one in conversations],
        stop_ids=frozenset[int]().union(*(example.stop_ids for example in examples)),
        notes=[example.note for example in examples],
        hows=frozenset(example.how for example in examples),
        **{
            name: numpy.array([getattr(example, name) for example in examples], bool)
            for name in ("markers_as_text", "dropped_reasoning", "shares_a_token")
        },
    )


def _unanswered(whole: Example, short: Example) -> bool:
    """Whether the cut took an answer; its question went with it."""
    return len(short.spans) < len(whole.spans)


def asked_digests(conversations: Iterable[Conversation]) -> numpy.ndarray:
    """A digest of what each conversation asks first, white space aside."""
    return _digests(_asked(one) for one in conversations)


def _asked(one: Conversation) -> str:
    first = next((message["content"] for message in one.messages if message["role"] == "user"), "")
    return " ".join(first.split())


def _digests(texts: Iterable[str]) -> numpy.ndarray:
    """64 bits a text: among a million rows two different ones share them once in forty million tries."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return numpy.frombuffer(joined, numpy.uint64)


def together(parts: list[Labelled]) -> Labelled:
    """Several as one, in their order."""
    if not parts:
        return arrays([], [], 1)
    joined = ("ids", "supervised", *_PER_EXAMPLE)
    return Labelled(
        where=[where for part in parts for where in part.where],
        stop_ids=frozenset[int]().union(*(part.stop_ids for part in parts)),
        hows=frozenset[str]().union(*(part.hows for part in parts)),
        notes=[note for part in parts for note in part.notes],
        **{name: numpy.concatenate([getattr(part, name) for part in parts]) for name in joined},
    )
