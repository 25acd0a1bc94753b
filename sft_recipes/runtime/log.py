"""Logging of every process: messages to the console, errors to standard error, a copy to `log.txt`.

Modules log to `logging.getLogger(__name__)`. `log.info` prints the message alone, `log.warning` and `log.error` with
the prefix `warning: ` or `error: `.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

ROOT = logging.getLogger("sft_recipes")
logging.raiseExceptions = False  # on a full disk a line is lost, without a traceback for each


class _Plain(logging.Formatter):
    """The message without a prefix, except for the level of warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()


class ConsoleHandler(logging.Handler):
    """Write to the current standard output, errors to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line and flush it."""
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        with contextlib.suppress(OSError):  # a full disk, or a pipe without a reader; log.txt has the line
            print(self.format(record), file=stream, flush=True)


def to_console() -> None:
    """Print this process's messages; call once, in the launcher and on rank 0."""
    _use(ConsoleHandler())


def to_file(path: Path) -> None:
    """Also append this process's messages to a file."""
    _use(logging.FileHandler(path, encoding="utf-8", delay=True))


def _use(handler: logging.Handler) -> None:
    handler.setFormatter(_Plain())
    ROOT.handlers = [present for present in ROOT.handlers if type(present) is not type(handler)] + [handler]
    ROOT.setLevel(logging.INFO)
    ROOT.propagate = False


def silence() -> None:
    """Drop this process's messages below errors: rank 0 logs for all ranks."""
    ROOT.setLevel(logging.ERROR)
