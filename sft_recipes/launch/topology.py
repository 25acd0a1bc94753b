"""Determine the processes of a run from the request, the recipe, and the hardware of this machine or Slurm job."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sft_recipes.config.gpu_types import identify
from sft_recipes.config.schema import Recipe
from sft_recipes.planner.plan import Plan, Topology
from sft_recipes.planner.suggest import nodes_for
from sft_recipes.runtime import cuda, timeouts
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.errors import SetupError, UserError
from sft_recipes.runtime.run_dir import RunDir

_AMPERE = 8.0


def parse_integer(text: str, name: str, least: int) -> int:
    """Parse an integer.

    Raises:
        SetupError: `text` is not an integer, or is below `least`.
    """
    if not re.fullmatch(r"[-+]?\d+", text) or int(text) < least:
        raise SetupError(f"{name}: found {text!r}, expected an integer of at least {least}")
    return int(text)


@dataclass(frozen=True)
class HardwareRequest:
    """The hardware options of a command; None where an option is not given."""

    gpus: int | None = None
    processes: int | None = None
    nodes: int | None = None
    gpu_type: str | None = None
    devices: str | None = None


@dataclass(frozen=True)
class Allocation:
    """The nodes of a Slurm job step, as seen from one of them.

    Attributes:
        job: job id; kept when the job is requeued.
        start: name of this start of the job; the same on all nodes.
        nodes: number of nodes, with one task each.
        rank: rank of this node; node 0 is the leader, the others are followers.
        name: name of this node in Slurm.
        gpus_per_node: None if the job requested no GPUs.
        addresses: addresses of node 0, best first.
        port: rendezvous port; jobs that run at the same time have different ones.
    """

    job: int
    start: str
    nodes: int
    rank: int
    name: str
    gpus_per_node: int | None
    addresses: tuple[str, ...]
    port: int


# Below the ephemeral ports of Linux (32768 and above), above the ports of known services.
_FIRST_PORT, _PORTS = 15000, 15000
_LAST_PORT = 65535


def from_slurm(environment: Mapping[str, str]) -> Allocation | None:
    """Return the allocation of the job step that this process is a task of; None outside of a job step.

    Raises:
        SetupError: the step has more or less than one task per node, or the nodes have different numbers of GPUs.

    Source: srun(1), "OUTPUT ENVIRONMENT VARIABLES".
    """
    if not environment.get("SLURM_STEP_ID", "").isdigit() or "SLURM_PROCID" not in environment:
        return None
    nodes, tasks = int(environment["SLURM_STEP_NUM_NODES"]), int(environment["SLURM_STEP_NUM_TASKS"])
    if tasks != nodes:
        raise SetupError(
            f"Slurm: found {tasks} tasks on {nodes} nodes, expected one per node, which starts the node's ranks. "
            f"Use --ntasks-per-node=1"
        )
    on_node, total = environment.get("SLURM_GPUS_ON_NODE"), environment.get("SLURM_GPUS")
    gpus_per_node = int(on_node) if on_node else None
    if gpus_per_node is not None and (total or "").isdigit() and int(total or 0) != gpus_per_node * nodes:
        raise SetupError(
            f"Slurm: found {total} GPUs on {nodes} nodes, expected the same number on each. "
            f"Use --gpus-per-node instead of --gpus"
        )
    job = int(environment["SLURM_JOB_ID"])
    return Allocation(
        job=job,
        start=f"{environment.get('SLURM_RESTART_COUNT') or 0}-{environment['SLURM_STEP_ID']}",
        nodes=nodes,
        rank=int(environment["SLURM_NODEID"]),
        name=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        gpus_per_node=gpus_per_node,
        addresses=_addresses(environment),
        port=_port(environment.get("MASTER_PORT")) or _FIRST_PORT + job % _PORTS,
    )


def _addresses(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return MASTER_ADDR if set. Otherwise Slurm's name of node 0, which need not resolve, and the address of the node
    that srun runs on, which in a batch job is node 0."""
    if address := environment.get("MASTER_ADDR"):
        return (address,)
    launch_node = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    return (first_host(environment["SLURM_STEP_NODELIST"]), *([launch_node] if launch_node else []))


