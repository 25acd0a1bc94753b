"""Runs `accelerate launch`, forwards stop requests to the ranks, and records their exit codes.

Accelerate alone terminates its ranks at a stop signal, whether they have saved or not: one rank at once, several after
a timeout (torch's agent). It also reports only that a rank failed, not how.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from sft_recipes.runtime import heartbeat, library_imports
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, RunDir
from sft_recipes.training import patches


def main() -> None:
    """Run `accelerate launch` with this process's arguments, the last of which is the plan file."""
    ranks_dir = RunDir(Path(sys.argv[-1]).parent).ranks
    os.environ[heartbeat.LAUNCHER_PID] = str(os.getpid())
    _forward_stop_signals(ranks_dir)
    with library_imports.without_garbage_collection():
        from accelerate.commands import launch  # not the command line of all its commands, which imports them all
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    patches.shorten_wait_for_other_ranks()
    patches.skip_port_check_without_localhost()
    try:
        launch.main()
    except ChildFailedError as error:  # of several ranks
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:  # of one
        codes = {0: error.returncode}
    else:
        codes = {}
    heartbeat.write_exit_codes(ranks_dir, codes)
    sys.exit(EXIT_ERROR if codes else 0)


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
