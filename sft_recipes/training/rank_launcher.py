"""Runs `accelerate launch`, forwards stop requests to the ranks, and records their exit codes.

Accelerate alone terminates its ranks at a stop signal, whether they have saved or not, after a timeout (torch's agent).
It also reports only that a rank failed, not how. One process is started without it.
"""

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
    """Run the ranks; the arguments are those of `accelerate launch`, the last of which is the plan file."""
    ranks_dir = RunDir(Path(sys.argv[-1]).parent).ranks
    os.environ[heartbeat.LAUNCHER_PID] = str(os.getpid())

    def forward(_number: int, _frame: FrameType | None) -> None:
        """Forward a stop signal to the ranks, which save together and exit; before their first step there is nothing to
        save, and they are terminated with this process."""
        if not heartbeat.request_stop(ranks_dir):
            os._exit(EXIT_STOPPED)  # after an exception torch's agent would wait for the ranks

    for number in heartbeat.STOP_SIGNALS:
        signal.signal(number, forward)
    codes = _run_several_processes() if "--main_process_port" in sys.argv else _run_one_process()
    node = int(sys.argv[sys.argv.index("--machine_rank") + 1]) if "--machine_rank" in sys.argv else 0
    heartbeat.write_exit_codes(ranks_dir, codes, node)
    sys.exit(EXIT_ERROR if codes else 0)


def _run_one_process() -> dict[int, int]:
    """Run the program of a single rank; return its exit code unless 0.

    `accelerate launch` would import torch, which takes seconds, to set these two variables (accelerate/utils/launch.py,
    `prepare_simple_launcher_cmd_env`); the trainer sets the precision.
    """
    program = sys.argv[sys.argv.index("-m") :]
    variables = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    code = subprocess.run([sys.executable, *program], env={**os.environ, **variables}, check=False).returncode
    return {0: code} if code else {}


def _run_several_processes() -> dict[int, int]:
    """Run `accelerate launch`; return the exit codes of ranks that failed."""
    with library_imports.without_garbage_collection():
        from accelerate.commands import launch  # not the command line of all its commands, which imports them all
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    patches.shorten_wait_for_other_ranks()
    try:
        launch.main()
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


if __name__ == "__main__":
    main()
