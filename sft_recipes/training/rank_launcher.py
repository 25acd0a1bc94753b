"""Runs `accelerate launch`, forwards stop requests to the ranks, and records their exit codes.

Accelerate alone terminates its ranks at a stop signal, whether they have saved or not: one rank at once, several after
a timeout (torch's agent). It also reports only that a rank failed, not how.

Before it starts several ranks, accelerate checks on `localhost` whether the port is in use, and fails without an
`/etc/hosts` that defines it (minimal containers). The check is skipped there: the launcher has chosen a free port.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

from sft_recipes.runtime import heartbeat, library_imports, timeouts
from sft_recipes.runtime.run_dir import EXIT_FAULT, EXIT_STOPPED, RunDir


def main() -> None:
    """Run `accelerate launch` with this process's arguments, the last of which is the plan file."""
    ranks_dir = RunDir(Path(sys.argv[-1]).parent).ranks
    os.environ[heartbeat.LAUNCHER_PID] = str(os.getpid())
    _forward_stop_signals(ranks_dir)
    with library_imports.swiftly():
        import accelerate.utils.launch
        from accelerate.commands import launch  # not the command line of all its commands, which imports them all
        from torch.distributed.elastic.multiprocessing.api import PContext
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Seconds that torch's agent waits for the other ranks after one has died: 30 by default.
    PContext.close.__defaults__ = (None, timeouts.OTHER_RANKS_EXIT)
    try:
        socket.getaddrinfo("localhost", None)
    except socket.gaierror:
        accelerate.utils.launch.is_port_in_use = lambda _port: False
    try:
        launch.main()
    except ChildFailedError as error:  # of several ranks
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:  # of one
        codes = {0: error.returncode}
    else:
        codes = {}
    heartbeat.write_exit_codes(ranks_dir, codes)
    sys.exit(EXIT_FAULT if codes else 0)


def _forward_stop_signals(ranks_dir: Path) -> None:
    """Forward stop signals to the ranks, which save together and exit; before their first step there is nothing to
    save, and they are terminated with this process."""

    def forward(_number: int, _frame: FrameType | None) -> None:
        if not heartbeat.request_stop(ranks_dir):
            os._exit(EXIT_STOPPED)  # after an exception torch's agent would wait for the ranks

    for number in heartbeat.STOP_SIGNALS:
        signal.signal(number, forward)


if __name__ == "__main__":
    main()
