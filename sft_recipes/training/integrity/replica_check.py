"""Replica consistency check: compare the weights of all DDP ranks, and name a rank whose memory or GPU changed its own.

All ranks start from the same weights and apply the same gradients, so their weights are bitwise equal. A bit flip in
one rank's memory raises no error: that rank continues with other gradients, which the all-reduce spreads to all.
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
    """Compares fingerprints of the weights; keeps this rank's own until its next optimizer step."""

    def __init__(self) -> None:
        self._compared: dict[str, str] | None = None

    def compare(self, trainer: Any, step: int) -> None:
        """Compare all ranks after a step. Collective, a few bytes per rank.

        Raises:
            TrainingError: the ranks' weights differ.
        """
        own = fingerprint.of_each(fingerprint.parameters(trainer.model))
        all_ranks = _gather(fingerprint.of_all(own))
        if len(set(all_ranks)) > 1:
            raise TrainingError(_describe_difference(step, all_ranks, _gather(own), _gather(socket.gethostname())))
        self._compared = own

    def compare_before_step(self, trainer: Any, step: int) -> None:
        """Compare each rank with its own earlier fingerprint, before the step after a comparison is applied.

        No weight may change in between, so a rank with changed weights is identified without a majority. Collective.

        Raises:
            TrainingError: a rank's weights changed.
        """
        if self._compared is None:
            return
        current = fingerprint.of_each(fingerprint.parameters(trainer.model))
        changed = [name for name, value in current.items() if value != self._compared[name]]
        self._compared = None
        changed_of_ranks = _gather(changed)
        if any(changed_of_ranks):
            hosts = _gather(socket.gethostname())
            ranks = [rank for rank, names in enumerate(changed_of_ranks) if names]
            raise TrainingError(
                f"between steps {step - 1} and {step}: weights changed in the memory of {_list_ranks(ranks, hosts)} "
                f"without an optimizer step ({_list_names(changed_of_ranks[ranks[0]])}); {_hint(ranks)}"
            )


def find_minority(fingerprints: Sequence[str]) -> list[int]:
    """Return the ranks that differ from more than half of the ranks; all ranks if there is no such majority."""
    majority, count = Counter(fingerprints).most_common(1)[0]
    ranks = range(len(fingerprints))
    return [rank for rank in ranks if fingerprints[rank] != majority] if 2 * count > len(ranks) else list(ranks)


def _describe_difference(
    step: int, fingerprints: Sequence[str], by_name: Sequence[Mapping[str, str]], hosts: Sequence[str]
) -> str:
    ranks = find_minority(fingerprints)
    names = [name for name in by_name[0] if len({rank_values[name] for rank_values in by_name}) > 1]
    if len(ranks) < len(fingerprints):
        difference = f"differ from those of the other {len(fingerprints) - len(ranks)} ranks"
    else:
        difference = "differ, without a majority"
    return (
        f"step {step}: the weights of {_list_ranks(ranks, hosts)} {difference} ({_list_names(names)}); {_hint(ranks)}"
    )


def _list_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return " and ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)


def _list_names(names: Sequence[str]) -> str:
    more = len(names) - _PARAMETERS_SHOWN
    return ", ".join(names[:_PARAMETERS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _hint(ranks: Sequence[int]) -> str:
    suspects = "its GPU or memory is" if len(ranks) == 1 else "one of their GPUs or memories is"
    return (
        f"{suspects} suspect, these weights are in no checkpoint. Check ECC errors and the kernel log, exclude it with "
        f"DEVICES=… or another node, and repeat the command"
    )


def _gather(value: Any) -> list[Any]:
    """Gather a small object of each rank on every rank."""
    from accelerate.utils import gather_object

    values: list[Any] = gather_object([value])
    return values
