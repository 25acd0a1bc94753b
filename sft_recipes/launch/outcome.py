"""Decide how a Slurm job ends, from the exit records of its nodes: exit code, cause, and whether it is requeued.

srun's status says neither: it is the largest code of all tasks, and tasks that srun kills report its signal. The last
step of slurm/launch.sh runs this file in the machine's system Python, with the standard library only:

    python3 -I sft_recipes/launch/outcome.py RECIPE RUN_FOLDER TASKS STATUS [time-limit] [stop-requested]
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # in a Python without this package installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft_recipes.launch import exit_records, slurm
from sft_recipes.launch.exit_records import ExitRecord
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_USER

_SIGNALLED = 128  # and above: the status of a process that a signal killed


@dataclass(frozen=True)
class Outcome:
    """Exit code of a job, the error to print, and why it is requeued."""

    code: int
    error: str | None = None
    requeue: str | None = None


def decide(
    records: Sequence[ExitRecord], nodes: int, status: int, stop_expected: bool, lost_nodes: Callable[[], list[str]]
) -> Outcome:
    """Decide from the exit records.

    Args:
        status: exit status of the last step; used if there is no record.
        stop_expected: the time limit is near, or a stop was requested.
        lost_nodes: waits until Slurm knows whether a node is lost, and returns those that are.
    """
    first = exit_records.first_failure(records)
    if first and first.error and not first.lost_peer:  # a rank's own failure: never a stop
        no_progress = any(record.code == EXIT_NO_PROGRESS for record in records)
        return Outcome(EXIT_NO_PROGRESS if no_progress else first.code, first.error)
    leader = next((record for record in records if record.node == 0 and not record.error), None)
    if leader and (leader.code != EXIT_STOPPED or stop_expected or not first.error):  # type: ignore[union-attr]
        return Outcome(leader.code)  # finished, stopped, diverged, a failed check: srun may have killed the others
    if not records and (nodes == 1 or status == EXIT_USER) and status < _SIGNALLED:
        return Outcome(status)  # `prepare`, or wrong input before there was a run
    if stop_expected and not any(record.error for record in records):
        return Outcome(EXIT_STOPPED)  # a launcher was killed by the signal, before it handled signals
    error = "; ".join(record.error for record in records if record.error)  # each node names its stalled rank
    if lost := lost_nodes():
        return Outcome(EXIT_STOPPED, error or None, f"node {','.join(lost)} is lost")
    gone = sorted(set(range(nodes)) - {record.node for record in records})
    return Outcome(EXIT_ERROR, error or f"the launcher on node {', '.join(map(str, gone))} was killed: no exit record")


def main(recipe: str, run: str, nodes: str, status: str, *events: str) -> int:
    """Print the cause, requeue the job if it is to run again, and return its exit code.

    Args:
        run: run directory.
        nodes: tasks of the last step.
        events: `time-limit` and `stop-requested`, as the batch script has received them.
    """
    variables = os.environ
    job, start = variables["SLURM_JOB_ID"], variables.get("SLURM_RESTART_COUNT") or "0"
    records = exit_records.read(Path(run), f"{job}-{start}")
    lost_nodes = functools.partial(slurm.wait_for_lost_nodes, variables["SLURM_JOB_NODELIST"])
    outcome = decide(records, int(nodes), int(status), bool(events), lost_nodes)
    if outcome.error:
        print(f"error: {outcome.error}", file=sys.stderr)
    if "SLURM_ARRAY_TASK_ID" in variables:  # a task may have the array's own number, and requeueing that requeues all
        job = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    state = slurm.ask("scontrol", "show", "job", "--oneliner", job)
    if state and f" Restarts={start} " not in state:
        return outcome.code  # this node lost its connection, and the job runs again without it: do not end that start
    terminated = any(record.terminated for record in records if record.node == 0)  # SIGTERM to the step alone
    preempted = re.search(r" PreemptTime=\d", state)  # the launchers received SIGTERM, the batch script no signal
    if outcome.code == EXIT_STOPPED and (preempted or ("time-limit" in events and not terminated)):
        outcome = replace(outcome, requeue=outcome.requeue or "resumes from its latest checkpoint")
    if outcome.requeue and "stop-requested" not in events:
        print(f"job {job}: requeued; {outcome.requeue}", flush=True)
        if subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
            return outcome.code
    if outcome.code == EXIT_STOPPED and state:
        print(f"job {job}: not requeued. Resume with NAME={Path(run).name} sbatch slurm/{recipe}.sh", flush=True)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
