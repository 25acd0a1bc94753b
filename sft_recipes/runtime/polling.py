"""Wait for a condition by polling it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def wait_until(condition: Callable[[], Result], seconds: float, interval: float = 0.1) -> Result:
    """Return the result of a condition as soon as it is true, or its latest one after `seconds`."""
    until = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < until:
        time.sleep(interval)
    return result
