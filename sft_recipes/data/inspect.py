"""Shows what the loss will see: real rows as the trainer gets them, and what became of all of them."""

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

_COLOURS = {"supervised": "\033[32m", "read": "\033[2m", "control": "\033[35m", "end": "\033[0m"}
_STYLE = (
    "body{font:14px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:1em}"
    ".supervised{background:#c9efc9}.read{color:#555}.control{color:#a3168c;font-weight:bold}"
)


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text: whether the loss looks at them, and whether they steer the model."""

    text: str
    supervised: bool
    control: bool


@dataclass(frozen=True)
class Rows:
    """Prepared training rows, as the trainer gets them."""

    prepared: Prepared
    details: dict[str, Any]
    dataset: Any
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, number: int) -> dict[str, Any]:
        """`source`, `input_ids`, `labels` and `position_ids`; the first token of an example is predicted from nothing,
        so it has no label."""
        found = self.dataset[number]
        labels, positions = list(found["labels"]), []
        for length in found.get("seq_lengths", [len(labels)]):
            labels[len(positions)] = IGNORED
            positions += range(length)
        return {
            "source": found["source"],
            "input_ids": found["input_ids"],
            "labels": labels,
            "position_ids": positions,
        }

    def examples(self, number: int) -> Iterator[tuple[str, list[Piece]]]:
        """Each example of a row: where it was written, and its pieces."""
        row = self.row(number)
        sources = row["source"] if isinstance(row["source"], list) else [row["source"]]
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        bounds = zip(starts, [*starts[1:], len(row["labels"])], strict=True)
        for source, (start, end) in zip(sources, bounds, strict=True):
            yield source, self._pieces(row["input_ids"][start:end], row["labels"][start:end])

    def _pieces(self, ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
        control = set(self.tokenizer.added_tokens_decoder)
        kinds = [(label != IGNORED, id in control) for id, label in zip(ids, labels, strict=True)]
        pieces = []
        for (supervised, is_control), group in itertools.groupby(
            zip(kinds, ids, strict=True), key=lambda pair: pair[0]
        ):
            text = self.tokenizer.decode([id for _, id in group], clean_up_tokenization_spaces=False)
            pieces.append(Piece(text, supervised, is_control))
        return pieces


def look(plan: Plan, prepared: Prepared) -> Rows:
    """The prepared rows of a plan."""
    from datasets import load_from_disk

    folder, model = Path(prepared.folder), plan.sections.model
    return Rows(
        prepared,
        json.loads((folder / "details.json").read_text(encoding="utf-8")),
        load_from_disk(str(folder / "train")),
        load_tokenizer(prepared.model, model.chat_template, model.trust_remote_code, model.add_tokens),
    )


def json_lines(rows: Rows, most: int | None) -> Iterator[str]:
    """One object a row: `source` (a list where rows are packed), `input_ids`, `labels`, `position_ids`."""
    for number in range(len(rows) if most is None else min(most, len(rows))):
        yield json.dumps(rows.row(number), ensure_ascii=False)


def text(rows: Rows, most: int, colour: bool) -> Iterator[str]:
    """Rows for a terminal; without colours what the loss looks at stands between ⟦ and ⟧."""
    if colour:
        yield (
            f"{_COLOURS['supervised']}the loss looks at this{_COLOURS['end']}, {_COLOURS['read']}the model only reads "
            f"this{_COLOURS['end']}, {_COLOURS['control']}control tokens{_COLOURS['end']}\n"
        )
    else:
        yield "⟦the loss looks at what stands between these⟧\n"
    for number in range(min(most, len(rows))):
        yield _heading(rows, number)
        for source, pieces in rows.examples(number):
            yield f"-- {source}"
            for heading, turn in _turns(pieces):
                yield f"» {heading}"
                yield (_coloured(turn) if colour else _marked(turn)).removesuffix("\n")
            yield ""


def _heading(rows: Rows, number: int) -> str:
    row = rows.row(number)
    supervised = sum(label != IGNORED for label in row["labels"])
    packed = f"{len(row['source'])} examples, " if isinstance(row["source"], list) else ""
    return f"row {number + 1} of {len(rows):,}: {packed}{len(row['labels'])} tokens, {supervised} supervised"


def _turns(pieces: Sequence[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """What the model reads and what it learns to say, one behind the other, each with its heading."""
    answers = itertools.count(1)
    for supervised, group in itertools.groupby(pieces, key=lambda piece: piece.supervised):
        yield f"answer {next(answers)}" if supervised else "prompt", list(group)


def _coloured(pieces: Sequence[Piece]) -> str:
    shown = ""
    for piece in pieces:
        kind = "control" if piece.control else "supervised" if piece.supervised else "read"
        line = "\033[42m\033[30m" if piece.control and piece.supervised else _COLOURS[kind]
        shown += f"{line}{_visible(piece.text)}{_COLOURS['end']}"
    return shown


def _marked(pieces: Sequence[Piece]) -> str:
    said = "".join(_visible(piece.text) for piece in pieces)
    inner = said.removesuffix("\n")  # the bracket closes before the line does
    return f"⟦{inner}⟧{said[len(inner) :]}" if pieces[0].supervised else said


def _visible(said: str) -> str:
    """Line ends marked, and nothing that a terminal would obey."""
    return "".join("⏎\n" if c == "\n" else c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in said)


def report(plan: Plan, rows: Rows) -> list[str]:
    """The contract's report, line by line."""
    lines = [*validate.lines(rows.details), _fill(plan, rows.dataset)]
    if plan.settled:
        lines.append(
            f"{'a step':<12}{plan.effective_batch_size} rows: about {plan.examples_per_step:,g} examples, "
            f"{plan.supervised_tokens_per_step:,.0f} supervised tokens; {plan.optimizer_steps:,} steps in all"
        )
    lines.append(f"{'time':<12}{rows.details['seconds']:.1f} s to prepare; kept in {rows.prepared.folder}")
    return lines


