"""Checks of a node before any rank starts: that PyTorch can use its GPUs, and those of a job; `doctor` shares some."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sft_recipes.launch import command, ranks, topology
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.topology import Gpu, ask_nvidia
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import cuda, env, timeouts
from sft_recipes.runtime.errors import SetupError, UserError
from sft_recipes.runtime.programs import run_program
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_USER, read_json
from sft_recipes.runtime.units import GIB

log = logging.getLogger(__name__)

Status = Literal["ok", "warning", "error"]

# Log lines of NCCL at NCCL_DEBUG=INFO.
_TRANSPORTS = {
    "NVLink SHARP": r"NVLS multicast support is available| via NVLS",
    "P2P": r" via P2P/",
    "shared memory": r" via SHM/",
    "InfiniBand or RoCE": r" via NET/IB/",
    "TCP sockets": r" via NET/Socket/",
    "network plugin": r" via NET/(?!IB/|Socket/)",
}

_CUDA = "CUDA"
_LEAST_TMP_BYTES = GIB  # libraries compile and unpack in /tmp
_IDLE_GPU_BYTES = GIB  # drivers and desktops use less than this of a GPU's memory


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; `fix` is set unless the status is ok."""

    check: str
    status: Status
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.check:<16} {self.detail}{f'; {self.fix}' if self.fix else ''}"


def all_reduce(measured: dict[str, Any], gpus: int, sockets_allowed: bool = False) -> CheckResult:
    """Check that the ranks can all-reduce, over which transports, and how fast.

    Args:
        measured: the report of `tools/allreduce_bench.py` and its `transports`, or an `error`.
    """
    if "error" in measured:
        fix = "set NCCL_DEBUG=INFO" if gpus else "run make setup"
        return CheckResult("all-reduce", "error", measured["error"], fix)
    if not measured["correct"]:
        return CheckResult("all-reduce", "error", "the sum over the ranks is wrong", "do not train on this machine")
    detail = f"{measured['bytes_per_second'] / 1e9:.1f} GB/s over {measured['ranks']} ranks ({measured['backend']})"
    if not gpus or measured["ranks"] == 1:
        return CheckResult("all-reduce", "ok", detail)
    detail += f", {' and '.join(measured['transports']) or 'transport not in the NCCL log'}"
    if "TCP sockets" in measured["transports"] and not sockets_allowed:
        fix = "within a node check /dev/shm and NCCL_P2P_DISABLE, between nodes ibv_devinfo; or set ALLOW_SOCKETS=1"
        return CheckResult("all-reduce", "error", detail, fix)
    return CheckResult("all-reduce", "ok", detail)


