"""Run a command as a task of a Slurm job: coordinate the nodes, check them, count the job's starts, query Slurm."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_recipes.launch import attempts, node_checks, preflight, ranks, run_lock
from sft_recipes.launch.node_checks import CheckResult
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.run_selection import RunStart
from sft_recipes.launch.stop_request import StopRequest, handle_stop_signals
from sft_recipes.launch.topology import Allocation, from_slurm, visible_gpus
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.run_dir import (
    EXIT_ERROR,
    EXIT_STOPPED,
    EXIT_USER,
    RunDir,
    check_name,
    read_json,
    runs_root,
    write_json,
)

log = logging.getLogger(__name__)
_CUDA = "CUDA"
_LEAST_TMP_BYTES = 2**30  # libraries compile and unpack in /tmp


@contextlib.contextmanager
def node_launchers(environment: Mapping[str, str]) -> Iterator[NodeLaunchers | None]:
    """Yield the launchers of this job's nodes after their rendezvous; None on a single node.

    Raises:
        UserError: a node did not appear in time.
        StoppedError: a stop was requested before all nodes appeared.
    """
    allocation = from_slurm(environment)
    if allocation is None or allocation.nodes == 1:
        yield None
        return
    launchers = NodeLaunchers(allocation)
    with handle_stop_signals() as stop_request:
        node_info = _node_info()
        launchers.rendezvous({**node_info, "cuda": preflight.gpu_problem(len(node_info["gpus"]))}, stop_request)
    try:
        yield launchers
    finally:
        if launchers.is_leader:
            launchers.release_followers()


@contextlib.contextmanager
def batch_signals() -> Iterator[None]:
    """Handle stop signals of a batch job from the first moment: the scheduler may send one at once.

    Files in SFT_RECIPES_LOGS inform slurm/launch.sh: `.ready-RANK` that this launcher handles signals, since earlier
    ones would kill it, and `stop-requested` that node 0 received SIGTERM, after which the job is not requeued.
    """
    allocation = _batch_allocation()
    if allocation is None:
        yield
        return
    logs = Path(os.environ["SFT_RECIPES_LOGS"])
    with handle_stop_signals() as stop_request:
        (logs / f".ready-{allocation.rank}").touch()
        try:
            yield
        finally:
            if allocation.rank == 0 and signal.SIGTERM in stop_request.signals:
                (logs / "stop-requested").touch()


def await_run(name: str | None) -> None:
    """Wait until an earlier start of the run, on a node that lost its connection, has exited.

    Raises:
        UserError: the name is not valid for a run.
        StoppedError: a stop was requested meanwhile.
    """
    allocation = _batch_allocation()
    if allocation is not None and name is not None:
        folder = RunDir(runs_root() / check_name(name))
        if allocation.rank == 0:
            with handle_stop_signals() as stop_request:
                run_lock.wait_until_free(folder, stop_request)


def stopped_before_rendezvous(environment: Mapping[str, str]) -> int:
    """Return the exit code; 0 on followers, because node 0 alone reports how a job ended."""
    allocation = from_slurm(environment)
    if allocation is not None and allocation.rank:
        return 0
    log.info("stopped before all nodes were ready; no step was taken. Run the same command to start again")
    return EXIT_STOPPED


def follow(launchers: NodeLaunchers) -> int:
    """Run the leader's commands on this node."""
    with handle_stop_signals() as stop_request:
        code = ranks.follow(launchers, stop_request)
    if code == 0:
        launchers.announce_exit()
    return code


def _batch_allocation() -> Allocation | None:
    """Return the allocation if slurm/launch.sh started this process, which can be requeued; otherwise None."""
    return from_slurm(os.environ) if os.environ.get("SFT_RECIPES_LOGS") else None


