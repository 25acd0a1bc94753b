"""Resolves the names in a recipe's `data` section (file, folder, Hub dataset, toy dataset) and reads their rows."""

import contextlib
import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from sft_recipes.config.schema import Data, DataSource
from sft_recipes.data import hub
from sft_recipes.data.columns import REQUIRED
from sft_recipes.data.toy import toy_dataset
from sft_recipes.runtime.atomic_write import sha256
from sft_recipes.runtime.errors import DataError, UserError
from sft_recipes.runtime.paths import check_links, mount_hint
from sft_recipes.runtime.run_dir import read_json

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
TOY_NAMES = ("toy:train", "toy:validation")
PARTS = ("train", "validation", "retention_eval")  # keys of the section `data` that name sources
_BYTES_PER_CHUNK, _ROWS_PER_CHUNK = 2**20, 1000  # of files with lines, of others


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it, and its location: `file:line`, or `file, row N` for formats without lines.

    `values` is a DataError if the row cannot be parsed but the rows after it can.
    """

    values: Any
    location: str


class RawChunk(NamedTuple):
    """Some consecutive rows of a source, not parsed yet where parsing takes time.

    Attributes:
        rows: yields them, or those at the given locations; can be sent to another process.
        read: fraction of the source up to their end.
    """

    rows: Callable[..., Iterator[RawRow]]
    read: float


@dataclass(frozen=True)
class Source:
    """The files of one dataset name: local ones, or a split of a Hub dataset in the Hub's cache.

    Attributes:
        files: data files, the folder that `Dataset.save_to_disk` wrote, or the folder of a Hub dataset.
        hub_name: name and split of a Hub dataset, `owner/name:split`.
        settings: how the recipe says to read it.
    """

    files: tuple[Path, ...] = ()
    hub_name: str | None = None
    settings: DataSource = field(default_factory=lambda: DataSource(""))

    def identity(self) -> list[Any]:
        """Return what determines its rows: the settings that change what is read, and names and checksums of its files,
        or name and commit of a Hub dataset."""
        settings = {**asdict(self.settings), "path": ""}
        if self.hub_name:
            return [settings, self.hub_name, self.files[0].name]  # the cache names a snapshot by its commit
        files = itertools.chain.from_iterable(sorted(f.iterdir()) if f.is_dir() else [f] for f in self.files)
        return [settings, *((str(file), sha256(file)) for file in files)]  # rows have their location

    @property
    def display_name(self) -> str:
        """The Hub name or the files' paths, for messages."""
        return self.hub_name or ", ".join(str(file) for file in self.files)

    def file_names(self) -> list[str]:
        """Return the files that are read if a folder was named; none for a single file or a Hub dataset."""
        names = [str(file) for file in self.files]
        return [] if names == [self.settings.path] or self.settings.path in TOY_NAMES or self.hub_name else names

    def chunks(self) -> Iterator[RawChunk]:
        """Yield all rows in file order. Memory does not depend on their number, except for a single JSON document.

        Raises:
            DataError: a file is not what its suffix says, with the line.
        """
        for number, file in enumerate(self.files):
            chunks = _read_dataset(file, self.hub_name) if file.is_dir() else _READERS[file.suffix.lower()](file)
            yield from (chunk._replace(read=(number + chunk.read) / len(self.files)) for chunk in chunks)

    def rows(self, locations: Container[str] | None = None) -> Iterator[RawRow]:
        """Yield all rows in file order, or those at the given locations."""
        return itertools.chain.from_iterable(chunk.rows(locations) for chunk in self.chunks())


def resolve_all(data: Data, part: str, toy_folder: Path) -> dict[str, Source]:
    """Return the sources of one of PARTS, each under its own short name.

    Without a validation source, it is the validation or test split of the only training source, if that is a folder.
    No validation source is named `retention_eval`: that is the name of the retention eval set's loss.

    Raises:
        DataError: as `resolve`.
    """
    key, named = f"data.{part}", data.sources(part)
    if part == "validation" and not named and not data.overfit_rows:
        only, *others = data.sources("train")
        splits = _splits_of(_expand(only.path), key) if _expand(only.path).is_dir() and not others else {}
        split = next((name for name in ("validation", "test") if name in splits and "train" in splits), None)
        return {_short_name(only.path): Source(splits[split], settings=replace(only, weight=1.0))} if split else {}
    resolved: dict[str, Source] = {}
    for settings in named:
        short = _short_name(settings.path)
        number = sum(other == short or other.startswith(f"{short}_") for other in resolved)
        number += short == "retention_eval" != part
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
            toy_dataset.write(toy_folder)
        return Source(files=(toy_folder / f"{name.partition(':')[2]}.jsonl",))
    path = _expand(name)
    if path.is_dir():
        return Source(_files_of(path, key))
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{key}: {name}: file type: found {path.suffix or 'none'}, expected {', '.join(SUFFIXES)}")
        return Source((path,))
    folder, _, split = str(path).rpartition(":")
    if folder and Path(folder).is_dir():
        return Source(_files_of(Path(folder), key, split))
    if dataset := hub_name(name):
        split = name.partition(":")[2] or "train"
        return Source((hub.download_dataset(dataset, revision, key),), f"{dataset}:{split}")
    raise DataError(f"{key}: no file or folder {name!r}. Name one, or a Hub dataset (owner/name:split){mount_hint()}")