def _fill(plan: Plan, dataset: Any) -> str:
    """How full the rows are; what unpacked ones are padded by is told from one shuffled epoch."""
    lengths = numpy.concatenate([chunk.value_lengths() for chunk in dataset.data.column("input_ids").chunks])
    tokens, per_device = int(lengths.sum()), plan.per_device_train_batch_size
    if plan.packing:
        slots = len(lengths) * plan.max_length
        return (
            f"{'packing':<12}{len(lengths):,} rows of {plan.max_length:,}, {tokens / slots:.2%} of their tokens are "
            f"examples'; {slots - tokens:,} are padding"
        )
    shuffled = numpy.random.default_rng(0).permutation(lengths)
    batches = numpy.resize(shuffled, (-(-len(shuffled) // per_device), per_device))
    padding = int(batches.max(axis=1).sum()) * per_device - int(batches.sum())
    return f"{'padding':<12}about {padding:,} tokens an epoch, each row padded to the longest of its {per_device}"


def page(plan: Plan, rows: Rows, most: int) -> str:
    """Rows and report as an HTML page that needs nothing else."""
    parts = []
    for number in range(min(most, len(rows))):
        parts.append(f"<h2>{html.escape(_heading(rows, number))}</h2>")
        for source, pieces in rows.examples(number):
            parts.append(f"<h3>{html.escape(source)}</h3>")
            for heading, turn in _turns(pieces):
                parts.append(f"<small>{heading}</small><pre>{''.join(_span(piece) for piece in turn)}</pre>")
    counted = html.escape("\n".join(report(plan, rows)))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(plan.recipe)}: what the loss sees'
        f"</title><style>{_STYLE}</style><h1>{html.escape(plan.recipe)}: what the loss sees</h1>"
        f'<p><span class="supervised">the loss looks at this</span>, <span class="read">the model only reads this'
        f'</span>, <span class="control">control tokens</span></p>{"".join(parts)}<h2>All rows</h2><pre>{counted}</pre>'
        f"</html>\n"
    )


def _span(piece: Piece) -> str:
    kinds = ["supervised" if piece.supervised else "read", *(["control"] if piece.control else [])]
    return f'<span class="{" ".join(kinds)}">{html.escape(_visible(piece.text))}</span>'
