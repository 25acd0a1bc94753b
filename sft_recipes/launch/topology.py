"""Determine the processes of a run from the request, the recipe, and the hardware of this machine or job."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sft_recipes.config.gpu_types import identify
from sft_recipes.config.schema import Recipe
from sft_recipes.launch.placement import Placement
from sft_recipes.planner.plan import Plan, Topology
from sft_recipes.planner.suggest import nodes_for
from sft_recipes.runtime import cuda
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.units import GIB

_AMPERE = 8.0


@dataclass(frozen=True)
class HardwareRequest:
    """The hardware options of a command; None where an option is not given."""

    gpus: int | None = None
    processes: int | None = None
    nodes: int | None = None
    gpu_type: str | None = None


def plan_topology(recipe: Recipe, request: HardwareRequest | None = None) -> Topology:
    """Return the hardware to plan for: the requested one, otherwise the recipe's. Checks no machine."""
    request = request or HardwareRequest()
    gpus = recipe.hardware.gpus if request.gpus is None else request.gpus
    nodes, processes = request.nodes, request.processes
    if nodes is None:
        nodes = recipe.hardware.nodes if gpus == recipe.hardware.gpus else nodes_for(gpus)
    variable, ranks = ("GPUS", gpus) if gpus else ("PROCESSES", processes or 1)
    if ranks % nodes:
        raise SetupError(f"{variable}: found {ranks} on {nodes} nodes, expected a multiple of {nodes}")
    if processes and gpus:
        raise SetupError(f"PROCESSES: found {processes} with {gpus} GPUs, expected none. Remove PROCESSES")
    if request.gpu_type and not gpus:
        raise SetupError(f"GPU_TYPE: found {request.gpu_type} without GPUs. Set GPUS=<number>, or remove GPU_TYPE")
    gpu_type = request.gpu_type or (recipe.hardware.gpu_type if gpus else None)
    return Topology(gpus=gpus, processes=gpus or processes or 1, nodes=nodes, gpu_type=gpu_type)


