"""Finds out which processes will carry a run: from what was asked for and what the machine has."""

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


def whole_number(text: str, name: str, least: int) -> int:
    """The number in `text`.

    Raises:
        SetupError: it is none, or below `least`.
    """
    if not re.fullmatch(r"[-+]?\d+", text) or int(text) < least:
        raise SetupError(f"{name}: {text!r} is not a whole number of at least {least}")
    return int(text)


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to a job step, as one of its nodes sees it.

    Attributes:
        job: the job's id, which it keeps when it is requeued.
        start: names this start of the job, the same on all nodes.
        nodes: how many there are, with one task each.
        rank: which of them this one is; 0 plans, the others follow.
        name: this node's, as Slurm knows it.
        gpus_per_node: None where the job asked for none.
        addresses: under which the others may reach node 0, the best one first.
        port: where ranks of a start meet; another job's is another one.
    """

    job: int
    start: str
    nodes: int
    rank: int
    name: str
    gpus_per_node: int | None
    addresses: tuple[str, ...]
    port: int


# Below the ports that systems hand out by themselves (32768 and above on Linux), above those of known services.
_FIRST_PORT, _PORTS = 15000, 15000
_LAST_PORT = 65535


def from_slurm(environment: Mapping[str, str]) -> Allocation | None:
    """The allocation of the job step that this process is a task of; None outside of one.

    Raises:
        SetupError: the step has another number of tasks than one a node, or nodes with other numbers of GPUs.

    Source: srun(1), "OUTPUT ENVIRONMENT VARIABLES".
    """
    if not environment.get("SLURM_STEP_ID", "").isdigit() or "SLURM_PROCID" not in environment:
        return None
    nodes, tasks = int(environment["SLURM_STEP_NUM_NODES"]), int(environment["SLURM_STEP_NUM_TASKS"])
    if tasks != nodes:
        raise SetupError(
            f"Slurm: {tasks} tasks on {nodes} nodes; wanted one a node, which starts the node's ranks: "
            f"--ntasks-per-node=1"
        )
    on_node, altogether = environment.get("SLURM_GPUS_ON_NODE"), environment.get("SLURM_GPUS")
    here = int(on_node) if on_node else None
    if here is not None and (altogether or "").isdigit() and int(altogether or 0) != here * nodes:
        raise SetupError(
            f"Slurm: {altogether} GPUs on {nodes} nodes are not as many on each; say --gpus-per-node instead of --gpus"
        )
    job = int(environment["SLURM_JOB_ID"])
    return Allocation(
        job=job,
        start=f"{environment.get('SLURM_RESTART_COUNT') or 0}-{environment['SLURM_STEP_ID']}",
        nodes=nodes,
        rank=int(environment["SLURM_NODEID"]),
        name=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        gpus_per_node=here,
        addresses=_addresses(environment),
        port=_port(environment.get("MASTER_PORT")) or _FIRST_PORT + job % _PORTS,
    )


def _addresses(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What the user says; else Slurm's name of the node, which need be no host's, and where srun runs, which in a batch
    job is that node."""
    if said := environment.get("MASTER_ADDR"):
        return (said,)
    launched = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    return (first_host(environment["SLURM_STEP_NODELIST"]), *([launched] if launched else []))


def _port(text: str | None) -> int | None:
    port = whole_number(text, "MASTER_PORT", 1) if text else None
    if port is not None and port > _LAST_PORT:
        raise SetupError(f"MASTER_PORT: {port} is no port; wanted 1 to {_LAST_PORT}")
    return port


