"""Counts what prepared rows contain, and rejects them before a GPU is used if they break the recipe's limits.

Each row's loss mask (every assistant turn with its end of turn, and nothing else) is checked when the row is rendered
(sft_recipes.data.assistant_spans, sft_recipes.data.tokenize). This module checks what only all rows together show.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy

from sft_recipes.data.rows import Rows, concatenate
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import DataError

PERCENTILES = (50, 90, 99, 100)
_FILES_SHOWN = 8

Sources = Mapping[str, Rows]  # by the source's short name


def source_stats(name: str, rows: Rows) -> dict[str, Any]:
    """Return statistics of a source's rows. Tokens are those of the examples, before packing.

    `examples` have a token in the loss. The turns of `untrained` rows are all context; they are not used. `dropped` are
    the others without a token in the loss: `max_length` cuts it off. `truncated` rows are longer; they lost tokens, and
    `lost_answers` of them an answer together with its question.
    """
    column = {key: rows[key] for key in rows.numbers.dtype.names or ()}
    usable, untrained = column["supervised_tokens"] > 0, column["full_supervised_tokens"] == 0
    dropped = numpy.flatnonzero(~usable & ~untrained)
    percentiles = numpy.percentile(column["full_length"], PERCENTILES) if len(rows) else [0] * len(PERCENTILES)
    counts = {
        "rows_read": len(rows),
        "examples": usable.sum(),
        "untrained": untrained.sum(),
        "dropped": len(dropped),
        "truncated": (column["full_length"] > column["length"]).sum(),
        "lost_answers": (column["lost_answers"] & usable).sum(),
        "lost_tokens": (column["full_length"] - column["length"]).sum(),
        "lost_supervised_tokens": (column["full_supervised_tokens"] - column["supervised_tokens"]).sum(),
        "tokens": column["length"][usable].sum(),
        "supervised_tokens": column["supervised_tokens"].sum(),
        "duplicates": len(rows) - len(numpy.unique(column["row_digest"])),
    }
    lengths = {str(percentile): int(value) for percentile, value in zip(PERCENTILES, percentiles, strict=True)}
    first = rows.location(dropped[0]) if len(dropped) else None
    counted = {key: int(count) for key, count in counts.items()}
    return {"name": name, **counted, "first_dropped": first, "length_percentiles": lengths}


def summarize(parts: Mapping[str, Sources]) -> dict[str, Any]:
    """Return the part of `details.json` that depends on the rows alone, per source and per part in total.

    `retention_eval` has no total if the recipe names no such rows, and nothing else includes them.
    """
    stats = {part: [source_stats(name, rows) for name, rows in sources.items()] for part, sources in parts.items()}
    train, validation = (concatenate([*parts[part].values()]) for part in ("train", "validation"))
    outcomes = [*concatenate([train, validation]).count_outcomes()]
    notes: Counter[str] = Counter()
    for outcome, count in outcomes:
        notes[outcome.note] += count if outcome.note else 0
    return {
        **{part: _total(sources) for part, sources in stats.items() if sources},
        "sources": stats,
        "overlap": _overlap(train, validation),
        "template_notes": dict(+notes),
        "end_of_turn_ids": sorted({id for outcome, _ in outcomes for id in outcome.stop_ids}),
    }


def _total(stats: list[dict[str, Any]]) -> dict[str, int]:
    counts = [key for key, count in stats[0].items() if isinstance(count, int)]
    return {key: sum(source[key] for source in stats) for key in counts}


def _overlap(training: Rows, validation: Rows) -> dict[str, Any]:
    """Count the validation rows that are also in training, up to white space, and locate the first of them in both."""
    digests, train_digests = validation["row_digest"], training["row_digest"]
    shared = numpy.flatnonzero(numpy.isin(digests, train_digests))
    location = train_location = None
    if len(shared):
        location = validation.location(shared[0])
        train_location = training.location(numpy.flatnonzero(train_digests == digests[shared[0]])[0])
    return {"rows": len(shared), "of": len(digests), "location": location, "train_location": train_location}


def check_limits(plan: Plan, details: Mapping[str, Any]) -> None:
    """Check prepared rows against the recipe's limits.

    Args:
        details: of the prepared rows (`details.json`).

    Raises:
        DataError: too many dropped rows, no rows, too much train/eval overlap, or new tokens for a method that does not
            train embeddings.
    """
    data, fix = plan.sections.data, f"Increase trainer.max_length={plan.max_length}"
    for part, sources in details["sources"].items():
        for source in sources:
            if source["dropped"] > data.max_dropped_fraction * source["rows_read"]:
                found = f"found {source['dropped']} of {source['rows_read']} (first: {source['first_dropped']})"
                limit = f"expected at most data.max_dropped_fraction={data.max_dropped_fraction:g}"
                raise DataError(f"data.{part}: dropped rows (no token in the loss): {found}, {limit}. {fix}")
        if sources and not details[part]["examples"]:
            raise DataError(f"data.{part}: found no row with an assistant turn in the loss, expected at least one")
    overlap = details["overlap"]
    if not data.overfit_rows and overlap["rows"] > data.max_overlap * overlap["of"]:
        share = math.ceil(1000 * overlap["rows"] / overlap["of"]) / 1000
        found = f"found {overlap['rows']} of {overlap['of']} validation rows in training too"
        place, fix = overlap["location"], f"Remove them, or set data.max_overlap={share:g}"
        raise DataError(f"{place}: train/eval overlap: {found} (first: {overlap['train_location']}). {fix}")
    if details["new_tokens"] and plan.method != "full":
        found = f"found new tokens {', '.join(details['new_tokens'])}, but {plan.method} does not train embeddings"
        raise DataError(f"model: {found}. Use a tokenizer that has them and a padding token, or full fine-tuning")


def report_lines(details: Mapping[str, Any]) -> list[str]:
    """Return the report on prepared rows (`details.json`), one `label  value` per line."""
    lines = []
    for part, sources in details["sources"].items():
        for source in sources:
            percentiles = source["length_percentiles"].items()
            lengths = ", ".join(f"{value:,} ({'max' if p == '100' else f'p{p}'})" for p, value in percentiles)
            dropped = f"{source['dropped']:,} of {source['rows_read']:,} rows dropped"
            share = source["supervised_tokens"] / max(source["tokens"], 1)
            tokens = f"{source['tokens']:,} tokens, {source['supervised_tokens']:,} in the loss ({share:.0%})"
            lines.append((part, f"{source['name']}: {source['examples']:,} examples; {dropped}; {tokens}"))
            lines.append(("", f"tokens per row: {lengths}"))
    overlap = details["overlap"]
    first = f" (first: {overlap['location']} and {overlap['train_location']})" if overlap["rows"] else ""
    lines += [("read", line) for line in reading_lines(details)]
    lines.append(("train/eval overlap", f"{overlap['rows']:,} of {overlap['of']:,} validation rows{first}"))
    lines.append(("loss mask", f"assistant turns including {', '.join(details['end_of_turn'])}"))
    return [format_line(label, value) for label, value in lines]


def reading_lines(details: Mapping[str, Any]) -> list[str]:
    """Return what a user should know of the rows: columns, conventions, rejected and truncated rows, notes."""
    lines = []
    for part, sources in details["reading"].items():
        for name, reading in sources.items():
            label = f"{part}: {name}"
            if files := reading["files"]:
                lines.append(f"{label}: {len(files)} files: {', '.join(files[:_FILES_SHOWN])}")
            counts = {name: "" if rows == reading["rows"] else f" ({rows:,})" for name, rows in reading["used"].items()}
            used = ", ".join(f"{name}{count}" for name, count in counts.items())
            ignored = ", ".join(f"{name} ({count:,})" for name, count in reading["ignored"].items())
            lines.append(f"{label}: columns {used}; ignored: {ignored or 'none'}")
            rejected = {f"rejected: {reason}": counted for reason, counted in reading["rejected"].items()}
            for what, (count, first) in {**reading["conventions"], **rejected}.items():
                lines.append(f"{label}: {count:,} of {reading['rows']:,} rows: {what} (first: {first})")
    for part in ("train", "validation", "retention_eval"):
        stats = details.get(part, {})
        if stats.get("truncated"):
            truncated = f"{stats['truncated']:,} of {stats['rows_read']:,} rows truncated (increase trainer.max_length)"
            tokens = f"{stats['lost_tokens']:,} tokens lost, {stats['lost_supervised_tokens']:,} of them in the loss"
            rows = f"{stats['lost_answers']:,} rows lost an answer, {stats['dropped']:,} dropped"
            lines.append(f"{part}: {truncated}: {tokens}; {rows}")
        if stats.get("duplicates"):
            lines.append(f"{part}: {stats['duplicates']:,} rows are duplicates of an earlier row")
    return lines + [f"note: {note}" for note in details["notes"]]


def format_line(label: str, value: str) -> str:
    """Return a line of a report."""
    return f"{label:<20}{value}"
