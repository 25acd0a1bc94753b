"""Turns what `data` names (a file, a folder, a Hub name, the embedded set) into rows that know their place."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import Data
from sft_recipes.data import hub
from sft_recipes.data.toy import toy_dataset
from sft_recipes.runtime.errors import DataError, UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
EMBEDDED = ("toy:train", "toy:validation")


@dataclass(frozen=True)
class RawRow:
    """A row as its source wrote it, and where it stands: `file:line`, or `file, row N` where there are no lines."""

    values: Any
    where: str


@dataclass(frozen=True)
class Source:
    """What one name in a recipe stands for: local files, or a split of a data set whose files the Hub's cache holds."""

    files: tuple[Path, ...] = ()
    hub_name: str | None = None
    hub_split: str = "train"
    hub_folder: Path | None = None

    def fingerprint(self) -> str:
        """SHA-256 over the files' contents; over name and commit where the rows come from the Hub."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file))  # rows say where they stand
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        commit = self.hub_folder.name if self.hub_folder else None  # the cache names a snapshot by its commit
        digest.update(f"{self.hub_name}:{self.hub_split}:{commit}".encode())
        return digest.hexdigest()

    @property
    def named(self) -> str:
        """What a user knows it by."""
        return self.hub_name or ", ".join(str(file) for file in self.files)

    def rows(self) -> Iterator[RawRow]:
        """All rows in the order in which they are written.

        Raises:
            DataError: a file cannot be read as what its name says, with the line.
        """
        if self.hub_name is not None and self.hub_folder is not None:
            yield from _hub_rows(self.hub_name, self.hub_split, self.hub_folder)
        for file in self.files:
            yield from _READERS[file.suffix.lower()](file)


def resolve_all(data: Data, key: str, embedded_folder: Path) -> dict[str, Source]:
    """The sources that `data.train`, `data.validation` or `data.retention_eval` names, each under its own short name.

    No other source is called `retain`, since the loss of the rows to retain is.

    Raises:
        DataError: as `resolve`, or a source is named twice.
    """
    found: dict[str, Source] = {}
    retained = [data.retention_eval] if data.retention_eval else []
    named = {"data.train": data.training, "data.validation": data.held_out, "data.retention_eval": retained}[key]
    for name in named:
        if named.count(name) > 1:
            raise DataError(f"{key}: {name} is named twice; its rows would count double")
        short = _short(name)
        number = sum(one == short or one.startswith(f"{short}_") for one in found)
        number += short == "retention_eval" and key != "data.retention_eval"
        source = resolve(name, key, embedded_folder, data.revision_of(name))
        found[f"{short}_{number + 1}" if number else short] = source
    return found


def _short(name: str) -> str:
    """What reports and metrics call a source: letters, digits and _ of its file's, folder's or data set's name."""
    path = Path(name.partition(":")[0] if hub_name(name) or name in EMBEDDED else name)
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return re.sub(r"\W+", "_", stem).strip("_") or "data"


