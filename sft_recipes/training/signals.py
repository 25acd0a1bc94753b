"""Hears that this rank is asked to stop, from its first moment on, and leaves the decision to all ranks together."""

from __future__ import annotations

import os
import signal
import socket
from types import FrameType

from sft_recipes.planning.run_folder import RunFolder

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_asked = False


def listen(folder: RunFolder, rank: int) -> None:
    """From here on a signal is remembered, and the launcher knows which process to send it to."""
    for number in _SIGNALS:
        signal.signal(number, _remember)
    folder.ranks.mkdir(exist_ok=True)
    file = folder.ranks / f"{socket.gethostname()}-{rank}"
    file.with_name(f".{file.name}").write_text(str(os.getpid()), encoding="ascii")
    file.with_name(f".{file.name}").replace(file)


def asked() -> bool:
    """Whether this rank was asked to stop."""
    return _asked


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _asked  # noqa: PLW0603  a signal handler has no other way to leave word
    _asked = True