def available_topology(recipe: Recipe, request: HardwareRequest, placement: Placement | None = None) -> Topology:
    """Return the hardware to run on, which must be available here; on several nodes it is the same on each.

    Args:
        placement: this node's place in a job; None outside of one.

    Raises:
        SetupError: the machine or job has other hardware than requested, or no GPU for a recipe that needs one.
    """
    available, gpus, nodes = visible_gpus(), request.gpus, placement.nodes if placement else request.nodes or 1
    if request.nodes is not None and request.nodes != nodes:
        raise SetupError(f"NODES: found {request.nodes}, expected {nodes} as in this job. Use sbatch --nodes")
    if placement is None and nodes > 1 and gpus and not available:
        return plan_topology(recipe, request)  # prepared on a machine without GPUs; `train` checks each node
    allocated = placement.gpus_per_node if placement else None
    existing = nodes * (len(available) if allocated is None else allocated)
    if gpus is None:
        gpus = (existing or recipe.hardware.gpus) if recipe.hardware.gpus else 0
    if gpus > existing or (nodes > 1 and gpus not in (0, existing)):
        where, fix = "this job", "use sbatch --gpus-per-node, or set GPUS=0 to run it on the CPU"
        if allocated is None and nodes == 1:
            where, fix = "this machine", hidden_gpus() or f"set GPUS={existing}, or try `make train` (the tiny recipe)"
        raise SetupError(f"GPUS: {gpus} requested, but {where} has {existing or 'none'}; {fix}")
    if placement and gpus and len(available) < (allocated or 0):
        found = f"Slurm allocated {allocated} on {placement.name}, nvidia-smi lists {len(available) or 'none'}"
        raise SetupError(f"GPUS: {found}. Exclude that node: sbatch --exclude={placement.name}")
    selected = available[: gpus // nodes]
    _check_generation(recipe, selected)
    if not request.gpu_type and (unknown := [gpu.name for gpu in selected if not gpu.memory_mib]):
        raise SetupError(f"GPU_TYPE: nvidia-smi reports no memory size for {unknown[0]}; set GPU_TYPE=<its GiB>")
    processes = nodes if not gpus and nodes > 1 and request.processes is None else request.processes
    gpu_type = request.gpu_type or gpu_type_of(selected)
    topology = plan_topology(recipe, HardwareRequest(gpus, processes, nodes if nodes > 1 else None, gpu_type))
    mask = ",".join(gpu.id for gpu in selected) if nodes == 1 and 0 < gpus < len(available) else None
    return Topology(topology.gpus, topology.processes, nodes, topology.gpu_type, mask)


def _check_generation(recipe: Recipe, gpus: Sequence[Gpu]) -> None:
    """Reject bf16 and flash attention on GPUs older than Ampere, which support neither.

    Raises:
        SetupError: with the settings to use instead.
    """
    old = next((gpu for gpu in gpus if (gpu.compute_capability or _AMPERE) < _AMPERE), None)
    fixes = {"bf16": "precision=fp32", "flash_attention_2": "model.attention=sdpa"}
    unsupported = {value: fixes[value] for value in (recipe.precision, recipe.model.attention) if value in fixes}
    if old and unsupported:
        reason = f"{old.name} (compute capability {old.compute_capability}) is older than Ampere"
        missing, fix = " and no ".join(unsupported), " ".join(unsupported.values())
        raise SetupError(f"GPUS: {reason} and has no {missing}. Set {fix}")


def check_host_memory(plan: Plan) -> None:
    """Reject a plan that exceeds the host memory of this node; a rank would be killed, possibly hours later.

    Raises:
        SetupError: the plan needs more host memory than the node has.
    """
    available, needed = host_memory_bytes(), 0
    if plan.uses_gpu and plan.host_bytes_per_node and plan.host_bytes_per_node["offload"]:
        where, needed = f"parallelism: {plan.parallelism}", plan.host_bytes_per_node["total"]
        fix = "Set parallelism=zero3 with more GPUs, or use a recipe with LoRA"
    elif not plan.uses_gpu and plan.memory_bytes_per_gpu:
        where = f"GPUS: on the CPU {plan.recipe}"
        needed = plan.memory_bytes_per_gpu["total"] * (plan.world_size // plan.nodes)
        fix = "Set GPUS=<number> on a machine with GPUs"
    if needed > available:
        found = f"needs about {needed / GIB:.0f} GiB of host memory, found {available / GIB:.0f} GiB"
        raise SetupError(f"{where} {found}. {fix}")


def check_disk(plan: Plan, folder: RunDir) -> None:
    """Reject a run whose folder would outgrow its disk, possibly hours later.

    Raises:
        SetupError: free space plus the folder's present size is less than the run needs.
    """
    existing = next(place for place in (folder.path, *folder.path.absolute().parents) if place.exists())
    held = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    free = shutil.disk_usage(existing).free
    if plan.disk_bytes and plan.disk_bytes > free + held:
        found = f"needs up to {plan.disk_bytes / GIB:.1f} GiB in {folder.path}, found {free / GIB:.1f} GiB free"
        raise SetupError(f"RUNS_DIR: {plan.recipe} {found}. Set RUNS_DIR=<folder on a larger disk>")


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
    listed = [row for row in ask_nvidia("index,memory.total,name") if len(row) > 2 and row[0].isdigit()]
    capabilities = {row[0]: _number(row[1]) or None for row in ask_nvidia("index,compute_cap") if len(row) == 2}
    gpus = {row[0]: Gpu(row[0], _number(row[1]), ", ".join(row[2:]), capabilities.get(row[0])) for row in listed}
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
    masked, here, listed = os.environ.get("CUDA_VISIBLE_DEVICES"), len(visible_gpus()), len(ask_nvidia("index"))
    if masked is None or here == listed:
        return ""
    return f"CUDA_VISIBLE_DEVICES={masked!r} leaves {here} of the {listed} of nvidia-smi; unset it, or name more"


def nvidia_smi_error() -> str:
    """What nvidia-smi prints where it fails, for example after an update of the driver; empty if it is missing."""
    code, output = cuda.nvidia_smi("--list-gpus")
    return " ".join(output.split())[:200] if code else ""


def ask_nvidia(fields: str) -> list[list[str]]:
    """A row of fields a GPU; none where the driver does not answer, or does not know a field."""
    code, output = cuda.nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return [] if code else [[part.strip() for part in line.split(",")] for line in output.splitlines()]


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def gpu_type_of(gpus: Sequence[Gpu]) -> str | None:
    """What a plan takes for these GPUs: the type of the one with the least memory, or its GiB if it is not in the
    table of GPU types."""
    if not gpus:
        return None
    smallest = min(gpus, key=lambda gpu: gpu.memory_mib)
    known = identify(smallest.name, smallest.memory_mib)
    return known.name if known else f"{smallest.memory_mib / 1024:.1f}"
