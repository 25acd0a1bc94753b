"""Tokenizes a source's rows on all CPU cores and appends them to a store.

Each row is parsed (formats), tokenized (tokenize) and truncated. What happened to the rows is counted, and rejected
ones are left out.
"""

import collections
import functools
import gc
import hashlib
import itertools
import logging
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy

from sft_recipes.config.schema import DataSource
from sft_recipes.data import licenses
from sft_recipes.data.columns import ColumnError, select_columns
from sft_recipes.data.formats import Conversation, conversation_of, text_of
from sft_recipes.data.rows import NUMBERS, Chunk, Outcome, Outcomes, Rows, RowStore
from sft_recipes.data.sources import RawChunk, RawRow, Source, at_locations, attempt
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer, Example
from sft_recipes.runtime.errors import DataError
from sft_recipes.runtime.heartbeat import die_with_parent

log = logging.getLogger(__name__)

_PROGRESS_INTERVAL = 5  # seconds
# Each byte of ASCII, with a space for all that `str.split` takes as one.
_SPACES = bytes(32 if chr(code).isspace() else code for code in range(128)) + bytes(range(128, 256))


def tokenize_source(
    source: Source,
    tokenizer: ConversationTokenizer,
    key: str,
    store: RowStore,
    max_length: int,
    max_rejected: float = 0.0,
    max_rows: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Tokenize all rows of a source in order, on all cores if it has more than one chunk.

    Args:
        key: the recipe key that names the source, for errors.
        store: gets the rows that are not rejected.
        max_rejected: fraction of rows that may be rejected.
        max_rows: read only the first rows.
        check: called after each chunk; raises what prevents that the rows are used.

    Returns:
        What was read, as `describe_reading`.

    Raises:
        DataError: more rows than that are not conversations or cannot be rendered, or the source has no rows.
        ColumnError: a column would be ignored although it changes what a row means.
    """
    from tqdm import tqdm

    chunks = source.chunks()
    if max_rows is not None:
        chunks = iter([RawChunk(functools.partial(at_locations, [*itertools.islice(source.rows(), max_rows)]), 1.0)])
    outcomes: Outcomes = {}
    name, error, started, rows = source.display_name, None, time.monotonic(), 0
    logged, work = started, (tokenizer, max_length, source.settings)
    # disable=None: no bar without a terminal
    with tqdm(desc=f"data: {name}", unit=" rows", delay=1, leave=False, disable=None, file=sys.stdout) as bar:
        for chunk, read in _tokenize_chunks(chunks, work):
            store.append(chunk)
            check()
            error = error or chunk.error
            if not rows:  # if most are rejected, the source is another than expected: do not read all of it
                _check_rejected(chunk.outcomes, error, max(max_rejected, 0.5))
            for outcome, (count, first) in chunk.outcomes.items():
                outcomes.setdefault(outcome, [0, first])[0] += count
            rows = _count(outcomes)
            bar.total = round(rows / read)
            bar.update(rows - bar.n)
            if bar.disable and time.monotonic() - logged > _PROGRESS_INTERVAL:
                logged = time.monotonic()
                log.info("data: %s: %d rows (%.0f%%), %.0f rows/s", name, rows, 100 * read, rows / (logged - started))
    if not rows:
        raise DataError(f"{key}: {name}: found no rows, expected at least one")
    _check_rejected(outcomes, error, max_rejected)
    return describe_reading(outcomes, source)


def _count(outcomes: Outcomes) -> int:
    return sum(count for count, _ in outcomes.values())


def _check_rejected(outcomes: Outcomes, error: str | None, max_rejected: float) -> None:
    """Check the fraction of rejected rows.

    Raises:
        DataError: it is above `max_rejected`; names the first one.
    """
    rows, rejected = _count(outcomes), _count({key: each for key, each in outcomes.items() if key.rejected})
    if rejected > max_rejected * rows:
        share = math.ceil(1000 * rejected / rows) / 1000
        advice = f"; data.max_rejected_fraction={share:g} leaves them out" if rejected < rows else ""
        raise DataError(f"{error} ({rejected:,} of {rows:,} rows rejected{advice})")


def tokenize_chunk(
    rows: Sequence[RawRow], tokenizer: ConversationTokenizer, max_length: int, settings: DataSource | None = None
) -> Chunk:
    """Tokenize rows in this process.

    Raises:
        ColumnError: a column would be ignored although it changes what a row means.
    """
    conversations = [attempt(conversation_of, row, settings) for row in rows]
    if error := next((error for error in conversations if isinstance(error, ColumnError)), None):
        raise error
    return to_chunk(rows, conversations, tokenizer.tokenize(conversations), max_length)


def to_chunk(
    rows: Sequence[RawRow],
    conversations: Sequence[Conversation | DataError],
    examples: Sequence[Example | DataError],
    max_length: int,
) -> Chunk:
    """Truncate examples to `max_length` tokens, and count what was done to the rows."""
    outcomes, codes = Outcomes(), dict[Outcome, int]()
    numbers, locations, spans, errors, tokens = [], [], [], [], 0
    input_ids = [numpy.empty(0, numpy.int32)]
    for row, conversation, example in zip(rows, conversations, examples, strict=True):
        outcome = _outcome_of(row, conversation, example)
        outcomes.setdefault(outcome, [0, row.location])[0] += 1
        code = codes.setdefault(outcome, len(codes))
        if isinstance(conversation, DataError) or isinstance(example, DataError):
            errors.append(_utf_8(example))
            continue
        short = example.truncate(max_length)
        locations.append(row.location.encode())
        lengths = (len(locations[-1]), len(short.input_ids), len(example.input_ids))
        digests = (_digest(text_of(conversation)), _digest(_first_prompt(conversation)))
        full = example.supervised_tokens()
        supervised = (full if short is example else short.supervised_tokens(), full)
        numbers.append((code, *lengths, *supervised, *digests, len(short.spans) < len(example.spans)))
        # Nothing predicts the first token.
        spans += [(tokens + max(start, 1), tokens + end) for start, end in short.spans]
        input_ids.append(short.input_ids)
        tokens += len(short.input_ids)
    ids = numpy.concatenate(input_ids, dtype=numpy.int32, casting="same_kind")  # the type of the store
    labels = numpy.full_like(ids, IGNORED)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    table = numpy.array(numbers, NUMBERS)
    return Chunk(table, b"".join(locations), ids, labels, outcomes, next(iter(errors), None))


def _outcome_of(row: RawRow, conversation: Conversation | DataError, example: Example | DataError) -> Outcome:
    read = () if isinstance(conversation, DataError) else (conversation.columns, conversation.ignored_keys)
    if isinstance(conversation, DataError) or isinstance(example, DataError):
        reason = _utf_8(example).removeprefix(f"{row.location}: ").partition(". ")[0]
        return Outcome(*read, rejected=re.sub(r"\d+", "N", reason)[:160])
    conventions = (*conversation.conventions, *example.conventions)
    return Outcome(*read, conventions, "", _utf_8(example.note), tuple(sorted(example.stop_ids)))


def _utf_8(text: Any) -> str:
    """Return a text that can be stored: a tokenizer's files and a row may have lone surrogates."""
    return str(text).encode("utf-8", "backslashreplace").decode()


# What a worker tokenizes with. Workers inherit it by fork, because sending it costs more than tokenizing a chunk.
_WORK: list[Any] = []


def _tokenize_chunks(chunks: Iterator[RawChunk], work: tuple[Any, ...]) -> Iterator[tuple[Chunk, float]]:
    """Tokenize the first chunk in this process and the others on all cores; yield each with its `read`, in order."""
    _WORK[:] = work
    yield from map(_tokenize, itertools.islice(chunks, 1))
    if not (second := next(chunks, None)):
        return
    cores = len(os.sched_getaffinity(0))
    pending: collections.deque[Future[tuple[Chunk, float]]] = collections.deque()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, fork, initializer=start_worker, initargs=(os.getpid(),)) as pool:
        for chunk in itertools.chain([second], chunks):
            pending.append(pool.submit(_tokenize, chunk))
            while len(pending) > 3 * cores:  # bounds the chunks in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def start_worker(parent: int) -> None:
    """Set up a forked process: it ends with its parent, uses one core, and collects no garbage by itself."""
    die_with_parent(parent)
    gc.freeze()  # the parent's objects are not garbage of this process
    gc.disable()  # once per chunk instead: searching the many objects of rows takes 3% of the time
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker uses one core