def _files_of(folder: Path, key: str, split: str | None = None) -> tuple[Path, ...]:
    """Return the files of a folder's split: of `split` if it is named, else of the one that `key` is for."""
    splits = _splits_of(folder, key)
    wanted = (split,) if split else ("train",) if key == "data.train" else ("validation", "test")
    if not split and len(splits) == 1 and key != "data.train":
        wanted += tuple(splits)
    files = next((splits[name] for name in wanted if name in splits), None)
    if files is None:
        found = f"found the splits {', '.join(splits)}, expected {' or '.join(wanted)}"
        raise DataError(f"{key}: folder {folder}: {found}. Name one: {folder}:{next(iter(splits))}")
    return files


def _splits_of(folder: Path, key: str) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split, named by file or subfolder as on the Hub; one split train if none is named.

    Raises:
        DataError: the folder contains code or a broken link, or no data.
    """
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    check_links(folder, key)
    splits = {name: (folder / name,) for name in read_json(folder / "dataset_dict.json").get("splits", [])}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        splits = {"train": (folder,)}
    if code := sorted(folder.rglob("*.py")):
        raise DataError(f"{key}: {folder} contains code ({code[0].name}), which is never run. Remove it")
    with contextlib.suppress(EmptyDatasetError, FileNotFoundError):  # reported below
        for split, patterns in get_data_patterns(str(folder)).items() if not splits else ():
            names = DataFilesList.from_patterns(patterns, base_path=str(folder))
            relative = (os.path.relpath(name, folder.absolute()) for name in names)
            if files := tuple(folder / name for name in relative if Path(name).suffix.lower() in SUFFIXES):
                splits[str(split)] = files
    if not splits:
        raise DataError(f"{key}: folder {folder}: found no data file, expected {', '.join(SUFFIXES)}")
    return splits


def _count_lines(file: Path) -> int:
    """Return the number of lines of a file after checking that it is text."""
    number = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007  the error names it
                line.replace(b"\0", b"\xff").decode()  # a NUL is not text either
    except UnicodeDecodeError as error:
        raise DataError(f"{file}:{number}: encoding: found byte {line[error.start]:#04x}, expected UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: not readable ({error.strerror})") from error
    return number


def type_name(value: Any) -> str:
    """Return JSON's name of a value's type, with its article."""
    names = {"NoneType": "null", "list": "a list", "dict": "an object", "str": "a string", "bool": "a boolean"}
    names |= dict.fromkeys(("int", "float"), "a number")
    return names.get(type(value).__name__, type(value).__name__)


def shorten(value: Any, length: int = 60) -> str:
    """Return a value's escaped text for an error message, at most `length` characters."""
    text = repr(value if not isinstance(value, str) else value[: length + 1])
    return text if len(text) <= length + 2 else f"{text[:length]}…"


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result, or the DataError that it raises."""
    try:
        return function(*arguments)
    except DataError as error:
        return error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
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


def _line_rows(file: Path, first: int, content: bytes, locations: Container[str] | None = None) -> Iterator[RawRow]:
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=first):
        location = f"{file}:{number}"
        if line.strip() and (locations is None or location in locations):
            yield RawRow(attempt(parse_json, line, location), location)


def _read_lines(file: Path, total: int) -> Iterator[RawChunk]:
    first = 1
    with file.open("rb") as opened:
        while lines := opened.readlines(_BYTES_PER_CHUNK if first > 1 else _BYTES_PER_CHUNK // 8):
            rows = partial(_line_rows, file, first, b"".join(lines))
            first += len(lines)
            yield RawChunk(rows, (first - 1) / total)


def _read_json(file: Path) -> Iterator[RawChunk]:
    """Read JSON lines or one JSON document, whichever the content is."""
    total = _count_lines(file)
    with file.open(encoding="utf-8-sig", newline="\n") as opened:
        lines = (line for line in opened if line.strip())
        first, rest = next(lines, "").strip(), next(lines, "")
    is_document = file.suffix.lower() == ".json" or first.startswith("[")
    has_lines = rest and isinstance(attempt(parse_json, first, ""), dict | list)
    if has_lines or not is_document or not first:
        yield from _read_lines(file, total)
        return
    content = parse_json(file.read_text(encoding="utf-8-sig"), str(file))
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        content = lists[0] if len(lists) == 1 and not set(REQUIRED) & content.keys() else [content]
    if not isinstance(content, list):
        raise DataError(f"{file}: found {type_name(content)}, expected a list of rows")
    rows = (RawRow(row, f"{file}, row {number}") for number, row in enumerate(content, start=1))
    yield from _split(rows, len(content))


def _split(rows: Iterator[RawRow], total: int) -> Iterator[RawChunk]:
    """Yield chunks of parsed rows, `total` is about their number."""
    for done in itertools.count(_ROWS_PER_CHUNK, _ROWS_PER_CHUNK):
        if not (chunk := [*itertools.islice(rows, _ROWS_PER_CHUNK)]):
            return
        yield RawChunk(partial(at_locations, chunk), min(done / total, 1.0))


def at_locations(rows: Iterable[RawRow], locations: Container[str] | None = None) -> Iterator[RawRow]:
    """Yield those of the rows that are at the given locations, by default all."""
    return (row for row in rows if locations is None or row.location in locations)


def _check_unique(names: list[str], where: str) -> list[str]:
    if len(set(names)) < len(names):
        raise DataError(f"{where}: found a column twice ({', '.join(names)}). Rename one of them")
    return names


def _csv_rows(file: Path) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)
    names: list[str] = []
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            for values in reader:
                location, line = f"{file}:{line}", reader.line_num + 1  # the first line of a row that spans several
                if values and not names:
                    names = _check_unique(values, f"{location}: header")
                elif len(values) == len(names):
                    yield RawRow(dict(zip(names, values, strict=True)), location)
                elif values:
                    expected = f"expected {len(names)} ({', '.join(names)})"
                    yield RawRow(DataError(f"{location}: columns: found {len(values)}, {expected}"), location)
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not valid CSV: {error}") from error


def _read_parquet(file: Path) -> Iterator[RawChunk]:
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        _check_unique(parquet.schema_arrow.names, f"{file}: schema")
        yield from _split_arrow(parquet.iter_batches(_ROWS_PER_CHUNK), parquet.metadata.num_rows, str(file))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: not valid Parquet: {error}") from error


def _split_arrow(batches: Iterable[Any], rows: int, name: str) -> Iterator[RawChunk]:
    """Yield one chunk per Arrow batch; `rows` is the number of all rows."""
    done = 0
    for batch in filter(len, batches):
        yield RawChunk(partial(_arrow_rows, batch, done + 1, name), (done + len(batch)) / rows)
        done += len(batch)


def _arrow_rows(batch: Any, first: int, name: str, locations: Container[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows of an Arrow batch without the nulls that Arrow writes where rows have different keys."""
    try:
        rows = (
            RawRow(
                {item.name: _from_arrow(row[item.name], item.type) for item in batch.schema}, f"{name}, row {number}"
            )
            for number, row in enumerate(batch.to_pylist(), start=first)
        )
        yield from at_locations(rows, locations)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not valid Parquet: {error}") from error


