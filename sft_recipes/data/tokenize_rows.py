"""Tokenizes a source's rows on all CPU cores into an Arrow table, one row each.

Each row is parsed (formats), tokenized (tokenize) and truncated. A rejected row is in the table with its error only, so
that all that happened to the rows of a source can be counted from it.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from sft_recipes.config.schema import DataSource
from sft_recipes.data import licenses
from sft_recipes.data.columns import ColumnError, select_columns
from sft_recipes.data.formats import Conversation, conversation_of, text_of
from sft_recipes.data.sources import RawRow, Source, attempt
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer, Example
from sft_recipes.runtime.errors import DataError
from sft_recipes.runtime.heartbeat import die_with_parent

log = logging.getLogger(__name__)

_ROWS_PER_CHUNK = 1000
_PROGRESS_INTERVAL = 5  # seconds

# Lengths are tokens after truncation to `max_length`; `full_…` before it. `supervised_tokens` are those in the loss.
# `lost_answers`: truncation removed an answer, and with it its question. `note`: how the text differs from the text at
# inference. The digests are hashes of the row's text and of its first user turn.
SCHEMA = pyarrow.schema(
    {
        **dict.fromkeys(("location", "error", "note", "span_source"), pyarrow.string()),
        **dict.fromkeys(("columns", "ignored_keys"), pyarrow.string()),  # lists as JSON: a name may be no UTF-8
        "conventions": pyarrow.list_(pyarrow.string()),
        **dict.fromkeys(("input_ids", "labels", "stop_ids"), pyarrow.large_list(pyarrow.int32())),
        **dict.fromkeys(("length", "full_length"), pyarrow.int64()),
        **dict.fromkeys(("supervised_tokens", "full_supervised_tokens"), pyarrow.int64()),
        **dict.fromkeys(("row_digest", "prompt_digest"), pyarrow.uint64()),
        "lost_answers": pyarrow.bool_(),
    }
)


def tokenize_source(
    source: Source,
    tokenizer: ConversationTokenizer,
    key: str,
    max_length: int,
    max_rejected: float = 0.0,
    max_rows: int | None = None,
) -> pyarrow.Table:
    """Tokenize all rows of a source in order, on all cores if it has more than one chunk.

    Args:
        key: the recipe key that names the source, for errors.
        max_rejected: fraction of rows that may be rejected.
        max_rows: read only the first rows.

    Returns:
        A table of SCHEMA, rejected rows included.

    Raises:
        DataError: more rows than that are not conversations or cannot be rendered, or the source has no rows.
        ColumnError: a column would be ignored although it changes what a row means.
    """
    rows = itertools.islice(source.rows(), max_rows)
    chunks = iter(lambda: list(itertools.islice(rows, _ROWS_PER_CHUNK)), [])
    work = (tokenizer, max_length, source.settings)
    first, second = next(chunks, None), next(chunks, None)
    if not first:
        raise DataError(f"{key}: {source.display_name}: found no rows, expected at least one")
    tables = [tokenize_chunk(first, *work)]
    if second:
        # If most are rejected, the source is another than expected: do not read all of it.
        _check_rejected(tables[0], max(max_rejected, 0.5))
        started = logged = time.monotonic()
        for table in _on_all_cores(itertools.chain([second], chunks), work):
            tables.append(table)
            if time.monotonic() - logged > _PROGRESS_INTERVAL:
                logged, count = time.monotonic(), sum(map(len, tables))
                speed = count / (logged - started)
                log.info("data: %s: %s rows tokenized, %.0f rows/s", source.display_name, f"{count:,}", speed)
    table = pyarrow.concat_tables(tables)
    _check_rejected(table, max_rejected)
    return table


def accepted(table: pyarrow.Table) -> pyarrow.Table:
    """Return the rows that are not rejected."""
    return table.filter(pyarrow.compute.is_null(table["error"]))


def _check_rejected(table: pyarrow.Table, max_rejected: float) -> None:
    """Check the fraction of rejected rows.

    Raises:
        DataError: it is above `max_rejected`; names the first one.
    """
    rows, rejected = len(table), len(table) - table["error"].null_count
    if rejected > max_rejected * rows:
        share = math.ceil(1000 * rejected / rows) / 1000
        advice = f"; data.max_rejected_fraction={share:g} leaves them out" if rejected < rows else ""
        error = table["error"].drop_null()[0]
        raise DataError(f"{error} ({rejected:,} of {rows:,} rows rejected{advice})")


def tokenize_chunk(
    rows: Sequence[RawRow], tokenizer: ConversationTokenizer, max_length: int, settings: DataSource | None = None
) -> pyarrow.Table:
    """Tokenize rows in this process.

    Raises:
        ColumnError: a column would be ignored although it changes what a row means.
    """
    conversations = [attempt(conversation_of, row, settings) for row in rows]
    if error := next((error for error in conversations if isinstance(error, ColumnError)), None):
        raise error
    examples = tokenizer.tokenize(conversations)
    records = [to_record(*row, max_length) for row in zip(rows, conversations, examples, strict=True)]
    return pyarrow.Table.from_pylist(records, schema=SCHEMA)


def to_record(
    row: RawRow, conversation: Conversation | DataError, example: Example | DataError, max_length: int
) -> dict[str, Any]:
    """Truncate an example to `max_length` tokens; return the columns of SCHEMA that the row has."""
    if isinstance(conversation, DataError):
        return {"location": row.location, "error": _utf_8(conversation)}
    names = {key: json.dumps(getattr(conversation, key)) for key in ("columns", "ignored_keys")}
    if isinstance(example, DataError):
        return {"location": row.location, "error": _utf_8(example), **names}
    short = example.truncate(max_length)
    return {
        "location": row.location,
        **names,
        "conventions": (*conversation.conventions, *example.conventions),
        "input_ids": short.input_ids,
        "labels": [IGNORED, *short.labels[1:]],  # nothing predicts the first token
        "length": len(short.input_ids),
        "full_length": len(example.input_ids),
        "supervised_tokens": short.supervised_tokens(),
        "full_supervised_tokens": example.supervised_tokens(),
        "lost_answers": len(short.spans) < len(example.spans),
        "row_digest": _digest(text_of(conversation)),
        "prompt_digest": _digest(_first_prompt(conversation)),
        "note": _utf_8(example.note),
        "span_source": example.span_source,
        "stop_ids": sorted(example.stop_ids),
    }


def _utf_8(text: Any) -> str:
    """Return a text that Arrow can store: a tokenizer's files and a row may have lone surrogates."""
    return str(text).encode("utf-8", "backslashreplace").decode()