def _tokenize(chunk: RawChunk) -> tuple[Chunk, float]:
    if not gc.isenabled():  # a worker
        gc.collect()
    return tokenize_chunk([*chunk.rows()], *_WORK), chunk.read


def describe_reading(outcomes: Outcomes, source: Source) -> dict[str, Any]:
    """Return what was read of a source as plain values for `details.json` and the manifest.

    These are its Hub name, commit and license, its files, rows by the columns that are read or ignored, and rows by
    convention and by reason of rejection, with the location of the first.
    """
    used, ignored = collections.Counter[str](), collections.Counter[str]()
    conventions: dict[str, list[Any]] = {}
    rejected: dict[str, list[Any]] = {}
    for outcome, (rows, first) in outcomes.items():
        if outcome.columns is not None:
            selection = select_columns(outcome.columns, source.settings)
            for name, purpose in selection.used.items():
                used[name if name == purpose else f"{name} as {purpose}"] += rows
            ignored.update(dict.fromkeys(selection.ignored, rows))
        ignored.update({f"messages[].{key}": rows for key in outcome.ignored_keys})
        for convention in outcome.conventions:
            conventions.setdefault(convention, [0, first])[0] += rows
        if outcome.rejected:
            rejected.setdefault(outcome.rejected, [0, first])[0] += rows
    snapshot = source.files[0] if source.hub_name else None
    return {
        **({"hub": source.hub_name, "commit": snapshot.name, **licenses.read(snapshot)} if snapshot else {}),
        "files": source.file_names(),
        "rows": _count(outcomes),
        "used": dict(used),
        "ignored": dict(ignored.most_common()),
        "conventions": conventions,
        "rejected": rejected,
    }


def split_digests(rows: Rows) -> numpy.ndarray:
    """Return what a validation split is drawn from: the prompts, or the rows if all have the same prompt."""
    prompts = rows["prompt_digest"]
    return prompts if len(numpy.unique(prompts)) > 1 else rows["row_digest"]


def _first_prompt(conversation: Conversation) -> str:
    return next((message["content"] for message in conversation.messages if message["role"] == "user"), "")


def _digest(text: str) -> int:
    """Hash a text with normalized white space to 64 bits: two of a million different rows collide once in forty million
    tries."""
    if text.isascii():  # in half of the time
        words = text.encode().translate(_SPACES)
        while b"  " in words:
            words = words.replace(b"  ", b" ")
        words = words.strip()
    else:
        words = " ".join(text.split()).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
