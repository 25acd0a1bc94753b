"""Hears that this rank is asked to stop, from its first moment on, and leaves the decision to all ranks together."""

from __future__ import annotations

import signal
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


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _asked  # noqa: PLW0603  a signal handler has no other way to leave word
    _asked = True
