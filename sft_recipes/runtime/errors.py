"""Errors by kind: errors that the user can fix exit with 2, failures of a run with 1.

A message is one line: `<where>: <what is wrong>: found X, expected Y. <how to fix it>`.
"""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix. Exit code 2; no optimizer step was taken."""


class ConfigError(UserError):
    """A recipe, an override or a variable is wrong."""


class DataError(UserError):
    """A data file, a row, a tokenizer or a chat template is wrong."""


class SetupError(UserError):
    """The machine, its libraries or the files of a run do not meet the requirements."""


class TrainingError(Exception):
    """A failure not caused by user input. Exit code 1. Raised on every rank at the same place."""
