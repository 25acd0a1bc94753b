"""Hears that this rank is asked to stop, from its first moment on, and leaves the decision to all ranks together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from sft_recipes.planning.processes import ASKING

_asked = False


def listen() -> None:
    """From here on a signal is remembered; again and again changes nothing."""
    for number in ASKING:
        signal.signal(number, _remember)


def asked() -> bool:
    """Whether this rank was asked to stop."""
    return _asked


def heed_the_rank_alone(begin: Callable[[int], None] | None, worker: int) -> None:
    """What a data worker begins with, and then with `begin`: nobody ends it but its rank.

    A scheduler asks every process of a job to stop, and a rank whose worker is gone fails instead of saving: what torch
    has its workers do with a SIGTERM that is not their rank's is to die of it.
    """
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    if begin is not None:
        begin(worker)


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _asked  # noqa: PLW0603  a signal handler has no other way to leave word
    _asked = True
