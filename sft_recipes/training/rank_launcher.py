"""Starts accelerate's own launcher, passes on to the ranks that they are asked to stop, and says how they ended.

Accelerate alone would end ranks that are asked to stop: at once where there is one, after a while where there are more
(torch's agent), whether they have saved or not. Of a rank that failed it tells the parent no more than that one did.

Before it starts several ranks, accelerate asks `localhost` whether the port is in use, and dies where there is no
`/etc/hosts` that says what that is (a minimal container). The launcher has chosen a free port, so the question is moot.
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
    """`accelerate launch …` with the arguments that this process got, the last of which is the plan's file."""
    ranks = RunDir(Path(sys.argv[-1]).parent).ranks
    os.environ[heartbeat.LAUNCHER] = str(os.getpid())
    _ask_where_asked(ranks)
    with library_imports.swiftly():
        import accelerate.utils.launch
        from accelerate.commands import launch  # not the command line of all its verbs, which imports them all
        from torch.distributed.elastic.multiprocessing.api import PContext
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What torch's agent gives the others where a rank has died, and they wait for it in vain: 30 seconds by default.
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
    heartbeat.leave_exit_codes(ranks, codes)
    sys.exit(EXIT_FAULT if codes else 0)


def _ask_where_asked(ranks: Path) -> None:
    """The signals that ask for a stop go to the ranks, which save together and end by themselves; where none has taken
    a step there is nothing to save, and they end with this process."""

    def ask(_number: int, _frame: FrameType | None) -> None:
        if not heartbeat.ask_to_stop(ranks):
            os._exit(EXIT_STOPPED)  # an exception would have torch's agent wait for the ranks

    for number in heartbeat.ASKING:
        signal.signal(number, ask)


if __name__ == "__main__":
    main()
