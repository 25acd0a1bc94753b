"""Locks a run directory for one process; the kernel releases the lock when the process exits for any reason."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, runs_root

log = logging.getLogger(__name__)
_TRIES = 5


@contextlib.contextmanager
def lock(run_dir: RunDir, shared: bool = False, writes_holder: bool = True) -> Iterator[None]:
    """Lock the run for this process.

    Args:
        shared: with the launchers of the other nodes, which keep `prepare` of a later attempt waiting.
        writes_holder: name this process in errors of others.

    Raises:
        SetupError: another live process holds the lock, ranks of an earlier attempt still run, or the directory is not
            writable.
    """
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = run_dir.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise SetupError(
            f"NAME: {run_dir.path} is not writable ({error.strerror}). Make it writable, or set another RUNS_DIR"
        ) from error
    with file:
        try:
            acquired = _acquire(file, shared)
        except OSError as error:
            raise SetupError(
                f"RUNS_DIR: {run_dir.path} is on a file system without file locks ({error.strerror}), so two processes "
                f"could write to one run. Mount it with locks (Lustre: -o flock), or set another RUNS_DIR"
            ) from error
        if not acquired:
            raise SetupError(f"NAME: {run_dir.name} is in use by {_holder(run_dir.lock)}. Wait for it")
        if writes_holder:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        _wait_for_earlier_ranks(run_dir)
        yield


def _acquire(file: TextIO, shared: bool) -> bool:
    """Try to acquire the lock; a process that only checks whether it is held has it for a moment."""
    for _ in range(_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def _wait_for_earlier_ranks(run_dir: RunDir) -> None:
    """Wait until the ranks of a killed launcher are gone, which the kernel kills with it: two ranks must never write
    the same checkpoint.

    Raises:
        SetupError: one still runs, for example in an uninterruptible wait for a device.
    """
    until = time.monotonic() + timeouts.EARLIER_RANKS_EXIT
    while running := [
        beat for beat in heartbeat.read_heartbeats(run_dir.ranks).values() if is_rank_of(run_dir, beat.pid)
    ]:
        if time.monotonic() > until:
            rank = running[0]
            raise SetupError(
                f"NAME: rank {rank.rank} of an earlier attempt of {run_dir.name} still runs (pid {rank.pid}, state "
                f"{heartbeat.process_state(rank.pid)}). Kill it, or reboot the machine, and run the same command again"
            )
        time.sleep(0.1)


def is_rank_of(run_dir: RunDir, pid: int) -> bool:
    """Whether the process is a rank of the run, and not a later process with the same id."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return f"/{run_dir.name}/{run_dir.plan.name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def locked_runs() -> dict[str, str]:
    """Runs that a live process holds, each with that process."""
    locks = runs_root().glob("*/.lock")
    return {path.parent.name: _holder(path) for path in locks if is_locked(RunDir(path.parent))}


def holder(run_dir: RunDir) -> str | None:
    """Live process that holds the run; None if there is none."""
    return _holder(run_dir.lock) if is_locked(run_dir) else None


def is_locked(run_dir: RunDir) -> bool:
    """Whether a live process holds the run."""
    try:
        ours = os.access(run_dir.lock, os.W_OK)  # NFS requires a writable file for an exclusive lock
        with run_dir.lock.open("r+" if ours else "r", encoding="utf-8") as file:
            fcntl.flock(file, (fcntl.LOCK_EX if ours else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def wait_until_free(run_dir: RunDir, stop_request: StopRequest) -> None:
    """Wait for the launchers of an earlier attempt, for example on a node that lost its connection, until its ranks
    stall.

    Raises:
        StoppedError: a stop was requested meanwhile.
    """
    if not is_locked(run_dir):
        return
    log.info("waiting up to %.0f s for %s, held by %s", timeouts.RUN_LOCK, run_dir.name, _holder(run_dir.lock))
    until = time.monotonic() + timeouts.RUN_LOCK
    while is_locked(run_dir) and time.monotonic() < until:
        stop_request.check()
        time.sleep(0.5)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
