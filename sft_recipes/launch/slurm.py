"""Carries a verb out as a task of a Slurm job: meets the parents on the other nodes, looks whether the nodes are fit,
counts the job's starts, and asks Slurm what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_recipes.launch import attempts, node_checks, preflight, process_group, ranks, run_lock
from sft_recipes.launch.node_checks import Finding
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.process_group import StopRequest
from sft_recipes.launch.run_selection import Start
from sft_recipes.launch.topology import Allocation, from_slurm, visible_gpus
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.run_dir import (
    EXIT_FAULT,
    EXIT_STOPPED,
    EXIT_USER,
    RunDir,
    check_name,
    read_json,
    runs_root,
    write_json,
)

_CUDA = "CUDA"
_ROOM_BYTES = 2**30  # of /tmp, where libraries compile and unpack


@contextlib.contextmanager
def peers(environment: Mapping[str, str]) -> Iterator[NodeLaunchers | None]:
    """The parents on the other nodes of this job, met; None where there are none.

    Raises:
        UserError: they are not met.
        StoppedError: this one was asked to stop before they were.
    """
    allocation = from_slurm(environment)
    if allocation is None or allocation.nodes == 1:
        yield None
        return
    met = NodeLaunchers(allocation)
    with process_group.listening() as asked:
        here = _what_is_here()
        met.meet({**here, "cuda": preflight.gpu_problem(len(here["gpus"]))}, asked)
    try:
        yield met
    finally:
        if met.leads:
            met.dismiss()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """In a batch job signals are heard from the first moment on: a scheduler's may come at once, and is no accident.
    slurm/launch.sh has word of it, since it passes none on before; and where node 0 hears a SIGTERM, that the job is
    not to come back."""
    allocation = _of_a_batch_job()
    if allocation is None:
        yield
        return
    words = Path(os.environ["SFT_RECIPES_LOGS"])
    with process_group.listening() as asked:
        (words / f".hears-{allocation.rank}").touch()
        try:
            yield
        finally:
            if allocation.rank == 0 and signal.SIGTERM in asked.numbers:
                (words / "asked-to-end").touch()


def await_run(name: str | None) -> None:
    """Waits until an earlier start of the run, on a node that was cut off, has ended by itself.

    Raises:
        UserError: the name is none for a run.
        StoppedError: this process was asked to stop meanwhile.
    """
    allocation = _of_a_batch_job()
    if allocation is not None and name is not None:
        folder = RunDir(runs_root() / check_name(name))
        if allocation.rank == 0:
            with process_group.listening() as asked:
                run_lock.await_free(folder, asked)


def stopped_before_they_met(environment: Mapping[str, str]) -> int:
    """The exit code; of the other nodes it is 0, since how a job ended is node 0's to say."""
    allocation = from_slurm(environment)
    if allocation is not None and allocation.rank:
        return 0
    print("stopped before the nodes had met; nothing was trained, and the same command begins again", flush=True)
    return EXIT_STOPPED


def follow(peers: NodeLaunchers) -> int:
    """This node's part, as node 0 orders it."""
    with process_group.listening() as asked:
        code = ranks.follow(peers, asked)
    if code == 0:
        peers.leave()
    return code


def _of_a_batch_job() -> Allocation | None:
    """The allocation where slurm/launch.sh started this, which starts again and again; None by hand."""
    return from_slurm(os.environ) if os.environ.get("SFT_RECIPES_LOGS") else None


def exhausted(start: Start) -> str | None:
    """Counts a start of the job; where as many as may be have brought the run no further, that, and what to do."""
    allocation = _of_a_batch_job()
    if allocation is None:
        return None
    file = _folder(allocation) / "starts.json"
    before, step = read_json(file), start.folder.latest_complete()
    at_the_same = (before.get("run"), before.get("step")) == (start.folder.name, step)
    count = 1 + (int(before["count"]) if at_the_same else 0)
    for place in (file.parents[1], file.parent):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(file, {"run": start.folder.name, "step": step, "count": count})
    if count <= attempts.STARTS_AT_MOST or start.insisted:
        return None
    at = f"checkpoint-{step}" if step else "its beginning"
    return (
        f"{start.folder.path}: job {allocation.job} was started {count - 1} times and has come no further than {at}; "
        f"give it more --time, or see its logs for what ends it; RESUME=1 tries again"
    )


def forget(environment: Mapping[str, str]) -> None:
    """The job is not started again, and all nodes have left."""
    allocation = from_slurm(environment)
    if allocation is not None and allocation.rank == 0:
        shutil.rmtree(_folder(allocation), ignore_errors=True)


def unfit(peers: NodeLaunchers | None, plan: Plan, say: Callable[[str], None]) -> int:
    """Looks whether the nodes of a job can carry the plan, each by itself and all together; 0, or the exit code."""
    allocation = _of_a_batch_job()
    if peers is None and allocation is None:
        return 0
    if peers is None:
        assert allocation is not None
        bad = {allocation.name: list(_wrong(_what_is_here(), plan))}
    else:
        bad = {
            peers.name(number): [*_unreached(peers, number), *_wrong(peers.told(number)["hello"], plan)]
            for number in range(plan.nodes)
        }
    for name, findings in bad.items():
        for finding in findings:
            say(f"{name}: {finding}")
    if peers and len(peers.others) > 1 and not any(peers.address in peers.told(n)["reaches"] for n in peers.others):
        leader = peers.name(0)
        return process_group.fail(
            f"no node reaches {leader}: name an address of it that they do reach, MASTER_ADDR in slurm/cluster.env, or "
            f"leave it out: sbatch --exclude={leader}",
            EXIT_FAULT,
        )
    if without_cuda := {name: one for name, findings in bad.items() for one in findings if one.check == _CUDA}:
        return process_group.fail(_no_cuda(without_cuda, all_nodes=len(without_cuda) == len(bad)), EXIT_USER)
    names = ",".join(name for name, findings in bad.items() if any(one.colour == "red" for one in findings))
    if names:
        return process_group.fail(f"{names} cannot carry its part; leave it out: sbatch --exclude={names}", EXIT_FAULT)
    if peers is None or os.environ.get("SANITY") == "skip":
        return 0
    with process_group.listening() as asked:
        return _sum(peers, plan, say, asked)


