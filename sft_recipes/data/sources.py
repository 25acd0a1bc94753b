"""Resolves the names in a recipe's `data` section (file, folder, Hub dataset, toy dataset) and reads their rows."""

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
TOY_NAMES = ("toy:train", "toy:validation")


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it, and its location: `file:line`, or `file, row N` for formats without lines."""

    values: Any
    location: str


@dataclass(frozen=True)
class Source:
    """The files of one dataset name: local ones, or a split of a Hub dataset in the Hub's cache."""

    files: tuple[Path, ...] = ()
    hub_name: str | None = None
    hub_split: str = "train"
    hub_folder: Path | None = None

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files' contents, or of name, split and commit of a Hub dataset."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file))  # rows have their location
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        commit = self.hub_folder.name if self.hub_folder else None  # the cache names a snapshot by its commit
        digest.update(f"{self.hub_name}:{self.hub_split}:{commit}".encode())
        return digest.hexdigest()

    @property
    def display_name(self) -> str:
        """The Hub name or the files' paths, for messages."""
        return self.hub_name or ", ".join(str(file) for file in self.files)

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows in file order.

        Raises:
            DataError: a file is not what its suffix says, with the line.
        """
        if self.hub_name is not None and self.hub_folder is not None:
            yield from _hub_rows(self.hub_name, self.hub_split, self.hub_folder)
        for file in self.files:
            yield from _READERS[file.suffix.lower()](file)


def resolve_all(data: Data, key: str, toy_folder: Path) -> dict[str, Source]:
    """Return the sources of `data.train`, `data.validation` or `data.retention_eval`, each under its own short name.

    No validation source is named `retention_eval`: that is the name of the retention eval set's loss.

    Raises:
        DataError: as `resolve`, or a source is named twice.
    """
    sources: dict[str, Source] = {}
    retention = [data.retention_eval] if data.retention_eval else []
    names = {"data.train": data.training, "data.validation": data.held_out, "data.retention_eval": retention}[key]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{key}: {name}: found {names.count(name)} times, expected once. Remove the duplicate")
        short = _short_name(name)
        number = sum(other == short or other.startswith(f"{short}_") for other in sources)
        number += short == "retention_eval" and key != "data.retention_eval"
        source = resolve(name, key, toy_folder, data.revision_of(name))
        sources[f"{short}_{number + 1}" if number else short] = source
    return sources


def _short_name(name: str) -> str:
    """Return a source's name for reports and metrics: letters, digits and _ of its file, folder or dataset name."""
    path = Path(name.partition(":")[0] if hub_name(name) or name in TOY_NAMES else name)
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return re.sub(r"\W+", "_", stem).strip("_") or "data"


def hub_name(name: str) -> str | None:
    """Return the Hub dataset that a name refers to, without its split; None for local names."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for an unknown user
    if name in TOY_NAMES or path.exists() or path.suffix.lower() in SUFFIXES or path.parent.is_dir():
        return None
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?", name)
    return match[1] if match else None


def resolve(name: str, key: str, toy_folder: Path, revision: str | None = None) -> Source:
    """Return the source of a name; a Hub dataset is downloaded at `revision`.

    Raises:
        DataError: no such file, folder or dataset, an unsupported file type, or a folder with code or without data.
    """
    if name in TOY_NAMES:
        if not (toy_folder / "train.jsonl").is_file():
            toy_folder.mkdir(parents=True, exist_ok=True)
            toy_dataset.write(toy_folder)
        return Source(files=(toy_folder / f"{name.partition(':')[2]}.jsonl",))
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for an unknown user
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # the name is too long, or a parent folder may not be entered
        raise DataError(f"{key}: {shorten(name)}: not accessible ({error.strerror})") from error
    if is_folder:
        return Source(files=_files_of(path, key))
    if is_file:
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{key}: {name}: file type: found {path.suffix or 'none'}, expected {', '.join(SUFFIXES)}")
        return Source(files=(path,))
    dataset = hub_name(name)
    if dataset:
        return Source(
            hub_name=dataset,
            hub_split=name.partition(":")[2] or "train",
            hub_folder=hub.download_dataset(dataset, revision, key),
        )
    raise DataError(
        f"{key}: no file or folder {name!r}. Name a file, a folder or a Hub dataset (owner/name or owner/name:split)"
    )


def _files_of(folder: Path, key: str) -> tuple[Path, ...]:
    code = sorted(folder.rglob("*.py"))
    if code:
        raise DataError(
            f"{key}: {folder} contains code ({code[0].name}), which is never run. Remove it, or name the data files"
        )
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES))
    if not files:
        raise DataError(f"{key}: folder {folder}: found no data file, expected {', '.join(SUFFIXES)}")
    return files


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: not readable ({error.strerror})") from error
    if content.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{file}:1: found a byte-order mark, expected none. Save the file as UTF-8 without it")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}:1: encoding: found UTF-16, expected UTF-8. Save the file as UTF-8 without BOM")
    if b"\x00" in content:
        raise DataError(
            f"{file}:{_line_at(content, content.index(0))}: found a NUL byte, expected text. The file is truncated or "
            f"binary: replace it"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = _line_at(content, error.start), content[error.start]
        raise DataError(
            f"{file}:{line}: encoding: found byte {byte:#04x}, expected UTF-8. Save the file as UTF-8"
        ) from error


def _line_at(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def type_name(value: Any) -> str:
    """Return JSON's name of a value's type, with its article."""
    names = {
        "NoneType": "null",
        "list": "a list",
        "dict": "an object",
        "str": "a string",
        "int": "a number",
        "float": "a number",
        "bool": "a boolean",
    }
    return names.get(type(value).__name__, type(value).__name__)


def shorten(value: Any, length: int = 60) -> str:
    """Return a value's escaped text for an error message, at most `length` characters."""
    try:
        text = repr(value if not isinstance(value, str) else value[: length + 1])
    except RecursionError:
        return "…"
    return text if len(text) <= length + 2 else f"{text[:length]}…"


