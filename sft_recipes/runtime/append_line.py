"""Append lines to a run's files."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


def add(path: Path, line: str) -> None:
    """Append a line. On a full disk it is lost, with a warning: training continues, as after a failed save."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        with contextlib.suppress(OSError):  # standard error may be a file on the same disk
            print(f"warning: {path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
