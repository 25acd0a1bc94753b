"""The error with which all ranks stop where what they hold or were fed is not what it must be."""

from __future__ import annotations


class FaultError(Exception):
    """A fault that is not the user's: exit code 1, one line. Raised on every rank at the same place."""
