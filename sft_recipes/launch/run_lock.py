"""Holds a run's folder for one process; the system lets go of it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sft_recipes.launch.process_group import StopRequest
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, runs_root

_TRIES = 5


@contextlib.contextmanager
def held(folder: RunDir) -> Iterator[None]:
    """Holds the run for this process.

    Raises:
        SetupError: another live process holds it, ranks of an earlier start live on, or the folder cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = folder.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise SetupError(
            f"NAME: {folder.path} cannot be written ({error.strerror}); make it writable, or say "
            "RUNS_DIR=<another folder>"
        ) from error
    with lock:
        try:
            taken = _taken(lock)
        except OSError as error:
            raise SetupError(
                f"RUNS_DIR: {folder.path} lies on a disk that locks no files ({error.strerror}), so nothing would keep "
                f"two starts apart; have it mounted with locks (Lustre: -o flock), or name another folder"
            ) from error
        if not taken:
            raise SetupError(f"NAME: {folder.name} is being carried out by {_holder(folder.lock)}; wait for it")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        _await_the_ranks_of_before(folder)
        yield


def _taken(lock: TextIO) -> bool:
    """Whether the lock is ours now; one who only looks whether it is held has it for a moment."""
    for _ in range(_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def _await_the_ranks_of_before(folder: RunDir) -> None:
    """Ranks whose parent was killed are killed with it, which takes the system a moment: two ranks must never write the
    same checkpoint.

    Raises:
        SetupError: one is still there, as one that waits for a device in the kernel is.
    """
    until = time.monotonic() + timeouts.EARLIER_RANKS_EXIT
    while left := [pulse for pulse in heartbeat.pulses(folder.ranks).values() if is_rank_of(folder, pulse.process)]:
        if time.monotonic() > until:
            state = heartbeat.state(left[0].process)
            raise SetupError(
                f"NAME: rank {left[0].rank} of an earlier start of {folder.name} is still there (process "
                f"{left[0].process}, state {state}); end it, or this machine, and say the same again"
            )
        time.sleep(0.1)


def is_rank_of(folder: RunDir, process: int) -> bool:
    """Whether the process with that id is one, and not another that got the id since."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return f"/{folder.name}/{folder.plan.name}".encode() in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def held_by() -> dict[str, str]:
    """The runs that a live process holds, each with that process."""
    locks = runs_root().glob("*/.lock")
    return {path.parent.name: _holder(path) for path in locks if is_held(RunDir(path.parent))}


def holder(folder: RunDir) -> str | None:
    """The live process that holds a run; None where none does."""
    return _holder(folder.lock) if is_held(folder) else None


def is_held(folder: RunDir) -> bool:
    """Whether a live process holds it."""
    try:
        with folder.lock.open("r", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def await_free(folder: RunDir, asked: StopRequest) -> None:
    """Waits for a start on a node that was cut off, which ends by itself once it hears nothing of the others.

    Raises:
        StoppedError: this process was asked to stop meanwhile.
    """
    if not is_held(folder):
        return
    print(
        f"{folder.name} is still held by {_holder(folder.lock)}; waiting at most {timeouts.RUN_LOCK:.0f} s for it",
        flush=True,
    )
    until = time.monotonic() + timeouts.RUN_LOCK
    while is_held(folder) and time.monotonic() < until:
        asked.check()
        time.sleep(0.5)


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