def _port(text: str | None) -> int | None:
    port = parse_integer(text, "MASTER_PORT", 1) if text else None
    if port is not None and port > _LAST_PORT:
        raise SetupError(f"MASTER_PORT: found {port}, expected 1 to {_LAST_PORT}")
    return port


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm node list: `node003` of `node[003-005,9],other`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def plan_topology(recipe: Recipe, request: HardwareRequest | None = None) -> Topology:
    """Return the hardware to plan for: the requested one, otherwise the recipe's. Checks no machine."""
    request = request or HardwareRequest()
    gpus = recipe.hardware.gpus if request.gpus is None else request.gpus
    nodes, processes = request.nodes, request.processes
    if nodes is None:
        nodes = recipe.hardware.nodes if gpus == recipe.hardware.gpus else nodes_for(gpus)
    if gpus % nodes:
        raise SetupError(f"GPUS: found {gpus} GPUs on {nodes} nodes, expected a multiple of {nodes}")
    if not gpus and (processes or 1) % nodes:
        raise SetupError(
            f"PROCESSES: found {processes or 1} CPU processes on {nodes} nodes, expected a multiple of {nodes}"
        )
    if processes and gpus:
        raise SetupError(
            f"PROCESSES: found {processes} with {gpus} GPUs, expected none: each GPU has one process. Remove PROCESSES"
        )
    if request.gpu_type and not gpus:
        raise SetupError(f"GPU_TYPE: found {request.gpu_type} without GPUs. Set GPUS=<number>, or remove GPU_TYPE")
    gpu_type = request.gpu_type or (recipe.hardware.gpu_type if gpus else None)
    return Topology(gpus=gpus, processes=gpus or processes or 1, nodes=nodes, gpu_type=gpu_type)


def available_topology(recipe: Recipe, request: HardwareRequest, allocation: Allocation | None = None) -> Topology:
    """Return the hardware to run on, which must be available here.

    Args:
        allocation: the Slurm allocation if this process is a task of a job step.

    Raises:
        SetupError: the machine or job has other hardware than requested, or no GPU for a recipe that needs one.
    """
    if allocation is not None and allocation.nodes > 1:
        return _allocated_topology(recipe, request, allocation)
    available, gpus, devices = visible_gpus(), request.gpus, request.devices
    if allocation is not None and gpus != 0 and len(available) < (allocation.gpus_per_node or 0):
        raise _missing_gpus(allocation, len(available))
    if request.nodes and request.nodes > 1:
        raise SetupError(
            f"NODES: found {request.nodes} without a Slurm job, which starts a launcher on each node. Use "
            f"sbatch --nodes={request.nodes} slurm/{recipe.name}.sh (slurm/README.md)"
        )
    if devices is not None:
        ids = _device_ids(devices, [gpu.id for gpu in available])
        if gpus is not None and gpus != len(ids):
            raise SetupError(f"DEVICES: found {len(ids)} GPUs in {devices}, expected GPUS={gpus}. Set one of the two")
        gpus = len(ids)
    if gpus is None:
        gpus = 0 if recipe.hardware.gpus == 0 else len(available)
        if gpus == 0 and recipe.hardware.gpus > 0:
            fix = hidden_gpus() or "try `make train` (the tiny recipe), or set GPUS=0 to run it on the CPU"
            raise SetupError(
                f"GPUS: recipe {recipe.name} needs {recipe.hardware.gpus} GPUs and this machine has none; {fix}"
            )
    if gpus > len(available):
        raise SetupError(
            f"GPUS: {gpus} requested, but this machine has {len(available) or 'none'}; "
            f"{hidden_gpus() or f'set GPUS={len(available)}'}"
        )
    ids = devices.split(",") if devices else [gpu.id for gpu in available[:gpus]]
    selected = [gpu for gpu in available if gpu.id in ids]
    _check_generation(recipe, selected)
    _check_memory(request.gpu_type, selected)
    request = replace(request, gpus=gpus, gpu_type=request.gpu_type or gpu_type_of(selected))
    topology = plan_topology(recipe, request)
    mask = devices or (",".join(ids) if 0 < gpus < len(available) else None)
    return Topology(topology.gpus, topology.processes, 1, topology.gpu_type, mask)


def _missing_gpus(allocation: Allocation, available: int) -> UserError:
    return UserError(
        f"GPUS: Slurm allocated {allocation.gpus_per_node} on {allocation.name}, nvidia-smi lists "
        f"{available or 'none'}. Exclude that node: sbatch --exclude={allocation.name}"
    )


