"""Replica consistency check: compare the weights of all DDP ranks, and name a rank whose memory or GPU changed its own.

All ranks start from the same weights and apply the same gradients, so their weights are bitwise equal. A bit flip in
one rank's memory raises no error: that rank continues with other gradients, which the all-reduce spreads to all.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sft_recipes.runtime.errors import TrainingError
from sft_recipes.training.integrity import fingerprint


def compare(trainer: Any, step: int) -> None:
    """Compare the weights of all ranks after a step. Collective, a few bytes per rank.

    Raises:
        TrainingError: the ranks' weights differ.
    """
    from accelerate.utils import gather_object

    fingerprints, hosts = zip(*gather_object([(fingerprint.weights(trainer), socket.gethostname())]), strict=True)
    if len(set(fingerprints)) == 1:
        return
    suspects = find_minority(fingerprints)
    others = len(fingerprints) - len(suspects)
    names = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in suspects)
    difference = f"differ from those of the other {others} ranks" if others else "differ, without a majority"
    cause = "a GPU or memory there is suspect, these weights are in no checkpoint"
    fix = "Check ECC errors, exclude it with DEVICES=… or another node, and repeat the command"
    raise TrainingError(f"step {step}: the weights of {names} {difference}: {cause}. {fix}")


def find_minority(fingerprints: Sequence[str]) -> list[int]:
    """Return the ranks that differ from more than half of the ranks; all ranks if there is no such majority."""
    majority, count = Counter(fingerprints).most_common(1)[0]
    ranks = range(len(fingerprints))
    return [rank for rank in ranks if fingerprints[rank] != majority] if 2 * count > len(ranks) else list(ranks)
