"""Writes this rank's heartbeat, and the exception that ended it, for the watchdog in the launcher."""

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.heartbeat import Activity, Failure, Heartbeat
from sft_recipes.runtime.run_dir import RunDir


class _HeartbeatWriter:
    """Open file in which this rank's heartbeat is overwritten."""

    def __init__(self, run_dir: RunDir, rank: int):
        self.run_dir = run_dir
        self.file = heartbeat.rank_file(run_dir.ranks, rank)
        self.stack_trace = heartbeat.rank_file(run_dir.stack_traces, rank, ".txt")
        for folder in (run_dir.ranks, run_dir.stack_traces):
            folder.mkdir(exist_ok=True)
        self.descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.write(Heartbeat(rank, os.getpid(), 0, "starting", 0))
        # Opened now: a signal handler in C, which works in a stalled rank too, cannot open files.
        stream = self.stack_trace.open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=stream, all_threads=True)
        faulthandler.enable(file=stream)

    def write(self, latest: Heartbeat) -> None:
        self.latest = latest
        os.pwrite(self.descriptor, heartbeat.encode(latest), 0)


_writer: _HeartbeatWriter | None = None


def start(run_dir: RunDir, rank: int) -> None:
    """Start this rank's heartbeat."""
    global _writer  # noqa: PLW0603  a process is one rank, and the callers of beat() do not know the run directory
    _writer = _HeartbeatWriter(run_dir, rank)


def beat(step: int, activity: Activity) -> None:
    """Record progress of this rank; does nothing before `start`.

    Args:
        step: current optimizer step, or the one just taken.
    """
    if _writer is not None:
        beats = _writer.latest.beats + 1 if step == _writer.latest.step else 0
        _writer.write(replace(_writer.latest, step=step, activity=activity, beats=beats))


@contextlib.contextmanager
def record_exit() -> Iterator[None]:
    """Remove this rank's heartbeat at a normal exit, and record the exception otherwise; the launcher reports a
    `UserError`, so it is not raised further. Call `start` before.

    `atexit` cannot do this: a rank that leaves early with exit code 0 did not end normally, and the others wait for it.
    """
    try:
        yield
    except BaseException as error:  # SystemExit too
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first line of torch's error of a data worker names the worker, the last one the exception.
        message = " … ".join(dict.fromkeys((*lines[:1], *lines[-1:])))[:500]
        failure = Failure(type(error).__name__, message, time.monotonic(), isinstance(error, UserError))
        heartbeat.write_failure(_writer.run_dir.ranks, _writer.latest.rank, failure)
        if not isinstance(error, UserError):
            raise
        return
    _writer.file.unlink(missing_ok=True)
    faulthandler.disable()  # a crash of the interpreter after this does not concern the run
    faulthandler.unregister(signal.SIGUSR2)
    _writer.stack_trace.unlink(missing_ok=True)