class _DuplicateKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return values


def parse_json(text: str, location: str) -> Any:
    """Parse JSON whose keys are unique.

    Raises:
        DataError: the text is not valid JSON, or a key is repeated; names `location`.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except _DuplicateKeyError as error:
        raise DataError(
            f"{location}: key {shorten(str(error))}: found twice in one object, expected once. Remove one of them"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a plain ValueError
        raise DataError(f"{location}: not valid JSON: {error}") from error


def _jsonl_rows(file: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if line.strip():
            location = f"{file}:{number}"
            yield RawRow(parse_json(line, location), location)


# Keys of a row whose value may be a list of objects without being a list of rows.
_ROW_KEYS = {"messages", "conversations", "conversation", "prompt", "instruction", "question"}


def _json_rows(file: Path) -> Iterator[RawRow]:
    text = _read_text(file)
    if not text.strip():
        return
    content = parse_json(text, str(file))
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        content = lists[0] if len(lists) == 1 and not _ROW_KEYS & content.keys() else [content]
    if not isinstance(content, list):
        raise DataError(f"{file}: found {type_name(content)}, expected a list of rows")
    for number, row in enumerate(content, start=1):
        yield RawRow(row, f"{file}, row {number}")


def _csv_rows(file: Path) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    names: list[str] = []
    line = 1
    try:
        for values in reader:
            location = f"{file}:{line}"  # the first line of a row that spans several
            line = reader.line_num + 1
            if not values:
                continue
            if names and len(values) != len(names):
                raise DataError(f"{location}: columns: found {len(values)}, expected {len(names)} ({', '.join(names)})")
            if names:
                yield RawRow(dict(zip(names, values, strict=True)), location)
            elif len(set(values)) < len(values):
                raise DataError(f"{location}: header: found a column twice ({', '.join(values)}). Rename one of them")
            else:
                names = values
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not valid CSV: {error}") from error


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(f"{file}: schema: found a column twice ({', '.join(names)}). Rename one of them")
        for group in parquet.iter_batches():
            for row in group.to_pylist():
                number += 1
                yield RawRow(row, f"{file}, row {number}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: not valid Parquet: {error}") from error


def _hub_rows(name: str, split: str, folder: Path) -> Iterator[RawRow]:
    from datasets import load_dataset, load_dataset_builder

    try:
        data_files = load_dataset_builder(str(folder)).config.data_files or {}
        dataset_folder = folder.resolve()
        for file in (file for files in data_files.values() for file in files):
            if not Path(os.path.normpath(file)).is_relative_to(dataset_folder):
                raise DataError(
                    f"data: {name}: its dataset card names {file}, which is not a file of this dataset. Set another "
                    f"data.revision, or download the files and name their folder"
                )
        for number, row in enumerate(load_dataset(str(folder), split=split), start=1):
            yield RawRow(row, f"{name}:{split}, row {number}")
    except UserError:
        raise
    except Exception as error:  # a dozen types from three libraries: no such split, files that are not data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data: {name}:{split}: not readable ({reason}). Name an existing split, as owner/name:split"
        ) from error


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
