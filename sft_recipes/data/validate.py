"""What the loss will see, counted, and the promises that rows must keep before a GPU is taken.

That each assistant's turn is supervised with its end, and nothing else, is held row by row where rows are rendered
(sft_recipes.data.assistant_spans, sft_recipes.data.tokenize). Here stands what only all rows together tell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from sft_recipes.data.assistant_spans import DIFFERS
from sft_recipes.data.tokenize_rows import Labelled
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import DataError

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows; tokens count each example's own, before packing.

    `cut` rows were longer than `max_length` and lost `lost_tokens`, `lost_supervised_tokens` of them supervised;
    `dropped` ones had nothing left to learn from, `unanswered` ones lost an answer, and with it its question.
    `duplicates` are rows that say what an earlier one says. `percentiles` are of lengths before the cut.
    """

    name: str
    read: int
    examples: int
    dropped: int
    cut: int
    unanswered: int
    lost_tokens: int
    lost_supervised_tokens: int
    tokens: int
    supervised_tokens: int
    duplicates: int
    markers_as_text: int
    dropped_reasoning: int
    shares_a_token: int
    percentiles: dict[str, int]


def count(name: str, labelled: Labelled) -> Counts:
    """The counts of a source's rows."""
    kept = labelled.trained > 0
    percentiles = numpy.percentile(labelled.whole, PERCENTILES) if len(labelled) else [0] * len(PERCENTILES)
    return Counts(
        name=name,
        read=len(labelled),
        examples=int(kept.sum()),
        dropped=int((~kept).sum()),
        cut=int((labelled.whole > labelled.lengths).sum()),
        unanswered=int((labelled.unanswered & kept).sum()),
        lost_tokens=int((labelled.whole - labelled.lengths).sum()),
        lost_supervised_tokens=int((labelled.whole_trained - labelled.trained).sum()),
        tokens=int(labelled.lengths[kept].sum()),
        supervised_tokens=int(labelled.trained.sum()),
        duplicates=len(labelled) - len(numpy.unique(labelled.said)),
        markers_as_text=int(labelled.markers_as_text.sum()),
        dropped_reasoning=int(labelled.dropped_reasoning.sum()),
        shares_a_token=int(labelled.shares_a_token.sum()),
        percentiles={str(p): int(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
    )


def describe(
    training: Mapping[str, Labelled], held_out: Mapping[str, Labelled], retained: Mapping[str, Labelled]
) -> dict[str, Any]:
    """What the rows came to, source by source and in all: the part of `details.json` that the rows alone tell.

    `retain` is there only where the recipe names such rows, which stand in no other count.
    """
    everything = [*training.values(), *held_out.values()]
    parts = {"train": training, "validation": held_out}
    counts = {part: [count(name, one) for name, one in sources.items()] for part, sources in parts.items()}
    noted = Counter(note for one in everything for note in one.notes if note)
    return {
        **{part: _total(counts[part]) for part in parts},
        **({"retention_eval": asdict(count(*one))} if (one := next(iter(retained.items()), None)) else {}),
        "sources": {part: [asdict(one) for one in counts[part]] for part in parts},
        "first_dropped": {part: [_first_dropped(one) for one in sources.values()] for part, sources in parts.items()},
        "duplicates": sum(map(len, training.values())) - len(numpy.unique(_said(training))),
        "leaks": _leaks(training, held_out),
        "noted": dict(noted),
        "rows_that_differ": sum(many for note, many in noted.items() if DIFFERS in note),
        "end_of_turn_ids": sorted(frozenset[int]().union(*(one.stop_ids for one in everything))),
        "how": ", ".join(sorted(frozenset[str]().union(*(one.hows for one in everything)))),
    }


def _total(counts: Sequence[Counts]) -> dict[str, int]:
    keys = [key for key, kind in Counts.__annotations__.items() if kind == "int"]
    return {key: sum(getattr(one, key) for one in counts) for key in keys}


def _first_dropped(labelled: Labelled) -> str | None:
    """Where the first row stands of which nothing to learn from was left."""
    dropped = numpy.flatnonzero(labelled.trained == 0)
    return labelled.where[int(dropped[0])] if len(dropped) else None


def _leaks(training: Mapping[str, Labelled], held_out: Mapping[str, Labelled]) -> dict[str, Any]:
    """Validation rows that stand in training, white space aside: how many of how many, and the first pair's places."""
    train, validation = _said(training), _said(held_out)
    leaked = numpy.isin(validation, train)
    found = {"rows": int(leaked.sum()), "of": len(validation), "where": None, "twin": None}
    if leaked.any():
        place = int(numpy.flatnonzero(leaked)[0])
        found["where"] = [where for one in held_out.values() for where in one.where][place]
        twin = int(numpy.flatnonzero(train == validation[place])[0])
        found["twin"] = [where for one in training.values() for where in one.where][twin]
    return found


def _said(sources: Mapping[str, Labelled]) -> numpy.ndarray:
    """The digests of all rows of several sources."""
    return numpy.concatenate([numpy.zeros(0, numpy.uint64), *(one.said for one in sources.values())])


def check(plan: Plan, details: Mapping[str, Any]) -> None:
    """Refuses prepared data that breaks the contract by more than the recipe tolerates.

    Raises:
        DataError: too many rows without a token to learn from, validation rows that stand in training, rows to retain
            of which nothing is left, or tokens that are new to a model whose embeddings are not trained.
    """
    data = plan.sections.data
    for part, key in (("train", "data.train"), ("validation", "data.validation")):
        for counts, first in zip(details["sources"][part], details["first_dropped"][part], strict=True):
            if counts["dropped"] > data.max_dropped_fraction * counts["read"]:
                raise DataError(
                    f"{key}: trainer.max_length={plan.max_length} leaves {counts['dropped']} of {counts['read']} rows "
                    f"without a token to learn from (the first: {first}), more than data.max_dropped_fraction="
                    f"{data.max_dropped_fraction:g}; say a larger trainer.max_length"
                )
    retain = details.get("retention_eval")
    if retain and not retain["examples"]:
        raise DataError(
            f"data.retention_eval: trainer.max_length={plan.max_length} leaves none of {retain['read']} rows with a "
            f"token to measure; say a larger trainer.max_length, or other rows"
        )
    leaked = details["leaks"]
    if leaked["rows"] > data.max_overlap * leaked["of"]:
        share = math.ceil(1000 * leaked["rows"] / leaked["of"]) / 1000
        raise DataError(
            f"{leaked['where']}: this validation row stands in training too ({leaked['twin']}), and so do "
            f"{leaked['rows'] - 1} others of {leaked['of']}; take them out of one of the two, or say "
            f"data.max_overlap={share:g} if that is meant"
        )
    if details["new_tokens"] and plan.method != "full":
        raise DataError(
            f"model: {', '.join(details['new_tokens'])} is new to the model, and {plan.method} trains no embeddings; "
            f"take a tokenizer that has it, with a token free for padding, or full fine-tuning"
        )


def lines(details: Mapping[str, Any]) -> list[str]:
    """The report of prepared data (`details.json`) as a person reads it."""
    said = []
    for part in ("train", "validation"):
        for one in details["sources"][part]:
            said += [f"{part:<12}{one['name']}: {_rows(one)}", *(" " * 12 + line for line in _more(one))]
    if retain := details.get("retention_eval"):
        said.append(f"{'retention_eval':<12}{retain['name']}: {_rows(retain)}")
    if len(details["sources"]["train"]) > 1 and details["duplicates"]:
        said.append(f"{'twice':<12}{details['duplicates']:,} training rows say what another one of any source says")
    leaked = details["leaks"]
    twins = f", the first {leaked['where']} and {leaked['twin']}" if leaked["rows"] else ""
    said.append(f"{'in both':<12}{leaked['rows'] or 'none'}{twins}")
    ends, cut = ", ".join(details["end_of_turn"]), details["train"]["cut"]
    whole = "every turn" if not cut else f"every turn but those that the length limit cuts ({cut:,} rows)"
    said.append(f"{'end of turn':<12}{ends}, supervised in {whole}; padding is {details['padding']}")
    said += [f"{'note':<12}{note}" for note in details["notes"]]
    if not details["rows_that_differ"]:
        said.append(f"{'template':<12}rendered as at inference, byte for byte ({details['how']})")
    return said


def _rows(one: Mapping[str, Any]) -> str:
    share = one["supervised_tokens"] / max(one["tokens"], 1)
    dropped = f", {one['dropped']:,} dropped: nothing to learn from was left of them" if one["dropped"] else ""
    return (
        f"{one['read']:,} rows read, {one['examples']:,} kept{dropped}; {one['tokens']:,} tokens, "
        f"{one['supervised_tokens']:,} supervised ({share:.0%})"
    )


def _more(one: Mapping[str, Any]) -> list[str]:
    lengths = ", ".join(
        f"{value:,} ({'longest' if p == '100' else f'{p}%'})" for p, value in one["percentiles"].items()
    )
    more = [f"tokens a row: {lengths}"]
    if one["cut"]:
        more.append(
            f"{one['cut']:,} rows are longer than the limit and lose {one['lost_tokens']:,} tokens, "
            f"{one['lost_supervised_tokens']:,} of them supervised; {one['unanswered']:,} lose an answer with its "
            f"question"
        )
    if one["duplicates"]:
        more.append(f"{one['duplicates']:,} rows say what an earlier row says")
    if one["markers_as_text"]:
        more.append(f"{one['markers_as_text']:,} rows write control tokens in their text; they were encoded as text")
    if one["dropped_reasoning"]:
        more.append(f"{one['dropped_reasoning']:,} rows lose the reasoning of earlier turns, as at inference")
    if one["shares_a_token"]:
        more.append(f"{one['shares_a_token']:,} rows have an answer whose first token is partly the prompt's")
    return more
