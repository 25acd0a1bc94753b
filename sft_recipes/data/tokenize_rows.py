"""Tokenizes a source's rows on all CPU cores and stores them as flat arrays.

Each row is parsed (formats), tokenized (tokenize) and truncated; what happens to it is counted. Arrays instead of lists
of lists: a hundred thousand rows take one gigabyte as Python integers, and a few seconds to copy.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from sft_recipes.config.schema import DataSource
from sft_recipes.data.columns import ColumnError, ReadingReport
from sft_recipes.data.formats import Conversation, conversation_of, text_of
from sft_recipes.data.sources import RawRow, Source
from sft_recipes.data.tokenize import ConversationTokenizer, Example
from sft_recipes.runtime.errors import DataError
from sft_recipes.runtime.heartbeat import die_with_parent

log = logging.getLogger(__name__)

_ROWS_PER_CHUNK = 1000
_PROGRESS_INTERVAL = 5  # seconds

_EXAMPLE_FLAGS = ("special_tokens_as_text", "dropped_reasoning", "shares_prompt_token")
_PER_EXAMPLE = (
    *("lengths", "full_lengths", "supervised_tokens", "full_supervised_tokens", "lost_answers"),
    *("row_digests", "prompt_digests", *_EXAMPLE_FLAGS),
)


@dataclass(frozen=True)
class TokenizedRows:
    """Examples as flat arrays: those of `lengths` follow each other in `input_ids` and `loss_mask`.

    Attributes:
        lengths: tokens per example after truncation to `max_length`; `full_lengths` before it.
        supervised_tokens: tokens in the loss per example after truncation; `full_supervised_tokens` before it.
        lost_answers: whether truncation removed an answer, and with it its question.
        row_digests: a hash of each row's text; `prompt_digests` of its first user turn.
        notes: how each row's text differs from the text at inference; empty if it does not.
        special_tokens_as_text: as in `Example`, like `dropped_reasoning` and `shares_prompt_token`.
        report: what was read of the source; of all its rows, not of a selection.
    """

    input_ids: numpy.ndarray
    loss_mask: numpy.ndarray
    lengths: numpy.ndarray
    full_lengths: numpy.ndarray
    supervised_tokens: numpy.ndarray
    full_supervised_tokens: numpy.ndarray
    lost_answers: numpy.ndarray
    row_digests: numpy.ndarray
    prompt_digests: numpy.ndarray
    special_tokens_as_text: numpy.ndarray
    dropped_reasoning: numpy.ndarray
    shares_prompt_token: numpy.ndarray
    locations: list[str]
    notes: list[str]
    stop_ids: frozenset[int] = frozenset()
    span_sources: frozenset[str] = frozenset()
    report: ReadingReport = field(default_factory=ReadingReport)

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, mask: numpy.ndarray) -> TokenizedRows:
        """Return the examples for which the mask, [examples], is true."""
        tokens = numpy.repeat(mask, self.lengths)
        return TokenizedRows(
            input_ids=self.input_ids[tokens],
            loss_mask=self.loss_mask[tokens],
            locations=list(itertools.compress(self.locations, mask)),
            notes=list(itertools.compress(self.notes, mask)),
            stop_ids=self.stop_ids,
            span_sources=self.span_sources,
            report=self.report,
            **{name: getattr(self, name)[mask] for name in _PER_EXAMPLE},
        )


def tokenize_source(
    source: Source,
    tokenizer: ConversationTokenizer,
    max_length: int,
    key: str,
    name: str,
    max_rejected: float = 0.0,
    max_rows: int | None = None,
) -> TokenizedRows:
    """Tokenize all rows of a source in order, on all cores if it has more than one chunk.

    Args:
        key: the recipe key that names the source, for errors.
        name: the source's short name, for progress.
        max_rejected: fraction of rows that may be rejected.
        max_rows: read only the first rows.

    Raises:
        DataError: more rows than that are not conversations or cannot be rendered, or the source has no rows.
        ColumnError: a column would be ignored although it changes what a row means.
    """
    rows, progress = itertools.islice(source.rows(), max_rows), _Progress(name)
    chunks = _batched(rows)
    first = list(itertools.islice(chunks, 2))
    if not first:
        raise DataError(f"{key}: {source.display_name}: found no rows, expected at least one")
    settings = source.settings
    if len(first) < 2:
        tokenized = concatenate([tokenize_chunk(chunk, tokenizer, max_length, settings) for chunk in first])
    else:
        begun = progress.count(tokenize_chunk(first[0], tokenizer, max_length, settings))
        if begun.report.rejected_rows > len(first[0]) / 2:  # the source is another than expected: do not read all of it
            _check_rejected(begun.report, max_rejected)
        rest = _on_all_cores(itertools.chain(first[1:], chunks), tokenizer, max_length, settings, progress)
        tokenized = concatenate([begun, *rest])
    _check_rejected(tokenized.report, max_rejected)
    return tokenized


def _check_rejected(report: ReadingReport, max_rejected: float) -> None:
    """Check the fraction of rejected rows.

    Raises:
        DataError: it is above `max_rejected`; names the first one.
    """
    rejected, rows = report.rejected_rows, report.rows
    if rejected > max_rejected * rows:
        share = math.ceil(1000 * rejected / rows) / 1000
        advice = f"; data.max_rejected_fraction={share:g} leaves them out" if rejected < rows else ""
        raise DataError(f"{report.error} ({rejected:,} of {rows:,} rows rejected{advice})")


def _batched(rows: Iterable[RawRow]) -> Iterator[tuple[RawRow, ...]]:
    """itertools.batched, which Python 3.11 does not have."""
    rest = iter(rows)
    while chunk := tuple(itertools.islice(rest, _ROWS_PER_CHUNK)):
        yield chunk


def tokenize_chunk(
    rows: Iterable[RawRow], tokenizer: ConversationTokenizer, max_length: int, settings: DataSource
) -> TokenizedRows:
    """Tokenize rows in this process; rejected rows are counted in the report.

    Raises:
        ColumnError: a column would be ignored although it changes what a row means.
    """
    report, conversations = ReadingReport(), []
    for row in rows:
        report.rows += 1
        try:
            conversations.append(conversation_of(row, settings))
        except ColumnError:
            raise
        except DataError as error:
            report.reject(row.location, error)
    accepted = []
    for conversation, example in zip(conversations, tokenizer.tokenize_or_reject(conversations), strict=True):
        report.columns[conversation.columns] += 1
        report.message_keys.update(conversation.ignored_keys)
        if isinstance(example, DataError):
            report.reject(conversation.location, example)
            continue
        accepted.append((conversation, example))
        for convention in conversation.conventions:
            report.apply(convention, conversation.location)
        if example.generated_call_ids:
            report.apply("tool call ids generated", conversation.location)
    arrays = to_arrays([conversation for conversation, _ in accepted], [example for _, example in accepted], max_length)
    return replace(arrays, report=report)


# A worker's tokenizer and length. Workers inherit it by fork, because sending it costs more than tokenizing a chunk.
_WORKER_STATE: dict[str, Any] = {}


def _on_all_cores(
    chunks: Iterator[tuple[RawRow, ...]],
    tokenizer: ConversationTokenizer,
    max_length: int,
    settings: DataSource,
    progress: _Progress,
) -> Iterator[TokenizedRows]:
    cores = len(os.sched_getaffinity(0))
    _WORKER_STATE.update(tokenizer=tokenizer, max_length=max_length, settings=settings)
    pending: collections.deque[Future[TokenizedRows]] = collections.deque()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, fork, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                while len(pending) > 3 * cores:  # bounds the chunks in memory
                    yield progress.count(pending.popleft().result())
            while pending:
                yield progress.count(pending.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    progress.finish()


def _start_worker(parent: int) -> None:
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker uses one core


def _work(rows: tuple[RawRow, ...]) -> TokenizedRows:
    return tokenize_chunk(rows, **_WORKER_STATE)


class _Progress:
    """Logs the progress of a long preparation."""

    def __init__(self, name: str):
        self._name, self._rows = name, 0
        self._started = self._logged = time.monotonic()

    def count(self, chunk: TokenizedRows) -> TokenizedRows:
        self._rows += len(chunk)
        now = time.monotonic()
        if now - self._logged > _PROGRESS_INTERVAL:
            self._logged = now
            log.info("data: %s: %s rows tokenized, %s rows/s", self._name, f"{self._rows:,}", self._speed(now))
        return chunk

    def finish(self) -> None:
        if self._logged > self._started:
            speed = self._speed(time.monotonic())
            log.info("data: %s: all %s rows tokenized, %s rows/s", self._name, f"{self._rows:,}", speed)

    def _speed(self, now: float) -> str:
        return f"{self._rows / max(now - self._started, 0.001):,.0f}"


def to_arrays(conversations: list[Conversation], examples: list[Example], max_length: int) -> TokenizedRows:
    """Truncate the examples of conversations to `max_length` tokens and store them as flat arrays."""
    truncated = [example.truncate(max_length) for example in examples]
    lengths = numpy.array([len(example.input_ids) for example in truncated], numpy.int64)
    ids = itertools.chain.from_iterable(example.input_ids for example in truncated)
    input_ids = numpy.fromiter(ids, numpy.int32, int(lengths.sum()))
    loss_mask = numpy.zeros(len(input_ids), bool)
    start = 0
    for example in truncated:
        for first, last in example.spans:
            loss_mask[start + max(first, 1) : start + last] = True
        start += len(example.input_ids)
    pairs = list(zip(examples, truncated, strict=True))
    return TokenizedRows(
        input_ids=input_ids,
        loss_mask=loss_mask,
        lengths=lengths,
        full_lengths=numpy.array([len(example.input_ids) for example in examples], numpy.int64),
        supervised_tokens=numpy.array([example.supervised_tokens() for example in truncated], numpy.int64),
        full_supervised_tokens=numpy.array([example.supervised_tokens() for example in examples], numpy.int64),
        lost_answers=numpy.array([len(short.spans) < len(full.spans) for full, short in pairs], bool),
        row_digests=row_digests(conversations),
        prompt_digests=prompt_digests(conversations),
        locations=[conversation.location for conversation in conversations],
        stop_ids=frozenset[int]().union(*(example.stop_ids for example in examples)),
        notes=[example.note for example in examples],
        span_sources=frozenset(example.span_source for example in examples),
        **{name: numpy.array([getattr(example, name) for example in examples], bool) for name in _EXAMPLE_FLAGS},
    )


def prompt_digests(conversations: Iterable[Conversation]) -> numpy.ndarray:
    """Return a hash of each conversation's first user turn, with normalized white space."""
    return _digests(_first_prompt(conversation) for conversation in conversations)


