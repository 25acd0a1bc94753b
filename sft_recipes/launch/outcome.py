"""Exit records: how the launcher of each node ended, as files in the run directory; and how a Slurm job ends by them.

srun's status tells neither cause nor exit code: it is the largest code of all tasks, and tasks that srun kills report
its signal. The last step of slurm/launch.sh runs this file in the machine's system Python, with the standard library
only; it decides exit code, cause, and whether the job is requeued:

    python3 -I sft_recipes/launch/outcome.py RECIPE RUN_FOLDER TASKS STATUS [time-limit] [stop-requested]
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # in a Python without this package installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft_recipes.launch import slurm
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_USER, write_json

if TYPE_CHECKING:
    from sft_recipes.launch.placement import Placement

_SIGNALLED = 128  # and above: the status of a process that a signal killed


@dataclass(frozen=True)
class ExitRecord:
    """How a node's launcher ended.

    Attributes:
        name: name of the node.
        error: cause, with the rank that failed first on this node; None at a stop or a normal end.
        lost_peer: the ranks of this node only lost others, so another node may have the cause.
        terminated: the launcher received SIGTERM.
    """

    node: int
    name: str
    code: int
    error: str | None = None
    lost_peer: bool = False
    terminated: bool = False
    time: float = field(default_factory=time.time)


def record_folder(run: Path, attempt: str) -> Path:
    """Return the folder of an attempt's records."""
    return run / "exits" / attempt


def write_record(
    place: Placement, code: int, signals: Sequence[int], error: str | None = None, lost_peer: bool = False
) -> ExitRecord:
    """Write and return the record of this node's launcher, in `place.records`; its first cause is kept."""
    assert place.records is not None
    record = ExitRecord(place.rank, place.name, code, error, lost_peer, signal.SIGTERM in signals)
    earlier = next((one for one in read_records(place.records) if one.node == place.rank), None)
    if earlier and earlier.error:
        record = replace(earlier, code=record.code or earlier.code, terminated=record.terminated)
    place.records.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(place.records / f"node-{record.node}.json", asdict(record))
    return record


def read_records(folder: Path) -> list[ExitRecord]:
    """Return the records of an attempt, by node."""
    found = []
    for file in folder.glob("node-*.json"):
        with contextlib.suppress(OSError, ValueError):  # a stale name on NFS
            found.append(ExitRecord(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda record: record.node)


def first_failure(records: Iterable[ExitRecord]) -> ExitRecord | None:
    """Return the record that explains the others: a node's own failure, the earliest first; otherwise a failure after
    a lost connection; otherwise any code other than 0, that of node 0 first."""
    failed = [record for record in records if record.code]
    order = sorted(failed, key=lambda r: (r.error is None, r.lost_peer, r.time if r.error else r.node))
    return order[0] if order else None


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
    first = first_failure(records)
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


def terminated(records: Sequence[ExitRecord], nodes: int) -> bool:
    """Return whether someone sent SIGTERM to the step alone: to all of its launchers.

    srun sends it too, once the launcher of a node has ended with a code other than 0, but only to the others.
    """
    return len(records) == nodes and all(record.terminated for record in records)


def main(recipe: str, run: str, nodes: str, status: str, *events: str) -> int:
    """Print the cause, requeue the job if it is to run again, and return its exit code.

    Args:
        run: run directory.
        nodes: tasks of the last step.
        events: `time-limit` and `stop-requested`, as the batch script has received them.
    """
    variables = os.environ
    job, start = variables["SLURM_JOB_ID"], variables.get("SLURM_RESTART_COUNT") or "0"
    records = read_records(record_folder(Path(run), f"{job}-{start}"))
    lost_nodes = functools.partial(slurm.wait_for_lost_nodes, variables["SLURM_JOB_NODELIST"])
    outcome = decide(records, int(nodes), int(status), bool(events), lost_nodes)
    if outcome.error:
        print(f"error: {outcome.error}", file=sys.stderr)
    if "SLURM_ARRAY_TASK_ID" in variables:  # a task may have the array's own number, and requeueing that requeues all
        job = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    state = slurm.ask("scontrol", "show", "job", "--oneliner", job)
    if state and f" Restarts={start} " not in state:
        return outcome.code  # this node lost its connection, and the job runs again without it: do not end that start
    preempted = re.search(r" PreemptTime=\d", state)  # the launchers received SIGTERM, the batch script no signal
    if outcome.code == EXIT_STOPPED and (preempted or ("time-limit" in events and not terminated(records, int(nodes)))):
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