# What a worker tokenizes with. Workers inherit it by fork, because sending it costs more than tokenizing a chunk.
_WORK: list[Any] = []


def _on_all_cores(chunks: Iterator[list[RawRow]], work: tuple[Any, ...]) -> Iterator[pyarrow.Table]:
    cores = len(os.sched_getaffinity(0))
    _WORK[:] = work
    pending: collections.deque[Future[pyarrow.Table]] = collections.deque()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, fork, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        for chunk in chunks:
            pending.append(pool.submit(_tokenize, chunk))
            while len(pending) > 3 * cores:  # bounds the chunks in memory
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def _start_worker(parent: int) -> None:
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker uses one core


def _tokenize(rows: list[RawRow]) -> pyarrow.Table:
    return tokenize_chunk(rows, *_WORK)


def describe_reading(table: pyarrow.Table, source: Source) -> dict[str, Any]:
    """Return what was read of a source as plain values for `details.json` and the manifest.

    These are its Hub name, commit and license, its files, rows by the columns that are read or ignored, and rows by
    convention and by reason of rejection, with the location of the first.
    """
    used: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for names, rows in Counter(table["columns"].drop_null().to_pylist()).items():
        selection = select_columns(tuple(json.loads(names)), source.settings)
        for name, purpose in selection.used.items():
            used[name if name == purpose else f"{name} as {purpose}"] += rows
        ignored.update(dict.fromkeys(selection.ignored, rows))
    for keys, rows in Counter(table["ignored_keys"].drop_null().to_pylist()).items():
        for key in json.loads(keys):
            ignored[f"messages[].{key}"] += rows
    conventions: dict[str, list[Any]] = {}
    rejected: dict[str, list[Any]] = {}
    for row in table.select(["location", "conventions", "error"]).to_pylist():
        location, error = row["location"], row["error"]
        for convention in row["conventions"] or ():
            conventions.setdefault(convention, [0, location])[0] += 1
        if error is not None:
            reason = re.sub(r"\d+", "N", error.removeprefix(f"{location}: ").partition(". ")[0])[:160]
            rejected.setdefault(reason, [0, location])[0] += 1
    snapshot = source.files[0] if source.hub_name else None
    return {
        **({"hub": source.hub_name, "commit": snapshot.name, **licenses.read(snapshot)} if snapshot else {}),
        "files": source.file_names(),
        "rows": len(table),
        "used": dict(used),
        "ignored": dict(ignored.most_common()),
        "conventions": conventions,
        "rejected": rejected,
    }


def split_digests(table: pyarrow.Table) -> numpy.ndarray:
    """Return what a validation split is drawn from: the prompts, or the rows if all have the same prompt."""
    prompts = table["prompt_digest"].to_numpy()
    return prompts if len(numpy.unique(prompts)) > 1 else table["row_digest"].to_numpy()


def _first_prompt(conversation: Conversation) -> str:
    first = next((message["content"] for message in conversation.messages if message["role"] == "user"), "")
    return " ".join(first.split())


def _digest(text: str) -> int:
    """Hash a text to 64 bits: two of a million different rows collide once in forty million tries."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