def _allocated_topology(recipe: Recipe, request: HardwareRequest, allocation: Allocation) -> Topology:
    """Return the hardware of a job of several nodes: all of its GPUs, or none.

    Raises:
        SetupError: the job has other hardware than requested, or this node lacks GPUs.
    """
    gpus, job, nodes = request.gpus, allocation.job, allocation.nodes
    if request.devices is not None:
        raise SetupError(f"DEVICES: found {request.devices} in a Slurm job, which selects its own GPUs. Remove DEVICES")
    if request.nodes is not None and request.nodes != nodes:
        raise SetupError(
            f"NODES: found {request.nodes}, expected {nodes}, the nodes of job {job}. Use sbatch "
            f"--nodes={request.nodes}, or remove NODES"
        )
    allocated = nodes * (allocation.gpus_per_node or 0)
    if gpus is None:
        gpus = 0 if recipe.hardware.gpus == 0 else allocated
        if gpus == 0 and recipe.hardware.gpus > 0:
            raise SetupError(
                f"GPUS: recipe {recipe.name} needs {recipe.hardware.gpus} GPUs and job {job} has none. Use sbatch "
                f"--gpus-per-node, or set GPUS=0 to run it on the CPU"
            )
    if gpus not in (0, allocated):
        raise SetupError(
            f"GPUS: found {gpus}, expected {allocated}: job {job} has {nodes} nodes x {allocation.gpus_per_node or 0}. "
            f"Use sbatch --gpus-per-node, or remove GPUS"
        )
    available = visible_gpus() if gpus else []
    if gpus and len(available) < gpus // nodes:
        raise _missing_gpus(allocation, len(available))
    _check_generation(recipe, available)
    _check_memory(request.gpu_type, available)
    processes = nodes if not gpus and request.processes is None else request.processes
    gpu_type = request.gpu_type or gpu_type_of(available)
    return plan_topology(recipe, HardwareRequest(gpus, processes, nodes, gpu_type))


def _check_generation(recipe: Recipe, gpus: Sequence[Gpu]) -> None:
    """Reject bf16 and flash attention on GPUs older than Ampere, which support neither.

    Raises:
        SetupError: with the settings to use instead.
    """
    old = next((gpu for gpu in gpus if (gpu.compute_capability or _AMPERE) < _AMPERE), None)
    if old is None:
        return
    replacements = {"precision": ("bf16", "fp32"), "model.attention": ("flash_attention_2", "sdpa")}
    current = {"precision": recipe.precision, "model.attention": recipe.model.attention}
    unsupported = [key for key, (value, _) in replacements.items() if current[key] == value]
    if unsupported:
        raise SetupError(
            f"GPUS: {old.name} (compute capability {old.compute_capability}) is older than Ampere and has no "
            f"{' and no '.join(current[key] for key in unsupported)}. "
            f"Set {' '.join(f'{key}={replacements[key][1]}' for key in unsupported)}"
        )


def _check_memory(gpu_type: str | None, gpus: Sequence[Gpu]) -> None:
    """Reject GPUs of unknown memory unless GPU_TYPE is set.

    Raises:
        SetupError: with the variable to set.
    """
    unknown = next((gpu for gpu in gpus if not gpu.memory_mib), None)
    if gpu_type is None and unknown is not None:
        raise SetupError(f"GPU_TYPE: nvidia-smi reports no memory size for {unknown.name}; set GPU_TYPE=<its GiB>")


def check_host_memory(plan: Plan) -> None:
    """Reject a plan that exceeds the host memory of this node; a rank would be killed, possibly hours later.

    Raises:
        SetupError: the plan needs more host memory than the node has.
    """
    available = host_memory_bytes()
    needed, per_rank = plan.host_bytes_per_node, plan.memory_bytes_per_gpu
    ranks_per_node = plan.world_size // plan.nodes
    if per_rank and not plan.uses_gpu and per_rank["total"] * ranks_per_node > available:
        raise SetupError(
            f"GPUS: on the CPU {plan.recipe} needs about {per_rank['total'] * ranks_per_node / 2**30:.0f} GiB of "
            f"memory, found {available / 2**30:.0f} GiB. Set GPUS=<number> on a machine with GPUs"
        )
    if needed and needed["offload"] and needed["total"] > available:
        raise SetupError(
            f"parallelism: {plan.parallelism} needs about {needed['total'] / 2**30:.0f} GiB of host memory "
            f"({needed['offload'] / 2**30:.0f} GiB offloaded), found {available / 2**30:.0f} GiB. Set "
            f"parallelism=zero3 with more GPUs, or use a recipe with LoRA"
        )


