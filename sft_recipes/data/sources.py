"""Resolves the names in a recipe's `data` section (file, folder, Hub dataset, toy dataset) and reads their rows."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import Data, DataSource
from sft_recipes.data import hub
from sft_recipes.data.toy import toy_dataset
from sft_recipes.runtime.errors import DataError, UserError
from sft_recipes.runtime.paths import check_links, mount_hint

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
TOY_NAMES = ("toy:train", "toy:validation")


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it, and its location: `file:line`, or `file, row N` for formats without lines.

    `values` is a DataError if the row cannot be parsed but the rows after it can.
    """

    values: Any
    location: str


@dataclass(frozen=True)
class Source:
    """The files of one dataset name: local ones, or a split of a Hub dataset in the Hub's cache.

    Attributes:
        files: data files, or the folder that `Dataset.save_to_disk` wrote.
        settings: how the recipe says to read it.
    """

    files: tuple[Path, ...] = ()
    hub_name: str | None = None
    hub_split: str = "train"
    hub_folder: Path | None = None
    settings: DataSource = field(default_factory=lambda: DataSource(""))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files' contents, or of name, split and commit of a Hub dataset, and of the settings
        that change what is read."""
        digest = hashlib.sha256()
        digest.update(json.dumps({**asdict(self.settings), "path": ""}, sort_keys=True).encode())
        for file in itertools.chain.from_iterable(sorted(f.iterdir()) if f.is_dir() else [f] for f in self.files):
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

    def file_names(self) -> list[str]:
        """Return the files that are read if a folder was named; none for a single file or a Hub dataset."""
        names = [str(file) for file in self.files]
        return [] if names == [self.settings.path] or self.settings.path in TOY_NAMES else names

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows in file order.

        Raises:
            DataError: a file is not what its suffix says, with the line.
        """
        if self.hub_folder is not None:
            yield from _dataset_rows(self.hub_folder, self.hub_name or "", self.hub_split)
        for file in self.files:
            yield from _dataset_rows(file, "", "") if file.is_dir() else _READERS[file.suffix.lower()](file)


def resolve_all(data: Data, key: str, toy_folder: Path) -> dict[str, Source]:
    """Return the sources of `data.train`, `data.validation` or `data.retention_eval`, each under its own short name.

    Without a validation source, it is the validation or test split of the only training source, if that is a folder.
    No validation source is named `retention_eval`: that is the name of the retention eval set's loss.

    Raises:
        DataError: as `resolve`, or a source is named twice.
    """
    parts = {"data.train": data.training, "data.validation": data.held_out, "data.retention_eval": data.retention}
    named = parts[key]
    if key == "data.validation" and not named and len(data.training) == 1:
        only = data.training[0]
        splits = _splits_of(_expand(only.path), key) if _expand(only.path).is_dir() else {}
        split = next((name for name in ("validation", "test") if name in splits and "train" in splits), None)
        return {_short_name(only.path): Source(splits[split], settings=replace(only, weight=1.0))} if split else {}
    resolved: dict[str, Source] = {}
    for settings in named:
        count = sum(other.path == settings.path for other in named)
        if count > 1:
            raise DataError(f"{key}: {settings.path}: found {count} times, expected once. Remove the duplicate")
        short = _short_name(settings.path)
        number = sum(other == short or other.startswith(f"{short}_") for other in resolved)
        number += short == "retention_eval" and key != "data.retention_eval"
        source = resolve(settings.path, key, toy_folder, data.revision_of(settings.path))
        resolved[f"{short}_{number + 1}" if number else short] = replace(source, settings=settings)
    return resolved


def _short_name(name: str) -> str:
    """Return a source's name for reports and metrics: letters, digits and _ of its file, folder or dataset name."""
    path = Path(name.partition(":")[0] if hub_name(name) or name in TOY_NAMES else name)
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return re.sub(r"\W+", "_", stem).strip("_") or "data"


