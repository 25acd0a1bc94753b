"""Holds a run's folder for one process; the system lets go of it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from sft_recipes.planning.run_folder import RunFolder, runs_root
from sft_recipes.planning.schema import RecipeError


@contextlib.contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Holds the run for this process.

    Raises:
        RecipeError: another live process holds it, or the folder cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = folder.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"NAME: {folder.path} cannot be written ({error.strerror}); make it writable, or say "
            "RUNS_DIR=<another folder>"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(
                f"NAME: {folder.name} is being carried out by {_holder(folder.lock)}; wait for it"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def held_by() -> dict[str, str]:
    """The runs that a live process holds, each with that process."""
    locks = runs_root().glob("*/.lock")
    return {path.parent.name: _holder(path) for path in locks if is_held(RunFolder(path.parent))}


def is_held(folder: RunFolder) -> bool:
    """Whether a live process holds it."""
    try:
        with folder.lock.open("r", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
