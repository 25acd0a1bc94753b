"""Displays prepared rows with their loss mask, and the report on all rows, as text or JSON."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.data import validate
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime.text import escape_unprintable


def read_rows(prepared: Prepared, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield the first training rows as the trainer gets them: `source`, `input_ids`, `labels` and `position_ids`.

    `source` is a list if rows are packed. The first token of an example has no label, because nothing predicts it.
    """
    from datasets import load_from_disk

    for row in itertools.islice(load_from_disk(str(Path(prepared.folder) / "train")), limit):
        lengths = row.get("seq_lengths", [len(row["labels"])])
        positions = list(itertools.chain.from_iterable(map(range, lengths)))
        yield {**{key: row[key] for key in ("source", "input_ids", "labels")}, "position_ids": positions}


def to_json(prepared: Prepared, limit: int | None) -> Iterator[str]:
    """Yield one object per row."""
    return (json.dumps(row, ensure_ascii=False) for row in read_rows(prepared, limit))


def to_text(plan: Plan, prepared: Prepared, details: Mapping[str, Any], limit: int) -> Iterator[str]:
    """Yield rows for reading: text in the loss is between ⟦ and ⟧."""
    model = plan.sections.model
    tokenizer = load_tokenizer(prepared.model, model.chat_template, model.trust_remote_code, model.add_tokens)
    yield "⟦in the loss⟧\n"
    for number, row in enumerate(read_rows(prepared, limit), start=1):
        ids, labels = row["input_ids"], row["labels"]
        sources = row["source"] if isinstance(row["source"], list) else [row["source"]]
        in_loss = sum(label != IGNORED for label in labels)
        yield f"row {number} of {details['rows']:,}: {len(sources)} examples, {len(ids)} tokens, {in_loss} in the loss"
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        for source, (start, end) in zip(sources, itertools.pairwise([*starts, len(ids)]), strict=True):
            yield f"-- {source}"
            yield from _turns(tokenizer, ids[start:end], labels[start:end])
            yield ""


def _turns(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Iterator[str]:
    """Yield prompts and answers in order, each after its heading."""
    answers = itertools.count(1)
    for in_loss, group in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([id for id, _ in group], clean_up_tokenization_spaces=False)
        text = escape_unprintable(text.replace("\n", "⏎\n"), keep="\n\t").removesuffix("\n")
        yield f"» answer {next(answers)}" if in_loss else "» prompt"
        yield f"⟦{text}⟧" if in_loss else text


def report(plan: Plan, prepared: Prepared, details: Mapping[str, Any]) -> list[str]:
    """Return the report on all rows, line by line."""
    lines = validate.report_lines(details)
    if plan.packing and prepared.packing:
        full = prepared.tokens / max(prepared.rows * plan.max_length, 1)
        packing = f"{details['rows']:,} rows of {plan.max_length:,} tokens, {full:.2%} full"
        lines.append(validate.format_line("packing", packing))
    return [*lines, validate.format_line("prepared", f"{prepared.folder} ({details['seconds']:.1f} s)")]
