"""Keeps the ledger of rows: which were really fed to each optimizer step, compared with those that its epoch deals out.

Rows carry their number from the data set through sampler, workers and collator to the batch. What a step was fed is
compared over all ranks and micro-batches, so that a row used twice, left out, or dealt to two ranks is found, whoever
dealt it. The ranks' numbers are brought together at each log line, save and epoch's end, in one exchange.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sft_recipes.runtime.errors import TrainingError

ROW = "row"  # a row's number, as a column of the training rows and in a batch

REPORT = "that is a fault of this program or of a library below it: report it with plan.json and log.txt"
_ROWS_SHOWN = 8


def number(rows: Any) -> Any:
    """The training rows, a datasets.Dataset, each with its number."""
    return rows.add_column(ROW, torch.arange(len(rows)).numpy())


def carry(examples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
    """A collated batch with the numbers of its rows, where they have any: those to validate on have none."""
    return {**batch, ROW: torch.tensor([example[ROW] for example in examples])} if ROW in examples[0] else batch


class DataOrderCheck:
    """The steps that were found right so far, and a chain of hashes over the rows of each.

    The chain does not depend on how rows were dealt to micro-batches and ranks.
    """

    def __init__(self, order: Callable[[int], torch.Tensor], rows_a_step: int, steps_an_epoch: int):
        """`order` gives the rows of an epoch, the first being 0, as they are dealt out."""
        self._order = order
        self._rows_a_step = rows_a_step
        self._steps_an_epoch = steps_an_epoch
        self._drawn: tuple[int, torch.Tensor] | None = None
        self._pending: list[torch.Tensor] = []
        self.steps = 0
        self.chain = ""

    def restore_state(self, steps: int, chain: str) -> None:
        """Goes on behind the steps of an earlier start."""
        self.steps, self.chain = steps, chain
        self._pending.clear()

    def saw(self, batches: Iterable[dict[str, Any]]) -> None:
        """Takes the numbers out of a step's micro-batches on this rank: a model does not know what they are."""
        rows = [batch.pop(ROW) for batch in batches]
        if rows:
            self._pending.append(torch.cat(rows))

    def settle(self) -> None:
        """Compares the steps since the last call. All ranks take part.

        Raises:
            TrainingError: a step was fed other rows than its epoch's order deals out to it.
        """
        from accelerate.utils import gather_object

        lengths = [len(rows) for rows in self._pending]
        rows = torch.cat(self._pending).tolist() if self._pending else []  # waits for the device once
        self._pending.clear()
        each = iter(rows)
        of_ranks = gather_object([[[next(each) for _ in range(length)] for length in lengths]])
        for fed in zip(*of_ranks, strict=True):
            self._take(fed)

    def _take(self, fed: Sequence[list[int]]) -> None:
        """One more step, of the rows that each rank was fed."""
        epoch, step = divmod(self.steps, self._steps_an_epoch)
        order = self._order_of(epoch)
        wanted = sorted(order[step * self._rows_a_step : (step + 1) * self._rows_a_step].tolist())
        found = sorted(row for rows in fed for row in rows)
        if found != wanted:
            wrong = _what_is_wrong(fed, wanted, order, self._rows_a_step)
            raise TrainingError(
                f"epoch {epoch + 1}, step {self.steps + 1}: {wrong}; rows are counted from 0 as they were prepared, no "
                f"checkpoint holds that step; {REPORT}"
            )
        self.steps += 1
        self.chain = hashlib.sha256(f"{self.chain} {self.steps} {found}".encode()).hexdigest()[:32]

    def _order_of(self, epoch: int) -> torch.Tensor:
        """The order of an epoch, which is kept: a long one takes a while to draw."""
        if self._drawn is None or self._drawn[0] != epoch:
            order = self._order(epoch)
            many, row = torch.bincount(order).max(0)
            if many > 1:
                raise TrainingError(f"epoch {epoch + 1}: its order deals row {row} out {many} times; {REPORT}")
            self._drawn = (epoch, order)
        return self._drawn[1]

    def end_epoch(self, steps: int) -> None:
        """Looks whether so many steps, the last of which ended an epoch, are whole epochs.

        Raises:
            TrainingError: the rows ran out too early.
        """
        epochs, more = divmod(steps, self._steps_an_epoch)
        if more:
            raise TrainingError(
                f"epoch {epochs + 1} ended behind {more} of its {self._steps_an_epoch} steps, its other rows were left "
                f"out; {REPORT}"
            )


def _what_is_wrong(fed: Sequence[list[int]], wanted: Sequence[int], order: torch.Tensor, rows_a_step: int) -> str:
    """Which rows a step was fed twice, on which ranks; which are another step's; which of its own it was not fed."""
    many = Counter(row for rows in fed for row in rows)
    said = []
    for row in sorted(row for row, times in many.items() if times > 1)[:_ROWS_SHOWN]:
        ranks = [str(rank) for rank, rows in enumerate(fed) for _ in range(rows.count(row))]
        said.append(f"row {row} was fed {many[row]} times (ranks {', '.join(ranks)})")
    of_others = sorted(many.keys() - set(wanted))
    if of_others:
        said.append(f"rows that are another step's were fed: {_listed(of_others, order, rows_a_step)}")
    absent = sorted(set(wanted) - many.keys())
    if absent:
        shown = ", ".join(map(str, absent[:_ROWS_SHOWN]))
        said.append(f"left out: {shown}{f' and {len(absent) - _ROWS_SHOWN} more' if len(absent) > _ROWS_SHOWN else ''}")
    return "; ".join(said)


def _listed(rows: Sequence[int], order: torch.Tensor, rows_a_step: int) -> str:
    """Rows, each with the step of the epoch that it belongs to, where it belongs to one."""
    said = []
    for row in rows[:_ROWS_SHOWN]:
        places = (order == row).nonzero().flatten().tolist()
        said.append(f"{row} ({f'step {places[0] // rows_a_step + 1} of the epoch' if places else 'not in this epoch'})")
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return ", ".join(said) + more
