"""Calls a function in a forked process while this one continues."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

from sft_recipes.data.tokenize_rows import start_worker
from sft_recipes.runtime.errors import DataError, UserError


class ForkedCall:
    """Calls a function in a forked process, which ends with the `with` block.

    A pool would have threads in this process, which then forks the workers that tokenize. It would pickle arguments.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        """Prepare to call the function with these arguments."""
        fork = multiprocessing.get_context("fork")
        self._results, sender = fork.Pipe(duplex=False)
        self._sender, self._value, self._error = sender, None, None

        def send_result(parent: int) -> None:
            start_worker(parent)
            try:
                sender.send((function(*arguments), None))
            except (UserError, OSError) as error:
                sender.send((None, error))

        self._process = fork.Process(target=send_result, args=(os.getpid(),))

    def __enter__(self) -> "ForkedCall":
        """Start the process."""
        self._process.start()
        self._sender.close()
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._results.close()

    def check(self) -> None:
        """Raise the function's error, if it has ended with one."""
        if not self._results.closed and self._results.poll():
            self.result()

    def result(self) -> Any:
        """Wait for the function's result.

        Raises:
            UserError: the function's own, or the process was killed.
            OSError: the function's own.
        """
        if not self._results.closed:
            try:
                self._value, self._error = self._results.recv()
            except EOFError:
                self._process.join()
                if (code := self._process.exitcode or 0) > 0:
                    sys.exit(code)  # it has printed a traceback
                raise DataError(f"data: a process was killed by signal {-code}. The machine may lack memory") from None
            self._results.close()
        if self._error:
            raise self._error
        return self._value