def nccl_log_variables(folder: str) -> dict[str, str]:
    """Return environment variables with which NCCL writes its log to a folder."""
    return {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,NET", "NCCL_DEBUG_FILE": f"{folder}/nccl-%p"}


def read_transports(folder: str) -> list[str]:
    """Return the transports that NCCL selected, from its log in a folder (lines `Channel … via …`)."""
    log = "\n".join(file.read_text(errors="replace") for file in Path(folder).glob("nccl-*"))
    return [transport for transport, pattern in _TRANSPORTS.items() if re.search(pattern, log)]


def check_gpus(plan: Plan) -> None:
    """Check that PyTorch can use the GPUs of this node that the plan needs.

    Raises:
        SetupError: it cannot; with the cause and the fix.
    """
    needed = plan.gpus // plan.nodes
    if problem := gpu_problem(needed, command.environment(plan, os.environ)):
        raise SetupError(f"GPUS: {needed} requested, but {problem[0]}. {problem[1]}")


def gpu_problem(needed: int, environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Return why PyTorch cannot use this number of GPUs on this machine, and the fix; None if it can.

    Args:
        environment: the variables of the processes that need the GPUs.
    """
    report = probe_torch(environment) if needed else {}
    if report.get("devices", 0) >= needed:
        return None
    return cuda.find_problem(report, needed, cuda.driver_version(), environment.get("CUDA_VISIBLE_DEVICES"))


def probe_torch(environment: Mapping[str, str], extent: str = "cuda") -> dict[str, Any]:
    """Return the report of `training/torch_probe.py`, run as a process since a launcher does not import PyTorch.

    Args:
        extent: `all`, or `cuda` for only what `runtime/cuda.py` needs.
    """
    probe = [sys.executable, "-m", "sft_recipes.training.torch_probe", extent]
    code, output = run_program(*probe, timeout=timeouts.TORCH_PROBE, environment=env.with_repository(environment))
    last = output.strip().rpartition("\n")[2]
    return {"error": last or "no message"} if code else dict(json.loads(last))


def occupied_gpus(gpus: Sequence[Gpu]) -> list[str]:
    """Describe the GPUs of which other processes use memory."""
    rows = [row for row in ask_nvidia("index,memory.used") if len(row) == 2 and row[1].isdigit()]
    used = {row[0]: int(row[1]) * 2**20 for row in rows}
    return [f"GPU {g.id}: {used[g.id] / GIB:.1f} GiB" for g in gpus if used.get(g.id, 0) > _IDLE_GPU_BYTES]


def check_node(plan: Plan) -> Iterator[CheckResult]:
    """Yield the problems of this node with a plan."""
    ranks_here, gpus_here = plan.world_size // plan.nodes, plan.gpus // plan.nodes
    cores, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if cores < min(ranks_here, all_cores):
        yield CheckResult("cores", "error", f"{cores} of {all_cores} for {ranks_here} ranks", "set SRUN_CPUS_PER_TASK")
    free = shutil.disk_usage("/tmp").free
    if free < _LEAST_TMP_BYTES:
        yield CheckResult("disk: /tmp", "error", f"{free / GIB:.2f} GiB free", "free at least 1 GiB")
    try:
        topology.check_host_memory(plan)
    except UserError as error:
        yield CheckResult("host memory", "error", str(error))
    if not plan.gpus:
        return
    gpus = topology.visible_gpus()
    if len(gpus) < gpus_here:
        yield CheckResult("GPUs", "error", f"found {len(gpus)}, expected {gpus_here}", "run nvidia-smi on that node")
    if problem := gpu_problem(gpus_here):
        yield CheckResult(_CUDA, "error", *problem)
    if occupied := ", ".join(occupied_gpus(gpus)):
        yield CheckResult("GPU memory", "error", f"in use on {occupied}", "a process of an earlier job may still run")


def check_all_nodes(context: RunContext, name: str) -> int:
    """Check each node, exchange the results, and run the all-reduce test over all ranks. Call on every node.

    Returns:
        0, or the exit code, which is the same on all nodes.

    Args:
        name: of this node.
    """
    own: dict[str, Any] = {"name": name, "results": [asdict(result) for result in check_node(context.plan)]}
    placement = context.placement
    reports = placement.exchange(own, context.stop_request) if placement else [own]
    problems = {report["name"]: [CheckResult(**result) for result in report["results"]] for report in reports}
    code, error = _judge(problems)
    if context.is_first_node:
        for node, results in problems.items():
            for result in results:
                log.info(f"{node}: {result}")
        if error:
            log.error(error)
    if code or placement is None or env.sanity_is_skipped():
        return code
    return _check_all_reduce(context)


def _judge(problems: Mapping[str, Sequence[CheckResult]]) -> tuple[int, str]:
    """Return exit code and error for the problems of each node. PyTorch that cannot use the GPUs is wrong input, and
    excluding nodes helps only if others are left."""
    if without_cuda := {name: r for name, results in problems.items() for r in results if r.check == _CUDA}:
        names, first = ",".join(without_cuda), next(iter(without_cuda.values()))
        exclude = "" if len(without_cuda) == len(problems) else f", or exclude it: sbatch --exclude={names}"
        return EXIT_USER, f"GPUS: {names}: {first.detail}. {first.fix}{exclude}"
    if names := ",".join(name for name, results in problems.items() if results):
        return EXIT_ERROR, f"node checks failed on {names}. Exclude it: sbatch --exclude={names}"
    return 0, ""


def _check_all_reduce(context: RunContext) -> int:
    """Run the all-reduce test, and print its speed and transports; return 0 or the exit code."""
    result_file = context.run_dir.result
    with tempfile.TemporaryDirectory(prefix="sft-") as folder:
        variables = nccl_log_variables(folder)
        ended = ranks.run_ranks(context, "tools.allreduce_bench", can_save=False, variables=variables)
        transports = read_transports(folder)
    code = ended.code
    if ended.error:
        log.error(f"all-reduce test: {ended.error}. See the logs of the nodes")
        return code
    if context.is_first_node and not code:
        measured = {**read_json(result_file), "transports": transports}
        result_file.unlink()
        result = all_reduce(measured, context.plan.gpus, bool(os.environ.get("ALLOW_SOCKETS")))
        log.info(str(result))
        if result.status == "error":
            code = EXIT_ERROR
            log.error(f"all-reduce: {result.detail}. {result.fix}")
    return context.agree(code)
