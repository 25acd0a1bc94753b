"""Leaves word of where this rank stands and of what ended it, for the parent that watches from outside."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator

from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.heartbeat import Doing, Failure, Heartbeat
from sft_recipes.runtime.run_dir import RunDir

# A gap between moves tells how slow a machine is where ranks compute, not where they load, save or publish.
_MEASURED = ("step", "evaluating")


class _Pen:
    """The open file that this rank's pulse is written over in."""

    def __init__(self, folder: RunDir, rank: int):
        self.folder = folder
        self.file = heartbeat.place(folder.ranks, rank)
        folder.ranks.mkdir(exist_ok=True)
        self.pulse = Heartbeat(rank, os.getpid(), 0, "starting", 0, time.monotonic(), 0.0)
        partial = self.file.with_name(f".{self.file.name}")
        self.opened = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.write()
        partial.replace(self.file)
        # Opened now: a signal handler in C, which a rank that is stuck still has, cannot open files.
        folder.stack_traces.mkdir(exist_ok=True)
        self.stack_traces = heartbeat.place(folder.stack_traces, rank, ".txt")
        stacks = self.stack_traces.open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        faulthandler.enable(file=stacks)

    def write(self) -> None:
        os.pwrite(self.opened, heartbeat.to_bytes(self.pulse), 0)


_pen: _Pen | None = None


def begin(folder: RunDir, rank: int) -> None:
    """From here on the parent watches this rank."""
    global _pen  # noqa: PLW0603  a process is one rank, and whoever moves it need not know where its pulse lies
    _pen = _Pen(folder, rank)


def moved(step: int, doing: Doing) -> None:
    """Says that this rank has come to something new; nothing where nobody watches.

    Args:
        step: the optimizer step that it is in, or has just taken.
    """
    if _pen is None:
        return
    before, now = _pen.pulse, time.monotonic()
    longest = max(before.longest, now - before.moved) if before.doing in _MEASURED else before.longest
    moves = before.moves + 1 if step == before.step else 0
    _pen.pulse = Heartbeat(before.rank, before.process, step, doing, moves, now, longest)
    _pen.write()


@contextlib.contextmanager
def until_it_ends() -> Iterator[None]:
    """What a rank carries out: it takes its pulse away where it ends as it should, and leaves word of what ended it
    where it does not. The parent tells a user's error, so there is no traceback of it.

    Not by `atexit`: a rank that leaves in the middle with exit code 0 has not ended as it should, and the others wait
    for it.
    """
    try:
        yield
    except UserError as error:
        if _pen is None:
            raise
        _leave_failure(_pen, error)
        return
    except BaseException as error:  # SystemExit too
        if _pen is not None:
            _leave_failure(_pen, error)
        raise
    if _pen is not None:
        _pen.file.unlink(missing_ok=True)
        faulthandler.disable()  # what the interpreter does behind this is not the run's
        faulthandler.unregister(signal.SIGUSR2)
        _pen.stack_traces.unlink(missing_ok=True)


def _leave_failure(pen: _Pen, error: BaseException) -> None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch wraps a data worker's exception: the first line says that there was one, the last one which.
    of_worker = len(lines) > 1 and "in DataLoader worker process" in lines[0]
    said = f"{lines[0]} {lines[-1]}" if of_worker else "".join(lines[:1])
    at = pen.pulse
    failure = Failure(
        at.rank, at.process, at.step, type(error).__name__, said[:500], time.monotonic(), isinstance(error, UserError)
    )
    heartbeat.leave_failure(pen.folder.ranks, failure)
