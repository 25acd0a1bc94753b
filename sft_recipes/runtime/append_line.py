"""Adds lines to a run's files; a full disk costs the run neither its life nor, once there is room, the lines."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_waiting: dict[Path, list[str]] = {}


def add(path: Path, line: str) -> None:
    """One more line, behind those that the disk has not taken yet; no file ever holds half of one."""
    lines = [*_waiting.pop(path, []), line]
    try:
        _add(path, "".join(f"{one}\n" for one in lines).encode())
    except OSError as error:
        if len(lines) == 1:
            with contextlib.suppress(OSError):  # of a log on the same disk
                print(
                    f"warning: {path} takes no line ({error.strerror}); kept until it does", file=sys.stderr, flush=True
                )
        _waiting[path] = lines


def _add(path: Path, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(file).st_size
        try:
            while content:
                content = content[os.write(file, content) :]
        except OSError:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)
