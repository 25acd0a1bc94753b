"""Remembers that this rank received a stop signal; all ranks decide together when to stop."""

import os
import signal
import threading
from types import FrameType

from sft_recipes.runtime.heartbeat import STOP_SIGNALS

_requested = False


def handle() -> None:
    """Remember stop signals from now on, and have forked children accept SIGTERM from this rank only."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)
    os.register_at_fork(after_in_child=accept_sigterm_of_parent_only)


def accept_sigterm_of_parent_only() -> None:
    """Have a child of a rank, such as a data worker, exit at its rank's SIGTERM and ignore any other.

    A scheduler signals every process of a job, and a rank whose data worker is gone fails instead of saving. torch's
    workers exit at any SIGTERM, so the signal is blocked in all their threads but one.
    """
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # inherited by threads that start after this

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def requested() -> bool:
    """Return whether this rank received a stop signal."""
    return _requested


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _requested  # noqa: PLW0603  a signal handler returns no value
    _requested = True
