"""Turns stop signals of the launcher into a stop request that the current phase handles."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from sft_recipes.runtime.heartbeat import STOP_SIGNALS


@dataclass
class StopRequest:
    """Stop signals that this process has received, in order."""

    signals: list[int] = field(default_factory=list)

    @property
    def requested(self) -> bool:
        """Whether any signal was received."""
        return bool(self.signals)

    @property
    def force_quit(self) -> bool:
        """Whether Ctrl-C was pressed twice: do not wait for the save. A scheduler's second signal does not count."""
        return self.signals.count(signal.SIGINT) > 1

    def check(self) -> None:
        """Raises:
        StoppedError: a stop was requested.
        """
        if self.signals:
            raise StoppedError


class StoppedError(Exception):
    """A stop was requested before there was a process to stop."""


@contextlib.contextmanager
def handle_stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM, SIGINT, SIGUSR1 and SIGHUP (a closed terminal, unless `nohup` ignores it) instead of exiting."""
    request = StopRequest()

    def record(number: int, _frame: FrameType | None) -> None:
        request.signals.append(number)

    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    previous = {number: signal.signal(number, record) for number in (*STOP_SIGNALS, *hangup)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
