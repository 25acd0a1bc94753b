"""Hears that this rank is asked to stop, from its first moment on, and leaves the decision to all ranks together."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from sft_recipes.runtime.heartbeat import ASKING

_asked = False


def listen() -> None:
    """From here on a signal is remembered, and those that this rank forks heed it alone."""
    for number in ASKING:
        signal.signal(number, _remember)
    os.register_at_fork(after_in_child=heed_the_rank_alone)


def heed_the_rank_alone() -> None:
    """Has a child of a rank, such as a data worker, end by SIGTERM where that is the rank's, and stay where it is not.

    A scheduler asks every process of a job to stop, and a rank whose data worker is gone fails instead of saving. torch
    has its workers die of a SIGTERM that is not their rank's, so none of their threads gets to hear it but one.
    """
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # threads that are begun from here on take that over

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def asked() -> bool:
    """Whether this rank was asked to stop."""
    return _asked


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _asked  # noqa: PLW0603  a signal handler has no other way to leave word
    _asked = True