def check_disk(plan: Plan, folder: RunDir) -> None:
    """Reject a run whose folder would outgrow its disk, possibly hours later.

    Raises:
        SetupError: free space plus the folder's present size is less than the run needs.
    """
    existing = next(place for place in (folder.path, *folder.path.absolute().parents) if place.exists())
    held = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    free = shutil.disk_usage(existing).free
    if plan.disk_bytes and plan.disk_bytes > free + held:
        raise SetupError(
            f"RUNS_DIR: {plan.recipe} needs up to {plan.disk_bytes / 2**30:.1f} GiB in {folder.path} (three "
            f"checkpoints while one is written, the models), found {free / 2**30:.1f} GiB free. Free space, or set "
            f"RUNS_DIR=<folder on a larger disk>"
        )


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi lists it; memory in MiB, 0 if the driver reports none (GB10); compute capability if the
    driver reports it (8.0 for Ampere)."""

    id: str
    memory_mib: float
    name: str
    compute_capability: float | None = None


def visible_gpus() -> list[Gpu]:
    """The GPUs that this process may use: CUDA_VISIBLE_DEVICES where it is set, else what nvidia-smi lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    listed = ask_nvidia("index,memory.total,name")
    capabilities = {row[0]: float(row[1]) for row in ask_nvidia("index,compute_cap") if _is_number(row[1:])}
    gpus = {
        row[0]: Gpu(
            row[0], float(row[1]) if _is_number([row[1]]) else 0.0, ", ".join(row[2:]), capabilities.get(row[0])
        )
        for row in listed
        if len(row) > 2 and row[0].isdigit()
    }
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if masked is not None and gpus:
        named = [part.strip() for part in masked.split(",")]
        # CUDA's rule: a name of no GPU (-1, an index out of range, Slurm's NoDevFiles) hides itself and all after it.
        known = list(itertools.takewhile(lambda name: name in gpus or name.startswith(("GPU-", "MIG-")), named))
        least = min(gpus.values(), key=lambda gpu: gpu.memory_mib)  # of one that is named otherwise, by its UUID
        return [gpus.get(name, replace(least, id=name)) for name in known]
    return list(gpus.values())


def hidden_gpus() -> str:
    """Why this process sees fewer GPUs than the machine has, and the fix; empty if nothing is known to hide any."""
    if error := nvidia_smi_error():
        return f"nvidia-smi fails ({error}): see dmesg; after an update of the driver, restart the machine"
    if shutil.which("nvidia-smi") is None:
        version = cuda.driver_version()
        return f"NVIDIA driver {version} is loaded, but nvidia-smi is not on PATH; install it" if version else ""
    masked, here, listed = os.environ.get("CUDA_VISIBLE_DEVICES"), len(visible_gpus()), len(ask_nvidia("index"))
    if masked is None or here == listed:
        return ""
    return (
        f"CUDA_VISIBLE_DEVICES={masked!r} leaves {here} of the {listed} that nvidia-smi lists; unset it, or name more"
    )


def nvidia_smi_error() -> str | None:
    """What nvidia-smi prints where it is installed and fails, for example after an update of the driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=timeouts.NVIDIA_SMI
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeouts.NVIDIA_SMI:.0f} s"
    return None if listed.returncode == 0 else " ".join((listed.stdout + listed.stderr).split())[:200]


def ask_nvidia(fields: str) -> list[list[str]]:
    """A row of fields a GPU; none where the driver does not answer, or does not know a field."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=timeouts.NVIDIA_SMI)
    except subprocess.TimeoutExpired:
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [[part.strip() for part in line.split(",")] for line in lines]


def _is_number(texts: list[str]) -> bool:
    return len(texts) == 1 and re.fullmatch(r"\d+(\.\d+)?", texts[0]) is not None


def gpu_type_of(gpus: Sequence[Gpu]) -> str | None:
    """What a plan takes for these GPUs: the type of the one with the least memory, or its GiB if it is not in the
    table of GPU types."""
    if not gpus:
        return None
    smallest = min(gpus, key=lambda gpu: gpu.memory_mib)
    known = identify(smallest.name, smallest.memory_mib)
    return known.name if known else f"{smallest.memory_mib / 1024:.1f}"


def unlisted(gpus: Sequence[Gpu]) -> list[str]:
    """Product names of the GPUs that are not in the table of GPU types."""
    return sorted({gpu.name for gpu in gpus if identify(gpu.name, gpu.memory_mib) is None})


def _device_ids(devices: str, here: list[str]) -> list[str]:
    ids = devices.split(",")
    if not re.fullmatch(r"\d+(,\d+)*", devices) or len(set(ids)) != len(ids):
        raise SetupError(f"DEVICES: found {devices!r}, expected GPU ids, such as 0,2")
    missing = [device for device in ids if device not in here]
    if missing:
        raise SetupError(
            f"DEVICES: no GPU {', '.join(missing)} on this machine. Available: {', '.join(here) or 'none'}"
        )
    return ids
