"""Runs a command in a process group of its own, ends it where a rank of it fails, and leaves none of it behind."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType

from sft_recipes.launch.watchdog import Ended, Watchdog
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.run_dir import EXIT_STOPPED


@dataclass
class StopRequest:
    """The signals that have asked this process to stop, in their order; what is under way decides what to do."""

    numbers: list[int] = field(default_factory=list)

    @property
    def impatiently(self) -> bool:
        """Whether by a second Ctrl-C: a person who does not want to wait for the save. A scheduler's second signal
        says no more than its first."""
        return self.numbers.count(signal.SIGINT) > 1

    def check(self) -> None:
        """Raises:
        StoppedError: somebody has asked.
        """
        if self.numbers:
            raise StoppedError


class StoppedError(Exception):
    """This process was asked to stop before there was anything to stop."""


_asked: StopRequest | None = None


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """From here on this process is asked, not ended, by SIGTERM, SIGINT and SIGUSR1, and by SIGHUP, which a terminal
    that is closed sends, unless `nohup` has it ignored."""
    global _asked  # noqa: PLW0603  signals are the process's: who listens inside of another hears what that one heard
    if _asked is not None:
        yield _asked
        return
    asked = _asked = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        asked.numbers.append(number)

    hangs_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    before = {number: signal.signal(number, note) for number in (*heartbeat.ASKING, *hangs_up)}
    try:
        yield asked
    finally:
        _asked = None
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # one who is about to leave may have it ignored
                signal.signal(number, handler)


def run(
    arguments: list[str],
    environment: Mapping[str, str],
    asked: StopRequest,
    watch: Watchdog | None = None,
    meanwhile: Callable[[], bool] | None = None,
) -> Ended:
    """Runs a command to its end.

    Args:
        meanwhile: called again and again; where it says True, the ranks are ended as if one of them had died.

    Where somebody asks for a stop, the ranks are asked to save and stop: them alone, since all of them save together.
    A command without ranks, or whose ranks have nothing to save yet, is ended at once, and so is any when asked
    impatiently. Where a rank dies or hangs, the others are ended.
    """
    if asked.numbers:
        return Ended(EXIT_STOPPED)
    process = subprocess.Popen(
        arguments,
        env=dict(environment),
        stdin=subprocess.DEVNULL,  # nothing in a run asks a person: W&B would, for a key, and wait
        start_new_session=True,
        preexec_fn=functools.partial(heartbeat.end_with_parent, os.getpid()),  # noqa: PLW1509  there are no threads
    )
    try:
        elsewhere = meanwhile or _nothing_ends
        if watch is None:
            stopped, killed = _wait(process, asked, elsewhere), False
        else:
            stopped, killed = _wait_for_ranks(process, asked, watch, elsewhere)
        if stopped:
            return Ended(EXIT_STOPPED)
        code = process.wait()
        if code and watch is None and (asked.numbers or -code in heartbeat.ASKING):
            return Ended(EXIT_STOPPED)  # Slurm asks every process of a job, and this one was ended by that
        ended = Ended(code) if watch is None or code == EXIT_STOPPED else watch.ended(code, killed)
        if ended.code == 0:
            _await_group(process.pid, timeouts.PROCESS_GROUP_EXIT)
        return ended
    finally:
        if watch is not None:
            watch.kill()
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        if watch is not None:
            watch.await_gone(timeouts.LAUNCHER_EXIT)


def fail(error: str, code: int) -> int:
    """Says what is wrong; the exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def _nothing_ends() -> bool:
    return False


def _wait(process: subprocess.Popen[bytes], asked: StopRequest, elsewhere: Callable[[], bool]) -> bool:
    """As `_wait_for_ranks`, of a command without ranks."""
    while _lives(process):
        if asked.numbers or elsewhere():
            return True
    return False


def _wait_for_ranks(
    process: subprocess.Popen[bytes], asked: StopRequest, watch: Watchdog, elsewhere: Callable[[], bool]
) -> tuple[bool, bool]:
    """Until the launcher of ranks ends; whether the ranks are to be ended since somebody asked, and whether the
    launcher had to be killed."""
    passed_on = False
    kill_at: float | None = None
    while _lives(process):
        if asked.impatiently:
            return True, False
        if asked.numbers and not passed_on:
            if not (watch.saves and heartbeat.ask_to_stop(watch.folder.ranks)):
                return True, False
            passed_on = True
        watch.look()
        now = time.monotonic()
        if kill_at is None:
            if watch.died():
                kill_at = now + timeouts.OTHER_RANKS_EXIT
            elif elsewhere():
                watch.ended_for_others = True
                kill_at = now + timeouts.OTHER_RANKS_EXIT
            elif watch.finds_a_hang():
                kill_at = now
        if kill_at is not None and now >= kill_at:
            watch.kill()
            if now >= kill_at + timeouts.LAUNCHER_EXIT:
                return False, _signal_group(process.pid, signal.SIGKILL)
    return False, False


def _lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether it still does after a moment."""
    try:
        process.wait(timeouts.POLL_RANKS)
    except subprocess.TimeoutExpired:
        return True
    return False


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