def hub_name(name: str) -> str | None:
    """The data set on the Hub that a name stands for, without its split; None for what is local."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for a user that is not there
    if name in EMBEDDED or path.exists() or path.suffix.lower() in SUFFIXES or path.parent.is_dir():
        return None
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?", name)
    return found[1] if found else None


def resolve(name: str, key: str, embedded_folder: Path, revision: str | None = None) -> Source:
    """The source that a name stands for; what lies on the Hub is brought, at `revision`.

    Raises:
        DataError: no such file, folder or data set, a kind of file that is not read, or a folder with code or without
            data.
    """
    if name in EMBEDDED:
        if not (embedded_folder / "train.jsonl").is_file():
            embedded_folder.mkdir(parents=True, exist_ok=True)
            toy_dataset.write(embedded_folder)
        return Source(files=(embedded_folder / f"{name.partition(':')[2]}.jsonl",))
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for a user that is not there
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name too long, a folder above it that may not be entered
        raise DataError(f"{key}: {shown(name)} cannot be looked at ({error.strerror})") from error
    if is_folder:
        return Source(files=_files_of(path, key))
    if is_file:
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{key}: {name} is a {path.suffix or 'nameless'} file; wanted {', '.join(SUFFIXES)}")
        return Source(files=(path,))
    found = hub_name(name)
    if found:
        return Source(
            hub_name=found,
            hub_split=name.partition(":")[2] or "train",
            hub_folder=hub.dataset(found, revision, key),
        )
    raise DataError(
        f"{key}: no file or folder {name!r} (a data set on the Hub is named owner/name or owner/name:split)"
    )


def _files_of(folder: Path, key: str) -> tuple[Path, ...]:
    code = sorted(folder.rglob("*.py"))
    if code:
        raise DataError(
            f"{key}: {folder} holds code ({code[0].name}), which is never run; remove it, or name the data files"
        )
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES))
    if not files:
        raise DataError(f"{key}: folder {folder} holds no data file ({', '.join(SUFFIXES)})")
    return files


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    if content.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{file}:1: begins with a byte-order mark; save the file as UTF-8 without one")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}:1: begins with a byte-order mark of UTF-16; save the file as UTF-8 without one")
    if b"\x00" in content:
        raise DataError(f"{file}:{_line(content, content.index(0))}: a NUL byte; the file is cut short, or is no text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}:{_line(content, error.start)}: not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from error


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def kind(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {
        "NoneType": "null",
        "list": "list",
        "dict": "object",
        "str": "text",
        "int": "number",
        "float": "number",
        "bool": "boolean",
    }
    return names.get(type(value).__name__, type(value).__name__)


def shown(value: Any, length: int = 60) -> str:
    """A value as an error shows it: escaped, and cut where it is long."""
    try:
        text = repr(value if not isinstance(value, str) else value[: length + 1])
    except RecursionError:
        return "…"
    return text if len(text) <= length + 2 else f"{text[:length]}…"


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return found


def parse(text: str, where: str) -> Any:
    """JSON in which no key stands twice.

    Raises:
        DataError: it is none, or a key does; names `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _DuplicateKeyError as error:
        raise DataError(f"{where}: key {shown(str(error))} is written twice in one row; which is meant?") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise DataError(f"{where}: not JSON: {error}") from error


def _json_lines(file: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if line.strip():
            where = f"{file}:{number}"
            yield RawRow(parse(line, where), where)


# Keys of a row that may hold a list of turns, which is no list of rows.
_OF_A_ROW = {"messages", "conversations", "conversation", "prompt", "instruction", "question"}


def _json_file(file: Path) -> Iterator[RawRow]:
    text = _text(file)
    if not text.strip():
        return
    content = parse(text, str(file))
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        content = lists[0] if len(lists) == 1 and not _OF_A_ROW & content.keys() else [content]
    if not isinstance(content, list):
        raise DataError(f"{file}: holds a {kind(content)}; wanted a list of rows")
    for number, row in enumerate(content, start=1):
        yield RawRow(row, f"{file}, row {number}")


def _csv_file(file: Path) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    names: list[str] = []
    line = 1
    try:
        for values in reader:
            where = f"{file}:{line}"  # a row may go over several lines; it stands where it begins
            line = reader.line_num + 1
            if not values:
                continue
            if names and len(values) != len(names):
                raise DataError(f"{where}: has another number of columns than the header ({', '.join(names)})")
            if names:
                yield RawRow(dict(zip(names, values, strict=True)), where)
            elif len(set(values)) < len(values):
                raise DataError(f"{where}: a column is named twice in the header ({', '.join(values)})")
            else:
                names = values
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not CSV: {error}") from error


def _parquet_file(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(f"{file}: a column is named twice ({', '.join(names)})")
        for group in parquet.iter_batches():
            for row in group.to_pylist():
                number += 1
                yield RawRow(row, f"{file}, row {number}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: not Parquet: {error}") from error


def _hub_rows(name: str, split: str, folder: Path) -> Iterator[RawRow]:
    from datasets import load_dataset, load_dataset_builder

    try:
        named = load_dataset_builder(str(folder)).config.data_files or {}
        inside = folder.resolve()
        for file in (file for files in named.values() for file in files):
            if not Path(os.path.normpath(file)).is_relative_to(inside):
                raise DataError(
                    f"data: {name}'s card names {file}, which is no file of that data set and is not read; take "
                    f"another revision, or bring its files and name the folder"
                )
        for number, row in enumerate(load_dataset(str(folder), split=split), start=1):
            yield RawRow(row, f"{name}:{split}, row {number}")
    except UserError:
        raise
    except Exception as error:  # a dozen kinds from three libraries: no such split, files that are no data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data: {name}:{split} cannot be read ({reason}); name a split that it has, owner/name:split"
        ) from error


_READERS = {".jsonl": _json_lines, ".json": _json_file, ".csv": _csv_file, ".parquet": _parquet_file}