def _expand(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for an unknown user


def hub_name(name: str) -> str | None:
    """Return the Hub dataset that a name refers to, without its split; None for local names."""
    path = _expand(name)
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
    path = _expand(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # the name is too long, or a parent folder may not be entered
        raise DataError(f"{key}: {shorten(name)}: not accessible ({error.strerror})") from error
    folder, _, split = str(path).rpartition(":")
    if is_folder or (folder and Path(folder).is_dir() and not is_file):
        return Source(_files_of(path, key) if is_folder else _files_of(Path(folder), key, split))
    if is_file and path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{key}: {name}: file type: found {path.suffix or 'none'}, expected {', '.join(SUFFIXES)}")
    if is_file:
        return Source((path,))
    if dataset := hub_name(name):
        return Source((), dataset, name.partition(":")[2] or "train", hub.download_dataset(dataset, revision, key))
    raise DataError(
        f"{key}: no file or folder {name!r}. Name a file, a folder or a Hub dataset (owner/name or owner/name:split)"
        f"{mount_hint()}"
    )


def _files_of(folder: Path, key: str, split: str | None = None) -> tuple[Path, ...]:
    """Return the files of a folder's split: of `split` if it is named, else of the one that `key` is for."""
    splits = _splits_of(folder, key)
    wanted = (split,) if split else ("train",) if key == "data.train" else ("validation", "test")
    files = next((splits[name] for name in wanted if name in splits), None)
    if files is None and not split and len(splits) == 1 and key != "data.train":
        files = next(iter(splits.values()))
    if files is None:
        found = ", ".join(splits)
        raise DataError(
            f"{key}: folder {folder}: found the splits {found}, expected {' or '.join(wanted)}. Name one: "
            f"{folder}:{next(iter(splits))}"
        )
    return files


def _splits_of(folder: Path, key: str) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split, named by file or subfolder as on the Hub; one split train if none is named.

    Raises:
        DataError: the folder contains code or a broken link, or no data.
    """
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    check_links(folder, key)
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        return {name: (folder / name,) for name in names}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"train": (folder,)}
    code = sorted(folder.rglob("*.py"))
    if code:
        raise DataError(
            f"{key}: {folder} contains code ({code[0].name}), which is never run. Remove it, or name the data files"
        )
    splits = {}
    with contextlib.suppress(EmptyDatasetError, FileNotFoundError):  # reported below
        for split, patterns in get_data_patterns(str(folder)).items():
            names = DataFilesList.from_patterns(patterns, base_path=str(folder))
            relative = (os.path.relpath(name, folder.absolute()) for name in names)
            if files := tuple(folder / name for name in relative if Path(name).suffix.lower() in SUFFIXES):
                splits[str(split)] = files
    if not splits:
        raise DataError(f"{key}: folder {folder}: found no data file, expected {', '.join(SUFFIXES)}")
    return splits


def _read_text(file: Path) -> str:
    def line_at(position: int) -> int:
        return content.count(b"\n", 0, position) + 1

    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: not readable ({error.strerror})") from error
    if b"\x00" in content:
        line = line_at(content.index(0))
        raise DataError(f"{file}:{line}: found a NUL byte, expected UTF-8 text. Save it as UTF-8, or replace it")
    try:
        return content.decode("utf-8-sig")  # a byte-order mark is not part of the text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}:{line_at(error.start)}: encoding: found byte {content[error.start]:#04x}, expected UTF-8. Save "
            f"the file as UTF-8"
        ) from error


def type_name(value: Any) -> str:
    """Return JSON's name of a value's type, with its article."""
    names = {"NoneType": "null", "list": "a list", "dict": "an object", "str": "a string", "bool": "a boolean"}
    names |= dict.fromkeys(("int", "float"), "a number")
    return names.get(type(value).__name__, type(value).__name__)


def shorten(value: Any, length: int = 60) -> str:
    """Return a value's escaped text for an error message, at most `length` characters."""
    try:
        text = repr(value if not isinstance(value, str) else value[: length + 1])
    except RecursionError:
        return "…"
    return text if len(text) <= length + 2 else f"{text[:length]}…"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"key {shorten(twice)}: found twice in one object, expected once. Remove one of them")
    return values


def parse_json(text: str, location: str) -> Any:
    """Parse JSON whose keys are unique.

    Raises:
        DataError: the text is not valid JSON, or a key is repeated; names `location`.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except DataError as error:
        raise DataError(f"{location}: {error}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a plain ValueError
        raise DataError(f"{location}: not valid JSON: {error}") from error


def _line_rows(file: Path, text: str) -> Iterator[RawRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            location = f"{file}:{number}"
            try:
                values = parse_json(line, location)
            except DataError as error:
                values = error
            yield RawRow(values, location)


# Keys of a row whose value may be a list of objects without being a list of rows.
_ROW_KEYS = {"messages", "conversations", "conversation", "prompt", "instruction", "question"}


def _json_rows(file: Path) -> Iterator[RawRow]:
    """Read JSON lines or one JSON document, whichever the content is."""
    text = _read_text(file)
    first, _, rest = text.strip().partition("\n")
    is_document = file.suffix.lower() == ".json" or first.startswith("[")
    try:
        has_lines = isinstance(json.loads(first), dict | list) and bool(rest)
    except (ValueError, RecursionError):
        has_lines = False
    if has_lines or not is_document:
        yield from _line_rows(file, text)
        return
    if not first:
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
                expected = f"expected {len(names)} ({', '.join(names)})"
                yield RawRow(DataError(f"{location}: columns: found {len(values)}, {expected}"), location)
            elif names:
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
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(f"{file}: schema: found a column twice ({', '.join(names)}). Rename one of them")
        yield from _arrow_rows(parquet.iter_batches(), str(file))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: not valid Parquet: {error}") from error


def _arrow_rows(batches: Any, name: str) -> Iterator[RawRow]:
    """Yield the rows of Arrow batches without the nulls that Arrow writes where rows have different keys."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield RawRow({field.name: _from_arrow(row[field.name], field.type) for field in batch.schema},
                         f"{name}, row {number}")  # fmt: skip


