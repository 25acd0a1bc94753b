"""Locks a run directory for one process; the kernel releases the lock when the process exits for any reason."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.heartbeat import Heartbeat
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import RunDir, runs_root

log = logging.getLogger(__name__)
_ANOTHER = "another process"


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
        # A process that only checks whether it is held has it for a moment.
        acquired = wait_until(lambda: _acquire(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX), 0.25, 0.05)
    except OSError as error:  # Lustre has file locks if mounted with -o flock
        reason = f"is not writable or has no file locks ({error.strerror})"
        raise SetupError(f"NAME: {run_dir.path} {reason}. Set another RUNS_DIR") from error
    with file:
        if not acquired:
            raise SetupError(f"NAME: {run_dir.name} is in use by {holder(run_dir) or _ANOTHER}. Wait for it")
        if writes_holder:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        # The kernel kills the ranks of a killed launcher: two ranks must never write the same checkpoint.
        wait_until(lambda: not _earlier_ranks(run_dir), timeouts.EARLIER_RANKS_EXIT)
        for rank in _earlier_ranks(run_dir):
            process = f"rank {rank.rank} (pid {rank.pid}, state {heartbeat.process_state(rank.pid)})"
            raise SetupError(f"NAME: {process} of an earlier attempt of {run_dir.name} still runs. Kill it")
        yield


def _acquire(file: TextIO, kind: int) -> bool:
    """Whether the lock is free, and now held by this process."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def _earlier_ranks(run_dir: RunDir) -> list[Heartbeat]:
    """Ranks of an earlier attempt that still run, for example in an uninterruptible wait for a device."""
    return [beat for beat in heartbeat.read_heartbeats(run_dir.ranks).values() if is_rank_of(run_dir, beat.pid)]


def is_rank_of(run_dir: RunDir, pid: int) -> bool:
    """Whether the process is a rank of the run, and not a later process with the same id."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return f"/{run_dir.name}/{run_dir.plan.name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def locked_runs() -> dict[str, str]:
    """Runs that a live process holds, each with that process."""
    holders = {path.parent.name: holder(RunDir(path.parent)) for path in runs_root().glob("*/.lock")}
    return {name: process for name, process in holders.items() if process}


def holder(run_dir: RunDir) -> str | None:
    """Live process that holds the run; None if there is none."""
    ours = os.access(run_dir.lock, os.W_OK)  # NFS requires a writable file for an exclusive lock
    with contextlib.suppress(FileNotFoundError), run_dir.lock.open("r+" if ours else "r", encoding="utf-8") as file:
        if not _acquire(file, fcntl.LOCK_EX if ours else fcntl.LOCK_SH):
            return file.read() or _ANOTHER
    return None


def wait_until_free(run_dir: RunDir, stop_request: StopRequest) -> None:
    """Wait for the launchers of an earlier attempt, for example on a node that lost its connection, until its ranks
    stall.

    Raises:
        StoppedError: a stop was requested meanwhile.
    """

    def is_free() -> bool:
        stop_request.check()
        return holder(run_dir) is None

    if process := holder(run_dir):
        log.info("waiting up to %.0f s for %s, held by %s", timeouts.RUN_LOCK, run_dir.name, process)
        wait_until(is_free, timeouts.RUN_LOCK, 0.5)
