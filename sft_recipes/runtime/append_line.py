"""Append lines to a run's files; on a full disk the run continues and lines stay in memory until space is free."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_pending: dict[Path, list[str]] = {}


def add(path: Path, line: str) -> None:
    """Append a line after pending ones; an incomplete line is truncated again."""
    lines = [*_pending.pop(path, []), line]
    try:
        _append(path, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        if len(lines) == 1:
            with contextlib.suppress(OSError):  # standard error may be a file on the same disk
                print(
                    f"warning: {path} cannot be written ({error.strerror}); lines are kept in memory",
                    file=sys.stderr,
                    flush=True,
                )
        _pending[path] = lines


def _append(path: Path, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        try:
            while content:
                content = content[os.write(file, content) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
