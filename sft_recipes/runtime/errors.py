"""Errors by kind: what the user can fix exits with 2, what stopped a run with 1."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can fix. One line: place, cause, what was found and expected, how to fix it. Exit code 2."""


class TrainingError(Exception):
    """A failure that is not the user's. One line, exit code 1. Raised on every rank at the same place."""
