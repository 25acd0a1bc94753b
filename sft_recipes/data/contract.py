"""What the loss will see, counted, and the promises that rows must keep before a GPU is taken.

That each assistant's turn is supervised with its end, and nothing else, is held row by row where rows are rendered
(sft_recipes.data.spans, sft_recipes.data.chat). Here stands what only all rows together tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from sft_recipes.data.labelling import Labelled
from sft_recipes.planning.schema import RecipeError

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows; tokens count each example's own, before packing.

    `cut` rows were longer than `max_length` and lost `lost_tokens`, `lost_supervised_tokens` of them supervised;
    `dropped` ones had nothing left to learn from, `unanswered` ones keep a question whose answer was cut.
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
        markers_as_text=labelled.markers_as_text,
        dropped_reasoning=labelled.dropped_reasoning,
        percentiles={str(p): int(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
    )


def total(counts: Sequence[Counts]) -> dict[str, int]:
    """The sums over several sources."""
    keys = [key for key, kind in Counts.__annotations__.items() if kind == "int"]
    return {key: sum(getattr(one, key) for one in counts) for key in keys}


def check_dropped(key: str, counts: Counts, labelled: Labelled, max_length: int, at_most: float) -> None:
    """Refuses data of which too much is left without a token to learn from.

    Raises:
        RecipeError: a larger share of the rows than `at_most`.
    """
    if counts.dropped > at_most * counts.read:
        first = labelled.where[int(numpy.flatnonzero(labelled.trained == 0)[0])]
        raise RecipeError(
            f"{key}: trainer.max_length={max_length} leaves {counts.dropped} of {counts.read} rows without a token to "
            f"learn from (the first: {first}), more than data.dropped_at_most={at_most:g}; say a larger "
            f"trainer.max_length"
        )


def check_leaks(training: Mapping[str, Labelled], held_out: Mapping[str, Labelled], at_most: float) -> int:
    """Refuses validation rows that stand in training, white space aside; their number where they are tolerated.

    Raises:
        RecipeError: a larger share of the validation rows than `at_most`.
    """
    train = together_said(training)
    validation = together_said(held_out)
    leaked = numpy.isin(validation, train)
    if leaked.sum() > at_most * len(validation):
        wheres = [where for one in held_out.values() for where in one.where]
        place = int(numpy.flatnonzero(leaked)[0])
        of_training = [where for one in training.values() for where in one.where]
        twin = of_training[int(numpy.flatnonzero(train == validation[place])[0])]
        raise RecipeError(
            f"{wheres[place]}: this validation row stands in training too ({twin}), and so do {leaked.sum() - 1} "
            f"others of {len(validation)}; take them out of one of the two, or say data.leaked_at_most="
            f"{leaked.sum() / len(validation):.2g} if that is meant"
        )
    return int(leaked.sum())


def together_said(sources: Mapping[str, Labelled]) -> numpy.ndarray:
    """The digests of all rows of several sources."""
    return numpy.concatenate([numpy.zeros(0, numpy.uint64), *(one.said for one in sources.values())])


def lines(details: Mapping[str, Any]) -> list[str]:
    """The report of prepared data (`details.json`) as a person reads it."""
    said = []
    for part in ("train", "validation"):
        for one in details["sources"][part]:
            said += [f"{part:<12}{one['name']}: {_rows(one)}", *(" " * 12 + line for line in _more(one))]
    fill = details["rows"]
    if fill["packed"]:
        said.append(
            f"{'packing':<12}{fill['rows']:,} rows of {fill['max_length']:,}, {fill['non_padding']:.2%} of their "
            f"tokens are examples'; {fill['padding_tokens']:,} are padding"
        )
    else:
        said.append(
            f"{'padding':<12}about {fill['padding_tokens']:,} tokens an epoch, in batches of "
            f"{fill['per_device']} as long as their longest row"
        )
    leaked = details["leaked"]
    said.append(f"{'in both':<12}{leaked:,} validation rows stand in training" if leaked else f"{'in both':<12}none")
    ends = ", ".join(details["end_of_turn"])
    said.append(f"{'end of turn':<12}{ends}, supervised in every turn; padding is {details['padding']}")
    said += [f"{'note':<12}{note}" for note in details["notes"]]
    if not details["notes"]:
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
            f"{one['lost_supervised_tokens']:,} of them supervised; {one['unanswered']:,} end with a question whose "
            f"answer was cut"
        )
    if one["duplicates"]:
        more.append(f"{one['duplicates']:,} rows say what an earlier row says")
    if one["markers_as_text"]:
        more.append(f"{one['markers_as_text']:,} rows write control tokens in their text; they were encoded as text")
    if one["dropped_reasoning"]:
        more.append(f"{one['dropped_reasoning']:,} rows lose the reasoning of earlier turns, as at inference")
    return more