def no_progress(start: RunStart) -> str | None:
    """Count a start of the job; return an error after the last allowed start without a new checkpoint.

    `attempts.py` counts attempts whose ranks ran and were not stopped; this count also has the starts that ended before
    (nodes, data, sanity check), when the run may have no directory yet, and those stopped before a save.
    """
    allocation = _batch_allocation()
    if allocation is None:
        return None
    file = _job_folder(allocation) / "starts.json"
    previous, run, step = read_json(file), start.run_dir, start.run_dir.latest_complete()
    count = attempts.count_attempts(previous if previous.get("run") == run.name else None, step) + 1
    for place in (file.parents[1], file.parent):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(file, {"run": run.name, "step": step, "count": count})
    if count <= attempts.MAX_ATTEMPTS or start.explicit_resume:
        return None
    progress = f"no progress since checkpoint-{step}" if step else "no progress"
    return (
        f"{run.path}: {progress} after {count - 1} starts of job {allocation.job}. Increase --time, or see "
        f"its logs for the failure; set RESUME=1 to try again"
    )


def forget(environment: Mapping[str, str]) -> None:
    """Remove the job's coordination files; it is not requeued and all nodes have exited."""
    allocation = from_slurm(environment)
    if allocation is not None and allocation.rank == 0:
        shutil.rmtree(_job_folder(allocation), ignore_errors=True)


def check_nodes(launchers: NodeLaunchers | None, plan: Plan) -> int:
    """Check that each node of a job fits the plan and that their ranks can all-reduce; return 0 or the exit code."""
    allocation = _batch_allocation()
    if launchers is None and allocation is None:
        return 0
    if launchers is None:
        assert allocation is not None
        problems = {allocation.name: list(_check_node(_node_info(), plan))}
    else:
        problems = {
            launchers.node_name(node): [
                *_check_reachable(launchers, node),
                *_check_node(launchers.status(node)["node_info"], plan),
            ]
            for node in range(plan.nodes)
        }
    for name, results in problems.items():
        for result in results:
            log.info(f"{name}: {result}")
    if launchers and len(launchers.other_nodes) > 1 and not _any_node_reaches_leader(launchers):
        leader = launchers.node_name(0)
        log.error(
            f"network: no node reaches {leader}. Set MASTER_ADDR in slurm/cluster.env to a reachable address, or "
            f"exclude it: sbatch --exclude={leader}"
        )
        return EXIT_ERROR
    if without_cuda := {name: r for name, results in problems.items() for r in results if r.check == _CUDA}:
        log.error(_no_cuda(without_cuda, all_nodes=len(without_cuda) == len(problems)))
        return EXIT_USER
    names = ",".join(name for name, results in problems.items() if any(r.status == "error" for r in results))
    if names:
        log.error(f"Slurm: node checks failed on {names}. Exclude it: sbatch --exclude={names}")
        return EXIT_ERROR
    if launchers is None or os.environ.get("SANITY") == "skip":
        return 0
    with handle_stop_signals() as stop_request:
        return _check_all_reduce(launchers, plan, stop_request)


def query_job(job: str | None) -> dict[str, str] | None:
    """Return a job's state from squeue; None if there is no Slurm here or it no longer knows the job."""
    if not job or shutil.which("squeue") is None:
        return None
    names = ("id", "name", "state", "reason", "ran", "left", "nodes")
    squeue = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%A|%j|%T|%r|%M|%L|%N"]
    try:
        done = subprocess.run(squeue, capture_output=True, text=True, check=False, timeout=timeouts.SLURM_COMMAND)
    except subprocess.TimeoutExpired:
        return None
    rows = [dict(zip(names, line.split("|"), strict=False)) for line in done.stdout.splitlines()]
    state = next((row for row in rows if row["id"] == job), None)  # an array has a row for each task
    if done.returncode or state is None:
        return None
    return {key: value for key, value in state.items() if value not in ("None", "")}


def query_job_of_run(run: str) -> dict[str, str] | None:
    """Return the state of the job that a run is named after, as slurm/launch.sh names them."""
    match = re.fullmatch(r"([\w.-]+)-(\d+)", run)
    state = query_job(match[2]) if match else None
    return state if match and state and state.get("name") == f"sft-{match[1]}" else None


def _any_node_reaches_leader(launchers: NodeLaunchers) -> bool:
    address = launchers.rendezvous_address
    return any(address in launchers.status(node)["reachable"] for node in launchers.other_nodes)


