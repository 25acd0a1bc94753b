"""Counts what prepared rows contain, and rejects them before a GPU is used if they break the recipe's limits.

Each row's loss mask (every assistant turn with its end of turn, and nothing else) is checked when the row is rendered
(sft_recipes.data.assistant_spans, sft_recipes.data.tokenize). This module checks what only all rows together show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from sft_recipes.data.assistant_spans import DIFFERS
from sft_recipes.data.tokenize_rows import TokenizedRows
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import DataError

PERCENTILES = (50, 90, 99, 100)
_FILES_SHOWN = 8
LABEL_WIDTH = 20  # of the first column of a report


@dataclass(frozen=True)
class SourceStats:
    """Statistics of one source's rows. Tokens are those of the examples, before packing.

    Attributes:
        rows_read: rows in the source.
        examples: rows with a token in the loss.
        untrained: rows whose turns are all context; they are not used.
        dropped: other rows without a token in the loss: `max_length` cuts it off.
        truncated: rows longer than `max_length`; they lost `lost_tokens`, of which `lost_supervised_tokens` were in the
            loss. `lost_answers` of them lost an answer together with its question.
        duplicates: rows whose text equals an earlier row's.
        length_percentiles: tokens per row before truncation.
    """

    name: str
    rows_read: int
    examples: int
    untrained: int
    dropped: int
    truncated: int
    lost_answers: int
    lost_tokens: int
    lost_supervised_tokens: int
    tokens: int
    supervised_tokens: int
    duplicates: int
    special_tokens_as_text: int
    dropped_reasoning: int
    shares_prompt_token: int
    length_percentiles: dict[str, int]


def source_stats(name: str, rows: TokenizedRows) -> SourceStats:
    """Compute the statistics of a source's rows."""
    usable = rows.supervised_tokens > 0
    untrained = rows.full_supervised_tokens == 0
    percentiles = numpy.percentile(rows.full_lengths, PERCENTILES) if len(rows) else [0] * len(PERCENTILES)
    return SourceStats(
        name=name,
        rows_read=len(rows),
        examples=int(usable.sum()),
        untrained=int(untrained.sum()),
        dropped=int((~usable & ~untrained).sum()),
        truncated=int((rows.full_lengths > rows.lengths).sum()),
        lost_answers=int((rows.lost_answers & usable).sum()),
        lost_tokens=int((rows.full_lengths - rows.lengths).sum()),
        lost_supervised_tokens=int((rows.full_supervised_tokens - rows.supervised_tokens).sum()),
        tokens=int(rows.lengths[usable].sum()),
        supervised_tokens=int(rows.supervised_tokens.sum()),
        duplicates=len(rows) - len(numpy.unique(rows.row_digests)),
        special_tokens_as_text=int(rows.special_tokens_as_text.sum()),
        dropped_reasoning=int(rows.dropped_reasoning.sum()),
        shares_prompt_token=int(rows.shares_prompt_token.sum()),
        length_percentiles={str(p): int(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
    )


def summarize(
    training: Mapping[str, TokenizedRows],
    validation: Mapping[str, TokenizedRows],
    retention_eval: Mapping[str, TokenizedRows],
) -> dict[str, Any]:
    """Return the part of `details.json` that depends on the rows alone, per source and in total.

    `retention_eval` is in it only if the recipe names such rows; no total includes them.
    """
    parts = {"train": training, "validation": validation}
    stats = {part: [source_stats(name, rows) for name, rows in sources.items()] for part, sources in parts.items()}
    retention = [asdict(source_stats(name, rows)) for name, rows in retention_eval.items()]
    every_source = [*training.values(), *validation.values()]
    notes = Counter(note for rows in every_source for note in rows.notes if note)
    return {
        **{part: _total(stats[part]) for part in parts},
        **({"retention_eval": retention[0]} if retention else {}),
        "sources": {part: [asdict(source) for source in stats[part]] for part in parts},
        "first_dropped": {part: [_first_dropped(rows) for rows in sources.values()] for part, sources in parts.items()},
        "duplicates": sum(map(len, training.values())) - len(numpy.unique(_all_digests(training))),
        "overlap": _overlap(training, validation),
        "template_notes": dict(notes),
        "mismatched_rows": sum(count for note, count in notes.items() if DIFFERS in note),
        "end_of_turn_ids": sorted(frozenset[int]().union(*(rows.stop_ids for rows in every_source))),
        "span_sources": ", ".join(sorted(frozenset[str]().union(*(rows.span_sources for rows in every_source)))),
    }


def _total(stats: Sequence[SourceStats]) -> dict[str, int]:
    keys = [key for key, kind in SourceStats.__annotations__.items() if kind == "int"]
    return {key: sum(getattr(source, key) for source in stats) for key in keys}


def _first_dropped(rows: TokenizedRows) -> str | None:
    """Return the location of the first row without a token in the loss."""
    dropped = numpy.flatnonzero((rows.supervised_tokens == 0) & (rows.full_supervised_tokens > 0))
    return rows.locations[int(dropped[0])] if len(dropped) else None


def _overlap(training: Mapping[str, TokenizedRows], validation: Mapping[str, TokenizedRows]) -> dict[str, Any]:
    """Count the validation rows that are also in training, up to white space, and locate the first of them in both."""
    train_digests, digests = _all_digests(training), _all_digests(validation)
    shared = numpy.isin(digests, train_digests)
    overlap = {"rows": int(shared.sum()), "of": len(digests), "location": None, "train_location": None}
    if shared.any():
        row = int(numpy.flatnonzero(shared)[0])
        overlap["location"] = [location for rows in validation.values() for location in rows.locations][row]
        train_row = int(numpy.flatnonzero(train_digests == digests[row])[0])
        overlap["train_location"] = [location for rows in training.values() for location in rows.locations][train_row]
    return overlap


def _all_digests(sources: Mapping[str, TokenizedRows]) -> numpy.ndarray:
    """Return the row digests of all sources."""
    return numpy.concatenate([numpy.zeros(0, numpy.uint64), *(rows.row_digests for rows in sources.values())])


def check_limits(plan: Plan, details: Mapping[str, Any]) -> None:
    """Check prepared rows against the recipe's limits.

    Args:
        details: of the prepared rows (`details.json`).

    Raises:
        DataError: too many dropped rows, too much train/eval overlap, an empty retention eval set, or new tokens for a
            method that does not train embeddings.
    """
    data = plan.sections.data
    for part, key in (("train", "data.train"), ("validation", "data.validation")):
        for source, first in zip(details["sources"][part], details["first_dropped"][part], strict=True):
            if source["dropped"] > data.max_dropped_fraction * source["rows_read"]:
                raise DataError(
                    f"{key}: dropped rows (no token in the loss): found {source['dropped']} of {source['rows_read']} "
                    f"(first: {first}), expected at most data.max_dropped_fraction={data.max_dropped_fraction:g}. "
                    f"Increase trainer.max_length={plan.max_length}"
                )
        if not sum(source["examples"] for source in details["sources"][part]):
            raise DataError(f"{key}: found no row with an assistant turn in the loss, expected at least one")
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
            lines += [
                format_line(part, _describe_rows(source)),
                *(format_line("", line) for line in _describe_more(source)),
            ]
    lines += [format_line("read", line) for line in reading_lines(details)]
    if retention := details.get("retention_eval"):
        lines.append(format_line("retention_eval", _describe_rows(retention)))
    if len(details["sources"]["train"]) > 1 and details["duplicates"]:
        lines.append(format_line("duplicates", f"{details['duplicates']:,} training rows over all sources"))
    overlap = details["overlap"]
    first = f" (first: {overlap['location']} and {overlap['train_location']})" if overlap["rows"] else ""
    lines.append(format_line("train/eval overlap", f"{overlap['rows']:,} of {overlap['of']:,} validation rows{first}"))
    truncated = details["train"]["truncated"]
    exception = f", except in {truncated:,} truncated rows" if truncated else ""
    ends = ", ".join(details["end_of_turn"])
    lines.append(format_line("loss mask", f"assistant turns including {ends}{exception}"))
    lines.append(format_line("padding token", details["padding_token"]))
    lines += [format_line("note", note) for note in details["notes"]]
    if not details["mismatched_rows"]:
        lines.append(format_line("template", f"rendered as at inference (spans: {details['span_sources']})"))
    return lines


def reading_lines(details: Mapping[str, Any]) -> list[str]:
    """Return what was read of each source: files of a folder, columns, conventions, rejected rows."""
    lines = []
    for part, sources in details["reading"].items():
        for name, reading in sources.items():
            label = f"{part}: {name}"
            if files := details["files"][part][name]:
                more = f" and {len(files) - _FILES_SHOWN} more" if len(files) > _FILES_SHOWN else ""
                lines.append(f"{label}: files {', '.join(files[:_FILES_SHOWN])}{more}")
            used = ", ".join(_describe_column(column, reading["rows"]) for column in reading["used"])
            ignored = ", ".join(f"{name} ({count:,})" for name, count in reading["ignored"].items())
            lines.append(f"{label}: columns {used}; ignored: {ignored or 'none'}")
            for convention, (count, first) in reading["conventions"].items():
                lines.append(f"{label}: {count:,} rows: {convention} (first: {first})")
            for reason, (count, first) in reading["rejected"].items():
                lines.append(f"{label}: {count:,} of {reading['rows']:,} rows rejected: {reason} (first: {first})")
    return lines


def _describe_column(column: Mapping[str, Any], rows: int) -> str:
    purpose = f" as {column['as']}" if column["as"] != column["column"] else ""
    count = f" ({column['rows']:,})" if column["rows"] != rows else ""
    return f"{column['column']}{purpose}{count}"


def format_line(label: str, value: str) -> str:
    """Return a line of a report."""
    return f"{label:<{LABEL_WIDTH}}{value}"


def _describe_rows(source: Mapping[str, Any]) -> str:
    share = source["supervised_tokens"] / max(source["tokens"], 1)
    reason = " (no token in the loss)" if source["dropped"] else ""
    return (
        f"{source['name']}: {source['examples']:,} examples; {source['dropped']:,} of {source['rows_read']:,} rows "
        f"dropped{reason}; {source['tokens']:,} tokens, {source['supervised_tokens']:,} in the loss ({share:.0%})"
    )


def _describe_more(source: Mapping[str, Any]) -> list[str]:
    percentiles = source["length_percentiles"].items()
    lengths = ", ".join(f"{value:,} ({'max' if p == '100' else f'p{p}'})" for p, value in percentiles)
    lines = [f"tokens per row: {lengths}"]
    if source["truncated"]:
        lines.append(
            f"{source['truncated']:,} rows truncated: {source['lost_tokens']:,} tokens lost, "
            f"{source['lost_supervised_tokens']:,} of them in the loss; {source['lost_answers']:,} rows lost an answer"
        )
    if source["duplicates"]:
        lines.append(f"{source['duplicates']:,} rows are duplicates of an earlier row")
    if source["special_tokens_as_text"]:
        lines.append(f"{source['special_tokens_as_text']:,} rows contain special tokens as text, encoded as text")
    if source["dropped_reasoning"]:
        lines.append(f"{source['dropped_reasoning']:,} rows lose the reasoning of earlier turns, as at inference")
    if source["shares_prompt_token"]:
        lines.append(f"{source['shares_prompt_token']:,} rows have an answer whose first token begins in the prompt")
    return lines
