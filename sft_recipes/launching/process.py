"""Runs a command in a process group of its own, passes signals on, and leaves none of it behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from sft_recipes.planning.processes import end_with_parent
from sft_recipes.planning.run_folder import EXIT_STOPPED

SECONDS_TO_END = 15
TIMED_OUT = 124  # as timeout(1) has it


def run(
    arguments: list[str],
    environment: Mapping[str, str],
    ranks: Path | None = None,
    seconds_at_most: float | None = None,
) -> int:
    """Runs a command in a process group of its own, passes signals on, and leaves none of it behind.

    The first signal asks the ranks, whose process ids lie in `ranks`, to save and stop: them alone, since a launcher
    that gets one ends before they have saved. Where there are none yet, and at the second signal, all is ended at once.
    """
    process = subprocess.Popen(
        arguments,
        env=dict(environment),
        stdin=subprocess.DEVNULL,  # nothing in a run asks a person: W&B would, for a key, and wait
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509  this process has no threads
    )
    asked = ended = False

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked, ended
        if asked or ranks is None or not _ask_to_stop(ranks):
            ended = _signal_group(process.pid, signal.SIGKILL)
        asked = True

    passed = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in passed}
    try:
        code = process.wait(seconds_at_most)
        _await_group(process.pid, SECONDS_TO_END)
        return EXIT_STOPPED if ended else code
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_stop(ranks: Path) -> bool:
    """Asks the ranks of this host to save and stop; whether there was one to ask."""
    found = False
    for file in ranks.glob(f"{socket.gethostname()}-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text(encoding="ascii")), signal.SIGTERM)
            found = True
    return found


def _signal_group(group: int, number: int) -> bool:
    """Whether there still was a process of the group to get the signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _await_group(group: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while _signal_group(group, 0) and time.monotonic() < until:
        time.sleep(0.05)
