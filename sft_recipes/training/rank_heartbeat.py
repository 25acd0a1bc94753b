"""Writes this rank's heartbeat, and the exception that ended it, for the watchdog in the launcher."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator

from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.heartbeat import Activity, Failure, Heartbeat
from sft_recipes.runtime.run_dir import RunDir

# Gaps between beats measure how slow a machine is while ranks compute, not while they load, save or publish.
_MEASURED = ("step", "evaluating")


class _HeartbeatWriter:
    """Open file in which this rank's heartbeat is overwritten."""

    def __init__(self, run_dir: RunDir, rank: int):
        self.run_dir = run_dir
        self.file = heartbeat.rank_file(run_dir.ranks, rank)
        run_dir.ranks.mkdir(exist_ok=True)
        self.latest = Heartbeat(rank, os.getpid(), 0, "starting", 0, time.monotonic(), 0.0)
        partial = self.file.with_name(f".{self.file.name}")
        self.descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.write()
        partial.replace(self.file)
        # Opened now: a signal handler in C, which works in a stalled rank too, cannot open files.
        run_dir.stack_traces.mkdir(exist_ok=True)
        self.stack_trace = heartbeat.rank_file(run_dir.stack_traces, rank, ".txt")
        stream = self.stack_trace.open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=stream, all_threads=True)
        faulthandler.enable(file=stream)

    def write(self) -> None:
        os.pwrite(self.descriptor, heartbeat.encode(self.latest), 0)


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
    if _writer is None:
        return
    previous, now = _writer.latest, time.monotonic()
    gap = now - previous.beat_at if previous.activity in _MEASURED else 0.0
    beats = previous.beats + 1 if step == previous.step else 0
    _writer.latest = Heartbeat(previous.rank, previous.pid, step, activity, beats, now, max(previous.longest_gap, gap))
    _writer.write()


@contextlib.contextmanager
def record_exit() -> Iterator[None]:
    """Remove this rank's heartbeat at a normal exit, and record the exception otherwise; the launcher reports a
    `UserError`, so it is not raised further.

    `atexit` cannot do this: a rank that leaves early with exit code 0 did not end normally, and the others wait for it.
    """
    try:
        yield
    except UserError as error:
        if _writer is None:
            raise
        _write_failure(_writer, error)
        return
    except BaseException as error:  # SystemExit too
        if _writer is not None:
            _write_failure(_writer, error)
        raise
    if _writer is not None:
        _writer.file.unlink(missing_ok=True)
        faulthandler.disable()  # a crash of the interpreter after this does not concern the run
        faulthandler.unregister(signal.SIGUSR2)
        _writer.stack_trace.unlink(missing_ok=True)


def _write_failure(writer: _HeartbeatWriter, error: BaseException) -> None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch wraps the exception of a data worker: the first line names the worker, the last one the exception.
    in_worker = len(lines) > 1 and "in DataLoader worker process" in lines[0]
    message = f"{lines[0]} {lines[-1]}" if in_worker else "".join(lines[:1])
    latest = writer.latest
    heartbeat.write_failure(
        writer.run_dir.ranks,
        Failure(
            latest.rank,
            latest.pid,
            latest.step,
            type(error).__name__,
            message[:500],
            time.monotonic(),
            isinstance(error, UserError),
        ),
    )
