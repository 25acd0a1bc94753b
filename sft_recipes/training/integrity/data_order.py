"""Data-order check: the rows fed to each optimizer step are the rows that the epoch's order assigns to it.

Rows keep their number from the dataset through sampler, workers and collator into the batch. A step's rows are
compared over all ranks and micro-batches, so a row that is used twice, skipped, or fed to two ranks is found, whichever
component caused it. Ranks exchange row numbers at each log line, save and end of an epoch, in one collective.
"""

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

from sft_recipes.runtime.errors import TrainingError

ROW = "row"  # a row's number, as a column of the training rows and in a batch

_REPORT = "This is a bug in sft_recipes or a library: report it with plan.json and log.txt"


class DataOrderCheck:
    """Checks the rows of each step, and hashes them; independent of how ranks and micro-batches divide them.

    Attributes:
        steps: steps checked so far.
        rows_hash: hash chain over the rows of these steps.
    """

    def __init__(self, sampler: Any):
        """Set up; the sampler is another one than the data loader's, which may be faulty."""
        self._sampler = sampler
        self._pending: list[list[int]] = []
        self.steps = 0
        self.rows_hash = ""

    def record_batches(self, batches: Iterable[dict[str, Any]]) -> None:
        """Remove the row numbers from a step's micro-batches on this rank, and record them."""
        if rows := [row for batch in batches for row in batch.pop(ROW).tolist()]:
            self._pending.append(rows)

    def check_pending(self, steps_taken: int, epoch_ended: bool = False) -> None:
        """Check the steps recorded since the last call. Collective: call on every rank.

        Raises:
            TrainingError: a step was fed other rows than its epoch's order assigns to it, or an epoch ended early.
        """
        from accelerate.utils import gather_object

        steps_of_ranks = gather_object([self._pending])
        self._pending = []
        for rows_of_ranks in zip(*steps_of_ranks, strict=True):
            fed, expected = sorted(itertools.chain(*rows_of_ranks)), sorted(self._sampler.rows_of_step(self.steps))
            self.steps += 1
            if fed != expected:
                raise TrainingError(f"step {self.steps}: fed other rows than its epoch's order has. {_REPORT}")
            self.rows_hash = hashlib.sha256(f"{self.rows_hash} {self.steps} {fed}".encode()).hexdigest()[:32]
        ended_early = epoch_ended and steps_taken % self._sampler.steps_per_epoch
        if self.steps != steps_taken or ended_early:
            raise TrainingError(f"step {steps_taken}: rows of the epoch were skipped. {_REPORT}")
