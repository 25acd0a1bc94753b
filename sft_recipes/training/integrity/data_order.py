"""Data-order check: the rows fed to each optimizer step are the rows that the epoch's order assigns to it.

Rows keep their number from the dataset through sampler, workers and collator into the batch. A step's rows are
compared over all ranks and micro-batches, so a row that is used twice, skipped, or fed to two ranks is found, whichever
component caused it. Ranks exchange row numbers at each log line, save and end of an epoch, in one collective.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sft_recipes.runtime.errors import TrainingError

ROW = "row"  # a row's number, as a column of the training rows and in a batch

REPORT = "this is a bug in sft_recipes or a library: report it with plan.json and log.txt"
_ROWS_SHOWN = 8


def add_row_numbers(rows: Any) -> Any:
    """Add each row's number to the training rows, a `datasets.Dataset`."""
    return rows.add_column(ROW, torch.arange(len(rows)).numpy())


def keep_row_numbers(examples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
    """Add the row numbers to a collated batch; validation rows have none."""
    return {**batch, ROW: torch.tensor([example[ROW] for example in examples])} if ROW in examples[0] else batch


class DataOrderCheck:
    """Checks the rows of each step, and hashes them; independent of how ranks and micro-batches divide them.

    Attributes:
        steps: steps checked so far.
        rows_hash: hash chain over the rows of these steps.
    """

    def __init__(
        self,
        epoch_order: Callable[[int], torch.Tensor],
        rows_per_step: int,
        steps_per_epoch: int,
        most_uses: torch.Tensor | None = None,
    ):
        """Set up.

        Args:
            epoch_order: returns the rows of an epoch (the first is 0) in the order of use.
            most_uses: how often each row may be used in an epoch, [rows]; once if None.
        """
        self._epoch_order = epoch_order
        self._most_uses = most_uses
        self._rows_per_step = rows_per_step
        self._steps_per_epoch = steps_per_epoch
        self._cached_order: tuple[int, torch.Tensor] | None = None
        self._pending: list[torch.Tensor] = []
        self.steps = 0
        self.rows_hash = ""

    def restore_state(self, steps: int, rows_hash: str) -> None:
        """Continue after the steps of an earlier attempt."""
        self.steps, self.rows_hash = steps, rows_hash
        self._pending.clear()

    def record_batches(self, batches: Iterable[dict[str, Any]]) -> None:
        """Remove the row numbers from a step's micro-batches on this rank, and record them."""
        rows = [batch.pop(ROW) for batch in batches]
        if rows:
            self._pending.append(torch.cat(rows))

    def check_pending(self) -> None:
        """Check the steps recorded since the last call. Collective: call on every rank.

        Raises:
            TrainingError: a step was fed other rows than its epoch's order assigns to it.
        """
        from accelerate.utils import gather_object

        lengths = [len(rows) for rows in self._pending]
        rows = torch.cat(self._pending).tolist() if self._pending else []  # one device synchronization
        self._pending.clear()
        iterator = iter(rows)
        steps_of_ranks = gather_object([[[next(iterator) for _ in range(length)] for length in lengths]])
        for rows_of_ranks in zip(*steps_of_ranks, strict=True):
            self._check_step(rows_of_ranks)

    def _check_step(self, rows_of_ranks: Sequence[list[int]]) -> None:
        epoch, step = divmod(self.steps, self._steps_per_epoch)
        order = self._get_order(epoch)
        expected = sorted(order[step * self._rows_per_step : (step + 1) * self._rows_per_step].tolist())
        fed = sorted(row for rows in rows_of_ranks for row in rows)
        if fed != expected:
            difference = _describe_difference(rows_of_ranks, expected, order, self._rows_per_step)
            raise TrainingError(
                f"epoch {epoch + 1}, step {self.steps + 1}: {difference}; rows are counted from 0 as prepared, the "
                f"step is in no checkpoint; {REPORT}"
            )
        self.steps += 1
        self.rows_hash = hashlib.sha256(f"{self.rows_hash} {self.steps} {fed}".encode()).hexdigest()[:32]

    def _get_order(self, epoch: int) -> torch.Tensor:
        """Return an epoch's order, cached: a long one takes time to draw."""
        if self._cached_order is None or self._cached_order[0] != epoch:
            order = self._epoch_order(epoch)
            uses = torch.bincount(order)
            excess, row = (uses - (1 if self._most_uses is None else self._most_uses[: len(uses)])).max(0)
            if excess > 0:
                raise TrainingError(f"epoch {epoch + 1}: its order uses row {row} {uses[row]} times; {REPORT}")
            self._cached_order = (epoch, order)
        return self._cached_order[1]

    def check_epoch_end(self, steps: int) -> None:
        """Check that `steps` steps, the last of which ended an epoch, are complete epochs.

        Raises:
            TrainingError: the epoch ended early.
        """
        epochs, remainder = divmod(steps, self._steps_per_epoch)
        if remainder:
            raise TrainingError(
                f"epoch {epochs + 1} ended after {remainder} of {self._steps_per_epoch} steps, its other rows were "
                f"skipped; {REPORT}"
            )


def _describe_difference(
    rows_of_ranks: Sequence[list[int]], expected: Sequence[int], order: torch.Tensor, rows_per_step: int
) -> str:
    """List repeated rows with their ranks, rows of other steps, and missing rows."""
    counts, planned = Counter(row for rows in rows_of_ranks for row in rows), Counter(expected)
    parts = []
    for row in sorted(row for row, count in counts.items() if count > max(planned[row], 1))[:_ROWS_SHOWN]:
        ranks = [str(rank) for rank, rows in enumerate(rows_of_ranks) for _ in range(rows.count(row))]
        parts.append(f"row {row} was fed {counts[row]} times (ranks {', '.join(ranks)})")
    unexpected = sorted(counts.keys() - set(expected))
    if unexpected:
        parts.append(f"rows of other steps were fed: {_list_rows(unexpected, order, rows_per_step)}")
    missing = sorted((planned - counts).elements())
    if missing:
        shown = ", ".join(map(str, missing[:_ROWS_SHOWN]))
        more = f" and {len(missing) - _ROWS_SHOWN} more" if len(missing) > _ROWS_SHOWN else ""
        parts.append(f"missing: {shown}{more}")
    return "; ".join(parts)


def _list_rows(rows: Sequence[int], order: torch.Tensor, rows_per_step: int) -> str:
    """List rows, each with the step of the epoch that it belongs to."""
    shown = []
    for row in rows[:_ROWS_SHOWN]:
        positions = (order == row).nonzero().flatten().tolist()
        step = f"step {positions[0] // rows_per_step + 1} of the epoch" if positions else "not in this epoch"
        shown.append(f"{row} ({step})")
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return ", ".join(shown) + more
