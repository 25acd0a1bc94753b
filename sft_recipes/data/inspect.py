"""Displays prepared rows with their loss mask, and the report on all rows, as text, HTML or JSON."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from sft_recipes.data import validate
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime.text import escape_unprintable

_COLORS = {"loss": "\033[32m", "context": "\033[2m", "special": "\033[35m", "end": "\033[0m"}
_SPECIAL_IN_LOSS = "\033[42m\033[30m"
_LEGEND = {"loss": "in the loss", "context": "not in the loss", "special": "special tokens"}
_STYLE = (
    "body{font:14px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:1em}"
    ".loss{background:#c9efc9}.context{color:#555}.special{color:#a3168c;font-weight:bold}"
)


@dataclass(frozen=True)
class TextSpan:
    """The text of adjacent tokens that are all in the loss or not, and all special tokens or not."""

    text: str
    in_loss: bool
    special: bool


@dataclass(frozen=True)
class PreparedRows:
    """Prepared training rows, as the trainer gets them."""

    prepared: Prepared
    details: dict[str, Any]
    dataset: Any
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, number: int) -> dict[str, Any]:
        """Return `source`, `input_ids`, `labels` and `position_ids`.

        The first token of an example has no label, because nothing predicts it.
        """
        stored = self.dataset[number]
        labels, positions = list(stored["labels"]), []
        for length in stored.get("seq_lengths", [len(labels)]):
            labels[len(positions)] = IGNORED
            positions += range(length)
        return {
            "source": stored["source"],
            "input_ids": stored["input_ids"],
            "labels": labels,
            "position_ids": positions,
        }

    def examples(self, number: int) -> Iterator[tuple[str, list[TextSpan]]]:
        """Yield the location and the text of each example of a row."""
        row = self.row(number)
        sources = row["source"] if isinstance(row["source"], list) else [row["source"]]
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        bounds = zip(starts, [*starts[1:], len(row["labels"])], strict=True)
        for source, (start, end) in zip(sources, bounds, strict=True):
            yield source, self._decode(row["input_ids"][start:end], row["labels"][start:end])

    def _decode(self, ids: Sequence[int], labels: Sequence[int]) -> list[TextSpan]:
        special_ids = set(self.tokenizer.added_tokens_decoder)
        kinds = [(label != IGNORED, id in special_ids) for id, label in zip(ids, labels, strict=True)]
        spans = []
        for (in_loss, special), group in itertools.groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
            text = self.tokenizer.decode([id for _, id in group], clean_up_tokenization_spaces=False)
            spans.append(TextSpan(text, in_loss, special))
        return spans


def load_rows(plan: Plan, prepared: Prepared) -> PreparedRows:
    """Load the prepared training rows of a plan."""
    from datasets import load_from_disk

    folder, model = Path(prepared.folder), plan.sections.model
    return PreparedRows(
        prepared,
        json.loads((folder / "details.json").read_text(encoding="utf-8")),
        load_from_disk(str(folder / "train")),
        load_tokenizer(prepared.model, model.chat_template, model.trust_remote_code, model.add_tokens),
    )


def to_json(rows: PreparedRows, limit: int | None) -> Iterator[str]:
    """Yield one object per row: `source` (a list if packed), `input_ids`, `labels`, `position_ids`."""
    for number in range(len(rows) if limit is None else min(limit, len(rows))):
        yield json.dumps(rows.row(number), ensure_ascii=False)


def to_text(rows: PreparedRows, limit: int, color: bool) -> Iterator[str]:
    """Yield rows for a terminal; without color, text in the loss is between ⟦ and ⟧."""
    if color:
        yield ", ".join(f"{_COLORS[kind]}{name}{_COLORS['end']}" for kind, name in _LEGEND.items()) + "\n"
    else:
        yield f"⟦{_LEGEND['loss']}⟧\n"
    for number in range(min(limit, len(rows))):
        yield _heading(rows, number)
        for source, spans in rows.examples(number):
            yield f"-- {source}"
            for heading, turn in _turns(spans):
                yield f"» {heading}"
                yield (_with_color(turn) if color else _with_brackets(turn)).removesuffix("\n")
            yield ""


def _heading(rows: PreparedRows, number: int) -> str:
    row = rows.row(number)
    in_loss = sum(label != IGNORED for label in row["labels"])
    packed = f"{len(row['source'])} examples, " if isinstance(row["source"], list) else ""
    return f"row {number + 1} of {len(rows):,}: {packed}{len(row['labels'])} tokens, {in_loss} in the loss"


def _turns(spans: Sequence[TextSpan]) -> Iterator[tuple[str, list[TextSpan]]]:
    """Yield prompts and answers in order, each with its heading."""
    answers = itertools.count(1)
    for in_loss, group in itertools.groupby(spans, key=lambda span: span.in_loss):
        yield f"answer {next(answers)}" if in_loss else "prompt", list(group)


def _with_color(spans: Sequence[TextSpan]) -> str:
    colored = ""
    for span in spans:
        kind = "special" if span.special else "loss" if span.in_loss else "context"
        color = _SPECIAL_IN_LOSS if span.special and span.in_loss else _COLORS[kind]
        colored += f"{color}{_printable(span.text)}{_COLORS['end']}"
    return colored


def _with_brackets(spans: Sequence[TextSpan]) -> str:
    text = "".join(_printable(span.text) for span in spans)
    inner = text.removesuffix("\n")  # the bracket closes before the line ends
    return f"⟦{inner}⟧{text[len(inner) :]}" if spans[0].in_loss else text


def _printable(text: str) -> str:
    """Make line ends visible and escape control characters."""
    return escape_unprintable(text.replace("\n", "⏎\n"), keep="\n\t")


def report(plan: Plan, rows: PreparedRows) -> list[str]:
    """Return the report on all rows, line by line."""
    lines = [*validate.report_lines(rows.details), _describe_padding(plan, rows.dataset)]
    if plan.data_prepared:
        step = (
            f"{plan.effective_batch_size} rows, about {plan.examples_per_step:,g} examples and "
            f"{plan.supervised_tokens_per_step:,.0f} tokens in the loss; {plan.optimizer_steps:,} steps in total"
        )
        lines.append(validate.format_line("step", step))
    lines.append(validate.format_line("prepared", f"{rows.prepared.folder} ({rows.details['seconds']:.1f} s)"))
    return lines


def _describe_padding(plan: Plan, dataset: Any) -> str:
    """Count padded tokens; those of unpacked rows are estimated from one shuffled epoch."""
    lengths = numpy.concatenate([chunk.value_lengths() for chunk in dataset.data.column("input_ids").chunks])
    tokens, per_device = int(lengths.sum()), plan.per_device_train_batch_size
    if "seq_lengths" in dataset.column_names:
        padded = len(lengths) * plan.max_length
        return validate.format_line(
            "packing",
            f"{len(lengths):,} rows of {plan.max_length:,} tokens, {tokens / padded:.2%} full; {padded - tokens:,} "
            f"padding tokens",
        )
    shuffled = numpy.random.default_rng(0).permutation(lengths)
    batches = numpy.resize(shuffled, (-(-len(shuffled) // per_device), per_device))
    padding = int(batches.max(axis=1).sum()) * per_device - int(batches.sum())
    longest = f"each micro-batch of {per_device} rows is padded to its longest"
    return validate.format_line("padding", f"about {padding:,} padding tokens per epoch; {longest}")


def to_html(plan: Plan, rows: PreparedRows, limit: int) -> str:
    """Return rows and report as a self-contained HTML page."""
    parts = []
    for number in range(min(limit, len(rows))):
        parts.append(f"<h2>{html.escape(_heading(rows, number))}</h2>")
        for source, spans in rows.examples(number):
            parts.append(f"<h3>{html.escape(source)}</h3>")
            for heading, turn in _turns(spans):
                parts.append(f"<small>{heading}</small><pre>{''.join(_html_span(span) for span in turn)}</pre>")
    lines = html.escape("\n".join(report(plan, rows)))
    title = f"{html.escape(plan.recipe)}: loss mask"
    legend = ", ".join(f'<span class="{kind}">{name}</span>' for kind, name in _LEGEND.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{legend}</p>{''.join(parts)}<h2>All rows</h2><pre>{lines}</pre></html>\n"
    )


def _html_span(span: TextSpan) -> str:
    kinds = ["loss" if span.in_loss else "context", *(["special"] if span.special else [])]
    return f'<span class="{" ".join(kinds)}">{html.escape(_printable(span.text))}</span>'