def _from_arrow(value: Any, kind: Any) -> Any:
    """Return a value without the null fields of its structs, and with its JSON parsed (`datasets.Json`)."""
    if isinstance(kind, pyarrow.JsonType) and value is not None:
        return json.loads(value)
    if isinstance(value, dict):
        fields = (field for field in kind if value[field.name] is not None)
        return {field.name: _from_arrow(value[field.name], field.type) for field in fields}
    if isinstance(value, list) and not pyarrow.types.is_map(kind):
        return [_from_arrow(item, kind.value_type) for item in value]
    return value


def _read_dataset(folder: Path, hub_name: str | None) -> Iterator[RawChunk]:
    """Read a folder that `Dataset.save_to_disk` wrote, or a split of a Hub dataset in the Hub's cache."""
    from datasets import load_dataset, load_dataset_builder, load_from_disk

    name = hub_name or str(folder)
    try:
        files = load_dataset_builder(str(folder)).config.data_files if hub_name else {}
        for file in itertools.chain.from_iterable((files or {}).values()):
            if not Path(os.path.normpath(file)).is_relative_to(folder.resolve()):
                raise DataError(f"data: {name}: its card names {file} of another folder. Set another data.revision")
        split = name.rpartition(":")[2]
        dataset = load_dataset(str(folder), split=split) if hub_name else load_from_disk(str(folder))
        yield from _split_arrow(dataset.with_format("arrow").iter(_ROWS_PER_CHUNK), len(dataset), name)
    except UserError:
        raise
    except Exception as error:  # a dozen types from three libraries: no such split, files that are not data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data: {name}: not readable as a dataset ({reason}). Name an existing split") from error


_READERS: dict[str, Callable[[Path], Iterator[RawChunk]]] = {
    **dict.fromkeys((".jsonl", ".json"), _read_json),
    ".csv": lambda file: _split(_csv_rows(file), _count_lines(file)),
    ".parquet": _read_parquet,
}
