"""Counts what prepared rows contain, and rejects them before a GPU is used if they break the recipe's limits.

Each row's loss mask (every assistant turn with its end of turn, and nothing else) is checked when the row is rendered
(sft_recipes.data.assistant_spans, sft_recipes.data.tokenize). This module checks what only all rows together show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from sft_recipes.data.assistant_spans import DIFFERS
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import DataError

PERCENTILES = (50, 90, 99, 100)
_FILES_SHOWN = 8
_NOTED = {
    "duplicates": "are duplicates of an earlier row",
    "special_tokens_as_text": "contain special tokens as text, encoded as text",
    "dropped_reasoning": "lose the reasoning of earlier turns, as at inference",
}

Sources = Mapping[str, pyarrow.Table]  # of `tokenize_rows.SCHEMA`, by the source's short name


def source_stats(name: str, rows: pyarrow.Table) -> dict[str, Any]:
    """Return statistics of a source's rows. Tokens are those of the examples, before packing.

    `examples` have a token in the loss. The turns of `untrained` rows are all context; they are not used. `dropped` are
    the others without a token in the loss: `max_length` cuts it off. `truncated` rows are longer; they lost tokens, and
    `lost_answers` of them an answer together with its question.
    """
    column = {key: rows[key].to_numpy() for key in rows.column_names if pyarrow.types.is_primitive(rows[key].type)}
    usable, untrained = column["supervised_tokens"] > 0, column["full_supervised_tokens"] == 0
    percentiles = numpy.percentile(column["full_length"], PERCENTILES) if len(rows) else [0] * len(PERCENTILES)
    counts = {
        "rows_read": len(rows),
        "examples": usable.sum(),
        "untrained": untrained.sum(),
        "dropped": (~usable & ~untrained).sum(),
        "truncated": (column["full_length"] > column["length"]).sum(),
        "lost_answers": (column["lost_answers"] & usable).sum(),
        "lost_tokens": (column["full_length"] - column["length"]).sum(),
        "lost_supervised_tokens": (column["full_supervised_tokens"] - column["supervised_tokens"]).sum(),
        "tokens": column["length"][usable].sum(),
        "supervised_tokens": column["supervised_tokens"].sum(),
        "duplicates": len(rows) - len(numpy.unique(column["row_digest"])),
        **{key: column[key].sum() for key in ("special_tokens_as_text", "dropped_reasoning")},
    }
    lengths = {str(percentile): int(value) for percentile, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"name": name, **{key: int(count) for key, count in counts.items()}, "length_percentiles": lengths}


def summarize(training: Sources, validation: Sources, retention_eval: Sources) -> dict[str, Any]:
    """Return the part of `details.json` that depends on the rows alone, per source and in total.

    `retention_eval` is in it only if the recipe names such rows; no total includes them.
    """
    parts = {"train": training, "validation": validation}
    stats = {part: [source_stats(name, rows) for name, rows in sources.items()] for part, sources in parts.items()}
    retention = [source_stats(name, rows) for name, rows in retention_eval.items()]
    every_row = pyarrow.concat_tables([*training.values(), *validation.values()])
    notes = Counter(note for note in every_row["note"].to_pylist() if note)
    stop_ids = pyarrow.compute.unique(pyarrow.compute.list_flatten(every_row["stop_ids"])).to_pylist()
    return {
        **{part: _total(sources) for part, sources in stats.items()},
        **({"retention_eval": retention[0]} if retention else {}),
        "sources": stats,
        "first_dropped": {part: [_first_dropped(rows) for rows in sources.values()] for part, sources in parts.items()},
        "overlap": _overlap(training, validation),
        "template_notes": dict(notes),
        "mismatched_rows": sum(count for note, count in notes.items() if DIFFERS in note),
        "end_of_turn_ids": sorted(stop_ids),
        "span_sources": ", ".join(sorted(every_row["span_source"].unique().to_pylist())),
    }


def _total(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for source in stats:
        total.update({key: count for key, count in source.items() if isinstance(count, int)})
    return dict(total)


def _first_dropped(rows: pyarrow.Table) -> str | None:
    """Return the location of the first row without a token in the loss."""
    left, full = (rows[key].to_numpy() for key in ("supervised_tokens", "full_supervised_tokens"))
    dropped = numpy.flatnonzero((left == 0) & (full > 0))
    return rows["location"][int(dropped[0])].as_py() if len(dropped) else None


def _overlap(training: Sources, validation: Sources) -> dict[str, Any]:
    """Count the validation rows that are also in training, up to white space, and locate the first of them in both."""
    train_digests, digests = _digests(training), _digests(validation)
    shared = numpy.isin(digests, train_digests)
    overlap = {"rows": int(shared.sum()), "of": len(digests), "location": None, "train_location": None}
    if shared.any():
        row = int(numpy.flatnonzero(shared)[0])
        overlap["location"] = _location(validation, row)
        overlap["train_location"] = _location(training, int(numpy.flatnonzero(train_digests == digests[row])[0]))
    return overlap


def _location(sources: Sources, row: int) -> str:
    return str(pyarrow.concat_tables(sources.values())["location"][row])


def _digests(sources: Sources) -> numpy.ndarray:
    """Return the row digests of all sources."""
    digests = (rows["row_digest"].to_numpy() for rows in sources.values())
    return numpy.concatenate([numpy.zeros(0, numpy.uint64), *digests])


def check_limits(plan: Plan, details: Mapping[str, Any]) -> None:
    """Check prepared rows against the recipe's limits.

    Args:
        details: of the prepared rows (`details.json`).

    Raises:
        DataError: too many dropped rows, too much train/eval overlap, an empty retention eval set, or new tokens for a
            method that does not train embeddings.
    """
    data = plan.sections.data
    for part in ("train", "validation"):
        for source, first in zip(details["sources"][part], details["first_dropped"][part], strict=True):
            if source["dropped"] > data.max_dropped_fraction * source["rows_read"]:
                raise DataError(
                    f"data.{part}: dropped rows (no token in the loss): found {source['dropped']} of "
                    f"{source['rows_read']} (first: {first}), expected at most "
                    f"data.max_dropped_fraction={data.max_dropped_fraction:g}. Increase "
                    f"trainer.max_length={plan.max_length}"
                )
        if not details[part].get("examples"):
            raise DataError(f"data.{part}: found no row with an assistant turn in the loss, expected at least one")
    retention = details.get("retention_eval")
    if retention and not retention["examples"]:
        raise DataError(
            f"data.retention_eval: dropped rows (no token in the loss): found all of {retention['rows_read']}. "
            f"Increase trainer.max_length={plan.max_length}, or name other rows"
        )
    overlap = details["overlap"]
    if not data.overfit_rows and overlap["rows"] > data.max_overlap * overlap["of"]:
        share = math.ceil(1000 * overlap["rows"] / overlap["of"]) / 1000
        raise DataError(
            f"{overlap['location']}: train/eval overlap: found {overlap['rows']} of {overlap['of']} validation rows in "
            f"training too (first: {overlap['train_location']}). Remove them, or set data.max_overlap={share:g}"
        )
    if details["new_tokens"] and plan.method != "full":
        raise DataError(
            f"model: found new tokens {', '.join(details['new_tokens'])}, but {plan.method} does not train embeddings. "
            f"Use a tokenizer that has them and a free padding token, or full fine-tuning"
        )


def report_lines(details: Mapping[str, Any]) -> list[str]:
    """Return the report on prepared rows (`details.json`), one `label  value` per line."""
    lines = []
    for part in ("train", "validation"):
        for source in details["sources"][part]:
            percentiles = source["length_percentiles"].items()
            lengths = ", ".join(f"{value:,} ({'max' if p == '100' else f'p{p}'})" for p, value in percentiles)
            lines += [(part, _describe_rows(source)), ("", f"tokens per row: {lengths}")]
    if retention := details.get("retention_eval"):
        lines.append(("retention_eval", _describe_rows(retention)))
    overlap = details["overlap"]
    first = f" (first: {overlap['location']} and {overlap['train_location']})" if overlap["rows"] else ""
    lines += [("read", line) for line in reading_lines(details)]
    lines.append(("train/eval overlap", f"{overlap['rows']:,} of {overlap['of']:,} validation rows{first}"))
    lines.append(("loss mask", f"assistant turns including {', '.join(details['end_of_turn'])}"))
    lines.append(("padding token", details["padding_token"]))
    if not details["mismatched_rows"]:
        lines.append(("template", f"rendered as at inference (spans: {details['span_sources']})"))
    return [format_line(label, value) for label, value in lines]


def reading_lines(details: Mapping[str, Any]) -> list[str]:
    """Return what a user should know of the rows: columns, conventions, rejected and truncated rows, notes."""
    lines = []
    for part, sources in details["reading"].items():
        for name, reading in sources.items():
            label = f"{part}: {name}"
            if files := reading["files"]:
                more = f" and {len(files) - _FILES_SHOWN} more" if len(files) > _FILES_SHOWN else ""
                lines.append(f"{label}: files {', '.join(files[:_FILES_SHOWN])}{more}")
            used = ", ".join(_describe_column(column, reading["rows"]) for column in reading["used"])
            ignored = ", ".join(f"{name} ({count:,})" for name, count in reading["ignored"].items())
            lines.append(f"{label}: columns {used}; ignored: {ignored or 'none'}")
            for convention, (count, first) in reading["conventions"].items():
                lines.append(f"{label}: {count:,} rows: {convention} (first: {first})")
            for reason, (count, first) in reading["rejected"].items():
                lines.append(f"{label}: {count:,} of {reading['rows']:,} rows rejected: {reason} (first: {first})")
    for part in ("train", "validation", "retention_eval"):
        stats = details.get(part, {})
        if stats.get("truncated"):
            lines.append(
                f"{part}: {stats['truncated']:,} of {stats['rows_read']:,} rows truncated (increase trainer.max_length "
                f"to keep more): {stats['lost_tokens']:,} tokens lost, {stats['lost_supervised_tokens']:,} of them in "
                f"the loss; {stats['lost_answers']:,} rows lost an answer, {stats['dropped']:,} dropped"
            )
        lines += [f"{part}: {stats[key]:,} rows {text}" for key, text in _NOTED.items() if stats.get(key)]
    return lines + [f"note: {note}" for note in details["notes"]]


def _describe_column(column: Mapping[str, Any], rows: int) -> str:
    purpose = f" as {column['as']}" if column["as"] != column["column"] else ""
    count = f" ({column['rows']:,})" if column["rows"] != rows else ""
    return f"{column['column']}{purpose}{count}"


def format_line(label: str, value: str) -> str:
    """Return a line of a report."""
    return f"{label:<20}{value}"


def _describe_rows(source: Mapping[str, Any]) -> str:
    share = source["supervised_tokens"] / max(source["tokens"], 1)
    reason = " (no token in the loss)" if source["dropped"] else ""
    return (
        f"{source['name']}: {source['examples']:,} examples; {source['dropped']:,} of {source['rows_read']:,} rows "
        f"dropped{reason}; {source['tokens']:,} tokens, {source['supervised_tokens']:,} in the loss ({share:.0%})"
    )