def first_host(nodes: str) -> str:
    """The first name of a list of Slurm's: `node[003-005,9],other` begins with `node003`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def planned(
    recipe: Recipe, gpus: int | None, processes: int | None, nodes: int | None, gpu_type: str | None
) -> Topology:
    """The hardware to plan for: what was asked for, else what the recipe names. Looks at no machine."""
    gpus = recipe.hardware.gpus if gpus is None else gpus
    if nodes is None:
        nodes = recipe.hardware.nodes if gpus == recipe.hardware.gpus else nodes_for(gpus)
    if gpus % nodes:
        raise SetupError(f"GPUS: {gpus} GPUs do not share evenly over {nodes} nodes; say a multiple of {nodes}")
    if not gpus and (processes or 1) % nodes:
        raise SetupError(
            f"PROCESSES: {processes or 1} on the CPU do not share evenly over {nodes} nodes; say a multiple of {nodes}"
        )
    if processes and gpus:
        raise SetupError(
            f"PROCESSES: {processes} were asked for with {gpus} GPUs; each GPU has one process, leave it out"
        )
    if gpu_type and not gpus:
        raise SetupError(f"GPU_TYPE: {gpu_type} was asked for without GPUs; say GPUS=<a number>, or leave it out")
    gpu_type = gpu_type or (recipe.hardware.gpu_type if gpus else None)
    return Topology(gpus=gpus, processes=gpus or processes or 1, nodes=nodes, gpu_type=gpu_type)


def present(
    recipe: Recipe,
    gpus: int | None,
    processes: int | None,
    nodes: int | None,
    gpu_type: str | None,
    devices: str | None,
    allocation: Allocation | None = None,
) -> Topology:
    """The hardware to run on, which must be here.

    Args:
        allocation: what Slurm gave, where this process is a task of a job step.

    Raises:
        SetupError: more GPUs than the machine has, no GPU for a recipe that is not made for the CPU, or an allocation
            that is another one than was asked for.
    """
    if allocation is not None and allocation.nodes > 1:
        return _allocated(recipe, gpus, processes, nodes, gpu_type, devices, allocation)
    here = visible_gpus()
    if allocation is not None and gpus != 0 and len(here) < (allocation.gpus_per_node or 0):
        raise _fewer_than_given(allocation, len(here))
    if nodes and nodes > 1:
        raise SetupError(
            f"NODES: {nodes} nodes need a launcher on each, which Slurm starts: "
            f"sbatch --nodes={nodes} slurm/{recipe.name}.sh (slurm/README.md)"
        )
    if devices is not None:
        ids = _device_ids(devices, [gpu.id for gpu in here])
        if gpus is not None and gpus != len(ids):
            raise SetupError(f"DEVICES: {devices} names {len(ids)} GPUs, but GPUS={gpus}; say one of the two")
        gpus = len(ids)
    if gpus is None:
        gpus = 0 if recipe.hardware.gpus == 0 else len(here)
        if gpus == 0 and recipe.hardware.gpus > 0:
            fix = hidden_gpus() or "try `make train` (the tiny recipe), or set GPUS=0 to run it on the CPU"
            raise SetupError(
                f"GPUS: recipe {recipe.name} needs {recipe.hardware.gpus} GPUs and this machine has none; {fix}"
            )
    if gpus > len(here):
        raise SetupError(
            f"GPUS: {gpus} requested, but this machine has {len(here) or 'none'}; "
            f"{hidden_gpus() or f'set GPUS={len(here)}'}"
        )
    ids = devices.split(",") if devices else [gpu.id for gpu in here[:gpus]]
    used = [gpu for gpu in here if gpu.id in ids]
    _check_generation(recipe, used)
    _check_memory(gpu_type, used)
    topology = planned(recipe, gpus, processes, nodes, gpu_type or gpu_type_of(used))
    chosen = devices or (",".join(ids) if 0 < gpus < len(here) else None)
    return Topology(topology.gpus, topology.processes, 1, topology.gpu_type, chosen)


def _fewer_than_given(allocation: Allocation, here: int) -> UserError:
    return UserError(
        f"GPUS: Slurm gave {allocation.gpus_per_node} on {allocation.name}, and nvidia-smi lists {here or 'none'} "
        f"there; leave that node out: sbatch --exclude={allocation.name}"
    )


def _allocated(
    recipe: Recipe,
    gpus: int | None,
    processes: int | None,
    nodes: int | None,
    gpu_type: str | None,
    devices: str | None,
    allocation: Allocation,
) -> Topology:
    """The hardware of several nodes, as Slurm gave it: all of its GPUs, or none.

    Raises:
        SetupError: that is not what was asked for, or this node has it not.
    """
    if devices is not None:
        raise SetupError(f"DEVICES: {devices} names GPUs of one machine; Slurm says which of each node are the job's")
    if nodes is not None and nodes != allocation.nodes:
        raise SetupError(
            f"NODES: {nodes} asked for, and job {allocation.job} has {allocation.nodes}; say the same to both: "
            f"sbatch --nodes={nodes}"
        )
    has = allocation.nodes * (allocation.gpus_per_node or 0)
    if gpus is None:
        gpus = 0 if recipe.hardware.gpus == 0 else has
        if gpus == 0 and recipe.hardware.gpus > 0:
            raise SetupError(
                f"GPUS: recipe {recipe.name} is made for {recipe.hardware.gpus} GPUs and job {allocation.job} has "
                f"none; say --gpus-per-node to sbatch, or GPUS=0 to run it on the CPU all the same"
            )
    if gpus not in (0, has):
        raise SetupError(
            f"GPUS: {gpus} asked for, and job {allocation.job} has {allocation.nodes} nodes x "
            f"{allocation.gpus_per_node or 0}; ask Slurm for those that are used: --gpus-per-node"
        )
    here = visible_gpus() if gpus else []
    if gpus and len(here) < gpus // allocation.nodes:
        raise _fewer_than_given(allocation, len(here))
    _check_generation(recipe, here)
    _check_memory(gpu_type, here)
    if not gpus and processes is None:
        processes = allocation.nodes
    return planned(recipe, gpus, processes, allocation.nodes, gpu_type or gpu_type_of(here))


def _check_generation(recipe: Recipe, gpus: Sequence[Gpu]) -> None:
    """Refuses bf16 and flash attention where a card is older than Ampere and has neither.

    Raises:
        SetupError: with what to use instead.
    """
    old = next((gpu for gpu in gpus if (gpu.compute_capability or _AMPERE) < _AMPERE), None)
    if old is None:
        return
    wrong = {"precision": ("bf16", "fp32"), "model.attention": ("flash_attention_2", "sdpa")}
    asked = {"precision": recipe.precision, "model.attention": recipe.model.attention}
    instead = [f"{key}={good}" for key, (bad, good) in wrong.items() if asked[key] == bad]
    if instead:
        raise SetupError(
            f"GPUS: {old.name} (compute capability {old.compute_capability}) is older than Ampere and has no "
            f"{' and no '.join(asked[said.partition('=')[0]] for said in instead)}; say {' '.join(instead)}"
        )


def _check_memory(gpu_type: str | None, gpus: Sequence[Gpu]) -> None:
    """Reject GPUs of unknown memory unless the user names it.

    Raises:
        SetupError: with the variable to set.
    """
    unknown = next((gpu for gpu in gpus if not gpu.memory_mib), None)
    if gpu_type is None and unknown is not None:
        raise SetupError(f"GPU_TYPE: nvidia-smi reports no memory size for {unknown.name}; set GPU_TYPE=<its GiB>")


def check_host_memory(plan: Plan) -> None:
    """Refuses what this machine's own memory cannot hold, which would end in a killed rank, hours later perhaps.

    Raises:
        SetupError: the plan's host memory is more than the machine has.
    """
    here = host_memory_bytes()
    needed, per_rank = plan.host_bytes_per_node, plan.memory_bytes_per_gpu
    ranks_here = plan.world_size // plan.nodes
    if per_rank and not plan.uses_gpu and per_rank["total"] * ranks_here > here:
        raise SetupError(
            f"GPUS: on the CPU {plan.recipe} needs about {per_rank['total'] * ranks_here / 2**30:.0f} GiB of "
            f"memory and this machine has {here / 2**30:.0f} GiB; say GPUS=<a number> where there are GPUs"
        )
    if needed and needed["offload"] and needed["total"] > here:
        raise SetupError(
            f"parallelism: {plan.parallelism} needs about {needed['total'] / 2**30:.0f} GiB of this node's own memory "
            f"({needed['offload'] / 2**30:.0f} GiB of it for what is offloaded) and it has {here / 2**30:.0f} GiB; "
            f"say parallelism=zero3 with more GPUs, or train adapters (a recipe with lora)"
        )


def check_disk(plan: Plan, folder: RunDir) -> None:
    """Refuses a run whose folder will outgrow its disk, hours later perhaps.

    Raises:
        SetupError: what is free and what the run holds already are less than what it will hold.
    """
    there = next(place for place in (folder.path, *folder.path.absolute().parents) if place.exists())
    held = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    free = shutil.disk_usage(there).free
    if plan.disk_bytes and plan.disk_bytes > free + held:
        raise SetupError(
            f"RUNS_DIR: {plan.recipe} will hold up to {plan.disk_bytes / 2**30:.1f} GiB in {folder.path} (two whole "
            f"checkpoints, one being written, the models) and {free / 2**30:.1f} GiB are free; make room, or say "
            f"RUNS_DIR=<a folder on a larger disk>"
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
        raise SetupError(f"DEVICES: {devices!r} is not a list of GPU ids, such as 0,2")
    missing = [device for device in ids if device not in here]
    if missing:
        raise SetupError(f"DEVICES: no GPU {', '.join(missing)} here; there are: {', '.join(here) or 'none'}")
    return ids
