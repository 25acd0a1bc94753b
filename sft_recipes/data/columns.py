"""Chooses which columns of a row are read, and accounts for every other one.

A passage, a system prompt or a label that is not read changes what is trained. So each source lists its columns with
counts, and a column whose name says that it changes the meaning is rejected until the recipe maps it (`data.columns`)
or names it in `data.ignore_columns`.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sft_recipes.config.schema import DataSource, column_pieces
from sft_recipes.runtime.errors import DataError

NAMES = yaml.safe_load(Path(__file__).with_name("formats.yaml").read_text(encoding="utf-8"))
FORMATS: tuple[tuple[str, ...], ...] = tuple(map(tuple, NAMES["formats"]))
FORMAT_NAMES = "messages, conversations, prompt/completion, instruction/input/output, question/answer, query/response"
REQUIRED = tuple(dict.fromkeys(name for names in FORMATS for name in names))
_KINDS: dict[str, str] = {word: kind for kind, entry in NAMES["meaningful"].items() for word in entry["words"]}
_ADVICE: dict[str, str] = {kind: entry["advice"] for kind, entry in NAMES["meaningful"].items()}
_METADATA = re.compile(r"(id|ids|len|length|count|num|size|tokens?|lang|language|type|date|time|hash)$")
_EMPTY: tuple[Any, ...] = ("", [], {})


class ColumnError(DataError):
    """The columns of a source are not what its recipe says; no fraction of rejected rows allows it."""


class Selection(NamedTuple):
    """What is read of rows that have the same columns.

    Attributes:
        format: one of FORMATS, after mapping.
        used: each column that is read, with what it is read as.
        ignored: the columns that are not read.
    """

    format: tuple[str, ...]
    used: Mapping[str, str]
    ignored: tuple[str, ...]


def names_with_values(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a row's columns that are not null or, if no format needs them, not empty."""
    given = {name: value for name, value in values.items() if value is not None}
    return tuple(name for name, value in given.items() if name in REQUIRED or value not in _EMPTY)


def select_columns(names: tuple[str, ...], settings: DataSource) -> Selection:
    """Return what is read of rows with these columns (those of `names_with_values`, and those of the format).

    Raises:
        ColumnError: a column that changes the meaning of a row would be ignored.
        DataError: no format, or several, match.
    """
    return _select(names, tuple(settings.columns.items()), tuple(settings.ignore_columns))


@lru_cache(maxsize=4096)
def _select(names: tuple[str, ...], mapping: tuple[tuple[str, str], ...], ignore: tuple[str, ...]) -> Selection:
    used = {}
    for target, template in mapping:
        used.update({name: target for _, name in column_pieces(template) if name in names})
    targets = tuple(target for target, _ in mapping) or names
    formats = [keys for keys in FORMATS if all(key in targets for key in keys)]
    if len(formats) > 1:
        matching = " and ".join("/".join(keys) for keys in formats)
        raise DataError(f"row keys: found {describe_keys(names)}, which match {matching}. Keep one or set data.columns")
    if not formats:
        fix = "Map them with data.columns, such as {prompt: '{question}', completion: '{answer}'}"
        if "text" in names and not mapping:
            fix = "Plain text: set data.columns={prompt: 'Continue.', completion: '{text}'}; turns: make them messages"
        raise DataError(f"row keys: found {describe_keys(names)}, expected {FORMAT_NAMES}. {fix}")
    if not mapping:
        is_dolly = formats[0] == ("instruction", "response") and "input" not in names
        alpaca = ("history", "context" if is_dolly else "input") if formats[0][0] == "instruction" else ()
        used = {name: name for name in names if name in (*formats[0], *NAMES["optional"], *alpaca)}
    ignored = tuple(name for name in names if name not in used)
    for name in ignored:
        if name not in ignore and (kind := _kind_of(name)):
            raise ColumnError(f"column {name}: found, not read. {_ADVICE[kind]}, or set data.ignore_columns=[{name}]")
    return Selection(formats[0], used, ignored)


def _kind_of(name: str) -> str | None:
    """Return how a column of this name changes what a row means; None if it does not."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if not words or (len(words) > 1 and _METADATA.fullmatch(words[-1])):
        return None
    return next((_KINDS[word] for word in words if word in _KINDS), None)


def check_message_key(key: str, settings: DataSource) -> None:
    """Check that a message's key that is not read does not change its meaning.

    Raises:
        ColumnError: its name says that it does.
    """
    kind = _kind_of(key)
    if kind in ("context", "media") and key not in settings.ignore_columns:
        raise ColumnError(f"message key {key}: found, not read. {_ADVICE[kind]}, or set data.ignore_columns=[{key}]")


def describe_keys(names: tuple[str, ...]) -> str:
    """Return a row's keys for an error message."""
    shown = [repr(name[:61])[1:-1][:60] for name in names[:10]]
    return ", ".join(shown) + (f" and {len(names) - 10} others" if len(names) > 10 else "") or "none"


def map_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the mapped columns of a row: a value itself if the format is one column, else text.

    Raises:
        DataError: the row has none of a format's columns, or a value that is not text is put into text.
    """
    mapped = {}
    for target, template in columns.items():
        pieces = column_pieces(template)
        names = [name for _, name in pieces if name]
        if names and not any(name in values for name in names):
            found = describe_keys(tuple(values))
            raise DataError(f"row keys: found {found}, expected those in data.columns.{target}={template}")
        if not names and template in values:
            raise DataError(f"data.columns.{target}: found a column name without braces. Set '{{{template}}}'")
        if pieces == [("", names[0] if names else None)]:
            mapped[target] = values.get(names[0])
            continue
        cells = {name: "" if values.get(name) is None else values[name] for name in names}
        for name, value in cells.items():
            if not isinstance(value, str | int | float):
                raise DataError(f"column {name}: found {type(value).__name__}, expected text for data.columns.{target}")
        text = "".join(f"{literal}{cells.get(name, '')}" for literal, name in pieces)
        mapped[target] = text.strip() if "" in cells.values() else text  # no separator without what it separates
    return mapped
