"""Displays prepared rows with their loss mask, and the report on all rows, as text or JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data import validate
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime.text import escape_unprintable


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
        lengths = stored.get("seq_lengths", [len(stored["labels"])])
        positions = list(itertools.chain.from_iterable(map(range, lengths)))
        return {**{key: stored[key] for key in ("source", "input_ids", "labels")}, "position_ids": positions}


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


def to_text(rows: PreparedRows, limit: int) -> Iterator[str]:
    """Yield rows for reading: text in the loss is between ⟦ and ⟧."""
    yield "⟦in the loss⟧\n"
    for number in range(min(limit, len(rows))):
        row = rows.row(number)
        ids, labels, is_packed = row["input_ids"], row["labels"], isinstance(row["source"], list)
        packed = f"{len(row['source'])} examples, " if is_packed else ""
        in_loss = sum(label != IGNORED for label in labels)
        yield f"row {number + 1} of {len(rows):,}: {packed}{len(ids)} tokens, {in_loss} in the loss"
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        bounds = zip(starts, [*starts[1:], len(ids)], strict=True)
        for source, (start, end) in zip(row["source"] if is_packed else [row["source"]], bounds, strict=True):
            yield f"-- {source}"
            yield from _turns(rows.tokenizer, ids[start:end], labels[start:end])
            yield ""


def _turns(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Iterator[str]:
    """Yield prompts and answers in order, each after its heading."""
    answers = itertools.count(1)
    for in_loss, group in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([id for id, _ in group], clean_up_tokenization_spaces=False)
        text = escape_unprintable(text.replace("\n", "⏎\n"), keep="\n\t").removesuffix("\n")
        yield f"» answer {next(answers)}" if in_loss else "» prompt"
        yield f"⟦{text}⟧" if in_loss else text


def report(plan: Plan, rows: PreparedRows) -> list[str]:
    """Return the report on all rows, line by line."""
    lines = validate.report_lines(rows.details)
    if "seq_lengths" in rows.dataset.column_names:
        count, tokens = len(rows), sum(map(sum, rows.dataset["seq_lengths"]))
        full = f"{tokens / (count * plan.max_length):.2%} full" if count else "none"
        lines.append(validate.format_line("packing", f"{count:,} rows of {plan.max_length:,} tokens, {full}"))
    lines.append(validate.format_line("prepared", f"{rows.prepared.folder} ({rows.details['seconds']:.1f} s)"))
    return lines