def row_digests(conversations: Iterable[Conversation]) -> numpy.ndarray:
    """Return a hash of each conversation's text, with normalized white space."""
    return _digests(text_of(conversation) for conversation in conversations)


def split_digests(prompts: numpy.ndarray, rows: numpy.ndarray) -> numpy.ndarray:
    """Return what a validation split is drawn from: the prompts, or the rows if all have the same prompt."""
    return prompts if len(numpy.unique(prompts)) > 1 else rows


def _first_prompt(conversation: Conversation) -> str:
    first = next((message["content"] for message in conversation.messages if message["role"] == "user"), "")
    return " ".join(first.split())


def _digests(texts: Iterable[str]) -> numpy.ndarray:
    """Hash each text to 64 bits: two of a million different rows collide once in forty million tries."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return numpy.frombuffer(joined, numpy.uint64)


def concatenate(parts: list[TokenizedRows]) -> TokenizedRows:
    """Concatenate parts in order."""
    if not parts:
        return to_arrays([], [], 1)
    arrays = ("input_ids", "loss_mask", *_PER_EXAMPLE)
    return TokenizedRows(
        locations=[location for part in parts for location in part.locations],
        stop_ids=frozenset[int]().union(*(part.stop_ids for part in parts)),
        span_sources=frozenset[str]().union(*(part.span_sources for part in parts)),
        notes=[note for part in parts for note in part.notes],
        report=ReadingReport.merge(part.report for part in parts),
        **{name: numpy.concatenate([getattr(part, name) for part in parts]) for name in arrays},
    )