def _from_arrow(value: Any, kind: Any) -> Any:
    """Return a value without the null fields of its structs, and with its JSON parsed (`datasets.Json`)."""
    import pyarrow

    if value is None or not pyarrow.types.is_nested(kind):
        if isinstance(kind, pyarrow.JsonType) and isinstance(value, str):
            return json.loads(value)
        return value
    if pyarrow.types.is_struct(kind):
        return {
            field.name: _from_arrow(value[field.name], field.type) for field in kind if value[field.name] is not None
        }
    if isinstance(value, list) and not pyarrow.types.is_map(kind):
        return [_from_arrow(item, kind.value_type) for item in value]
    return value


def _dataset_rows(folder: Path, hub_name: str, split: str) -> Iterator[RawRow]:
    """Read a folder that `Dataset.save_to_disk` wrote, or a split of a Hub dataset in the Hub's cache."""
    from datasets import load_dataset, load_dataset_builder, load_from_disk

    name = f"{hub_name}:{split}" if hub_name else str(folder)
    try:
        if hub_name:
            data_files = load_dataset_builder(str(folder)).config.data_files or {}
            for file in itertools.chain.from_iterable(data_files.values()):
                if not Path(os.path.normpath(file)).is_relative_to(folder.resolve()):
                    raise DataError(
                        f"data: {hub_name}: its dataset card names {file}, which is not a file of this dataset. Set "
                        f"another data.revision, or download the files and name their folder"
                    )
        dataset = load_dataset(str(folder), split=split) if hub_name else load_from_disk(str(folder))
        yield from _arrow_rows(dataset.with_format("arrow").iter(1000), name)
    except UserError:
        raise
    except Exception as error:  # a dozen types from three libraries: no such split, files that are not data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "Name an existing split, as owner/name:split" if hub_name else "Save it again"
        raise DataError(f"data: {name}: not readable as a dataset ({reason}). {fix}") from error


_READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