def _check_reachable(launchers: NodeLaunchers, node: int) -> Iterator[CheckResult]:
    if launchers.rendezvous_address not in launchers.status(node)["reachable"]:
        addresses = ", ".join(launchers.status(0)["node_info"]["addresses"])
        detail = f"cannot connect to {launchers.node_name(0)} at any of {addresses}"
        yield CheckResult("network", "error", detail, "set MASTER_ADDR in slurm/cluster.env to another address")


def _check_node(node_info: dict[str, Any], plan: Plan) -> Iterator[CheckResult]:
    """Yield the problems of a node, from the information that it published."""
    ranks_per_node = plan.world_size // plan.nodes
    if node_info["cores"] < min(ranks_per_node, node_info["cores_total"]):
        detail = f"{node_info['cores']} of {node_info['cores_total']} cores for {ranks_per_node} ranks"
        yield CheckResult("cores", "error", detail, "set SRUN_CPUS_PER_TASK to all cores of the node")
    if len(node_info["gpus"]) < plan.gpus // plan.nodes:
        detail = f"found {len(node_info['gpus'])}, expected {plan.gpus // plan.nodes}"
        yield CheckResult("GPUs", "error", detail, "run nvidia-smi on that node")
    if plan.gpus and node_info.get("cuda"):
        yield CheckResult(_CUDA, "error", *node_info["cuda"])
    for gpu in node_info["gpus"] if plan.gpus else []:
        if gpu["used"] * 2**20 > node_checks.IDLE_GPU_BYTES:
            detail = f"GPU {gpu['id']}: {gpu['used'] / 1024:.1f} GiB in use"
            yield CheckResult("GPU memory", "error", detail, "a process of an earlier job may still run there")
    if node_info["tmp_bytes"] < _LEAST_TMP_BYTES:
        detail = f"{node_info['tmp_bytes'] / 2**30:.2f} GiB free"
        yield CheckResult("disk: /tmp", "error", detail, "free at least 1 GiB")


def _no_cuda(results: Mapping[str, CheckResult], all_nodes: bool) -> str:
    """Return the error for nodes where PyTorch cannot use the GPUs; excluding nodes helps only if others are left."""
    names, first = ",".join(results), next(iter(results.values()))
    exclude = "" if all_nodes else f", or exclude it: sbatch --exclude={names}"
    return f"GPUS: {names}: {first.detail}. {first.fix}{exclude}"


def _check_all_reduce(launchers: NodeLaunchers, plan: Plan, stop_request: StopRequest) -> int:
    """Run the all-reduce test over all nodes and print its speed and transports; return 0 or the exit code."""
    report = launchers.folder / "all_reduce.json"
    ended = ranks.run_allreduce_test(plan, report, stop_request, launchers)
    if ended.code == EXIT_STOPPED:
        log.info("stopped during the node checks; no step was taken. Run the same command to start again")
        if ended.error:
            log.info(ended.error)
        return EXIT_STOPPED
    if ended.code or not report.is_file():
        log.error(
            f"all-reduce: failed over the nodes: {ended.error or 'a rank failed'}. See the nodes' logs, and NCCL's in "
            f"{launchers.folder}; exclude the node that they name: sbatch --exclude=NODE"
        )
        return EXIT_ERROR
    nccl_log = "\n".join(file.read_text(errors="replace") for file in launchers.folder.glob("nccl-*"))
    transports = node_checks.find_transports(nccl_log)
    measured = {**json.loads(report.read_text(encoding="utf-8")), "transports": transports}
    result = node_checks.all_reduce(measured, plan.gpus, bool(os.environ.get("ALLOW_SOCKETS")))
    log.info(str(result))
    if result.status == "error":
        log.error(f"all-reduce: {result.detail}. {result.fix}")
        return EXIT_ERROR
    return 0


def _node_info() -> dict[str, Any]:
    """Return the hardware of this node, for the checks of the leader."""
    used = node_checks.used_mib()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cores_total": os.cpu_count() or 1,
        "gpus": [{**asdict(gpu), "used": used.get(gpu.id, 0.0)} for gpu in visible_gpus()],
        "tmp_bytes": shutil.disk_usage("/tmp").free,
    }


def _job_folder(allocation: Allocation) -> Path:
    return runs_root() / ".jobs" / str(allocation.job)