def asked_of_slurm(job: str | None) -> dict[str, str] | None:
    """What Slurm says of a job; None where there is no Slurm here, or it has forgotten the job."""
    if not job or shutil.which("squeue") is None:
        return None
    names = ("id", "name", "state", "reason", "ran", "left", "nodes")
    asked = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%A|%j|%T|%r|%M|%L|%N"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=timeouts.SLURM_COMMAND)
    except subprocess.TimeoutExpired:
        return None
    rows = [dict(zip(names, line.split("|"), strict=False)) for line in done.stdout.splitlines()]
    found = next((row for row in rows if row["id"] == job), None)  # of an array there is a row for each task
    if done.returncode or found is None:
        return None
    return {key: value for key, value in found.items() if value not in ("None", "")}


def named(run: str) -> dict[str, str] | None:
    """What Slurm says of the job that a run is named after, as slurm/launch.sh names them."""
    said = re.fullmatch(r"([\w.-]+)-(\d+)", run)
    found = asked_of_slurm(said[2]) if said else None
    return found if said and found and found.get("name") == f"sft-{said[1]}" else None


def _unreached(peers: NodeLaunchers, number: int) -> Iterator[Finding]:
    """Whether a node does not reach the place where the ranks meet."""
    if peers.address not in peers.told(number)["reaches"]:
        found = f"does not reach {peers.name(0)} by any of {', '.join(peers.told(0)['hello']['addresses'])}"
        yield Finding("network", "red", found, "MASTER_ADDR in slurm/cluster.env names another address")


def _wrong(here: dict[str, Any], plan: Plan) -> Iterator[Finding]:
    """What is wrong with a node, by what it shows."""
    ranks_here = plan.world_size // plan.nodes
    if here["cores"] < min(ranks_here, here["cores_of_all"]):
        found = f"{here['cores']} of {here['cores_of_all']} cores for {ranks_here} ranks"
        yield Finding("cores", "red", found, "have srun give the task all of the node's: SRUN_CPUS_PER_TASK")
    if len(here["gpus"]) < plan.gpus // plan.nodes:
        found = f"{len(here['gpus'])} GPUs, {plan.gpus // plan.nodes} are wanted"
        yield Finding("GPUs", "red", found, "nvidia-smi on that node says more")
    if plan.gpus and here.get("cuda"):
        yield Finding(_CUDA, "red", *here["cuda"])
    for gpu in here["gpus"] if plan.gpus else []:
        if gpu["used"] * 2**20 > node_checks.OWNED_BY_NOBODY_ELSE:
            found = f"GPU {gpu['id']}: {gpu['used'] / 1024:.1f} GiB are taken"
            yield Finding("GPU memory", "red", found, "a process of an earlier job may be left there")
    if here["room"] < _ROOM_BYTES:
        yield Finding("disk: /tmp", "red", f"{here['room'] / 2**30:.2f} GiB free", "make room")


def _no_cuda(findings: Mapping[str, Finding], all_nodes: bool) -> str:
    """The error for nodes where PyTorch cannot use the GPUs; leaving nodes out helps only if others are left."""
    names, first = ",".join(findings), next(iter(findings.values()))
    leave_out = "" if all_nodes else f", or leave it out: sbatch --exclude={names}"
    return f"GPUS: {names}: {first.found}. {first.way_out}{leave_out}"


def _sum(peers: NodeLaunchers, plan: Plan, say: Callable[[str], None], asked: StopRequest) -> int:
    """Has all ranks of all nodes sum, and says how fast and by which way."""
    result = peers.folder / "links.json"
    ended = ranks.sum_over_all(plan, result, asked, peers)
    if ended.code == EXIT_STOPPED:
        say("stopped while the nodes were tried; nothing was trained, and the same command begins again")
        if ended.fault:
            say(ended.fault)
        return EXIT_STOPPED
    if ended.code or not result.is_file():
        return process_group.fail(
            f"the nodes' ranks cannot sum: {ended.fault or 'they end with an error'}; the nodes' logs say more, and "
            f"what NCCL says is in {peers.folder}; leave out the node that it names: sbatch --exclude=…",
            EXIT_FAULT,
        )
    log = "\n".join(file.read_text(errors="replace") for file in peers.folder.glob("nccl-*"))
    measured = {**json.loads(result.read_text(encoding="utf-8")), "ways": node_checks.ways(log)}
    finding = node_checks.all_reduce(measured, plan.gpus, bool(os.environ.get("ALLOW_SOCKETS")))
    say(str(finding))
    if finding.colour == "red":
        return process_group.fail(f"the nodes are not fit: {finding.found}; {finding.way_out}", EXIT_FAULT)
    return 0


def _what_is_here() -> dict[str, Any]:
    """What this node shows the others."""
    used = node_checks.used_mib()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cores_of_all": os.cpu_count() or 1,
        "gpus": [{**asdict(gpu), "used": used.get(gpu.id, 0.0)} for gpu in visible_gpus()],
        "room": shutil.disk_usage("/tmp").free,
    }


def _folder(allocation: Allocation) -> Path:
    return runs_root() / ".jobs" / str(allocation.job)
