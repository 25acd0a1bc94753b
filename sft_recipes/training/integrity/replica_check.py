"""Compares the copies of the weights that ranks hold under DDP, and names the rank whose memory or GPU changed its own.

All ranks start from the same weights and apply the same gradients, so that their weights never differ in a bit. A bit
that flips in one rank's memory makes no error: that rank goes on with other gradients, which all ranks then share.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.runtime.errors import TrainingError
from sft_recipes.training.integrity import fingerprint

_PARAMETERS_SHOWN = 3


class ReplicaCheck:
    """Knows what this rank held when copies were compared last, until its next optimizer step."""

    def __init__(self) -> None:
        self._compared: dict[str, str] | None = None

    def compare(self, trainer: Any, step: int) -> None:
        """Behind a step. All ranks take part, with a few bytes each.

        Raises:
            TrainingError: the ranks' weights differ.
        """
        mine = fingerprint.of_each(fingerprint.parameters(trainer.model))
        every = _gathered(fingerprint.of_all(mine))
        if len(set(every)) > 1:
            raise TrainingError(_who_differs(step, every, _gathered(mine), _gathered(socket.gethostname())))
        self._compared = mine

    def compare_with_before(self, trainer: Any, step: int) -> None:
        """Before the step that follows a comparison is applied: until then nothing may change a weight, so that a rank
        whose weights changed is told by itself. All ranks take part.

        Raises:
            TrainingError: a rank's weights are not those that it had.
        """
        if self._compared is None:
            return
        now = fingerprint.of_each(fingerprint.parameters(trainer.model))
        changed = [name for name, digest in now.items() if digest != self._compared[name]]
        self._compared = None
        every = _gathered(changed)
        if any(every):
            hosts = _gathered(socket.gethostname())
            ranks = [rank for rank, names in enumerate(every) if names]
            raise TrainingError(
                f"between steps {step - 1} and {step}: weights changed in the memory of "
                f"{_listed(ranks, hosts)} though no step was taken ({_shown(every[ranks[0]])}); {_way_out(ranks)}"
            )


def minority(every: Sequence[str]) -> list[int]:
    """The ranks whose digest is not that of more than half of them; all of them where there is no such half."""
    digest, many = Counter(every).most_common(1)[0]
    ranks = range(len(every))
    return [rank for rank in ranks if every[rank] != digest] if 2 * many > len(every) else list(ranks)


def _who_differs(step: int, every: Sequence[str], each: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    ranks = minority(every)
    differ = [name for name in each[0] if len({of_rank[name] for of_rank in each}) > 1]
    if len(ranks) < len(every):
        who = f"the weights of {_listed(ranks, hosts)} are not those of the other {len(every) - len(ranks)} ranks"
    else:
        who = f"the weights of {_listed(ranks, hosts)} differ, and no majority tells whose are right"
    return f"step {step}: {who} ({_shown(differ)}); {_way_out(ranks)}"


def _listed(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return " and ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _PARAMETERS_SHOWN
    return ", ".join(names[:_PARAMETERS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _way_out(ranks: Sequence[int]) -> str:
    suspects = "its GPU or memory is" if len(ranks) == 1 else "one of their GPUs or memories is"
    return (
        f"{suspects} suspect (look at ECC errors and the kernel's log); no checkpoint was written from these weights, "
        f"the same command goes on from the newest one: leave the suspect out with DEVICES=… or another node"
    )


def _gathered(mine: Any) -> list[Any]:
    """Something small of each rank, on every rank."""
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([mine])
    return found
