"""Command lines, environment variables and accelerate configuration that start a plan's ranks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.config import strategies
from sft_recipes.planner.plan import Plan
from sft_recipes.planner.save_time import grace_seconds
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import RunDir, runs_root

_MAX_PORTS = 100


def prepare(plan_file: Path) -> list[str]:
    """Command that prepares the data, before any rank starts."""
    return [sys.executable, "-m", "sft_recipes.data.prepare", str(plan_file)]


@dataclass(frozen=True)
class Rendezvous:
    """Rendezvous of the ranks: address and port on node 0, and the index of this node."""

    address: str
    port: int
    node: int


def launch(
    plan: Plan, run_dir: RunDir, program: str = "training.main", rendezvous: Rendezvous | None = None
) -> list[str]:
    """Command that starts every rank of this node; `write_accelerate_config` must have written its configuration.

    Args:
        program: main program of each rank, a module of `sft_recipes`.
        rendezvous: of ranks on several nodes; those of one node use loopback.

    Source: accelerate's `commands/launch.py`.
    """
    command = [sys.executable, "-m", "sft_recipes.training.rank_launcher"]
    command += ["--config_file", str(run_dir.accelerate_config)]
    if plan.strategy.several_processes:  # with one rank too: torchrun's default port is the same for every run
        at = rendezvous or Rendezvous("127.0.0.1", free_port("127.0.0.1"), 0)
        command += ["--main_process_ip", at.address, "--main_process_port", str(at.port)]
        command += ["--machine_rank", str(at.node)]
    return [*command, "-m", f"sft_recipes.{program}", str(run_dir.plan)]


def allreduce_test(ranks_per_node: int, nodes: int, rendezvous: Rendezvous, result: Path) -> list[str]:
    """Command that starts this node's ranks of the all-reduce test; rank 0 writes `result`."""
    run = ["torch.distributed.run", "--nnodes", str(nodes), "--node_rank", str(rendezvous.node)]
    run += ["--master_addr", rendezvous.address, "--master_port", str(rendezvous.port)]
    run += ["--nproc_per_node", str(ranks_per_node), "-m", "sft_recipes.tools.allreduce_bench", str(result)]
    return [sys.executable, "-m", *run]


def tensorboard(port: int) -> list[str]:
    """Command that serves TensorBoard for all runs, on loopback only."""
    module = "tensorboard.main"
    return [sys.executable, "-m", module, "--logdir", str(runs_root()), "--host", "127.0.0.1", "--port", str(port)]


def accelerate_config(plan: Plan) -> dict[str, Any]:
    """Build the accelerate configuration: the file of the parallelism strategy with this plan's processes filled in.

    Raises:
        SetupError: the file is missing or disagrees with its DeepSpeed file.
    """
    source = REPOSITORY / "accelerate_configs" / f"{accelerate_config_name(plan)}.yaml"
    if not source.is_file():
        raise SetupError(f"parallelism: {plan.parallelism} needs accelerate_configs/{source.name}: not found")
    config = yaml.safe_load(source.read_text(encoding="utf-8"))
    if "deepspeed_config" in config:
        config["deepspeed_config"]["deepspeed_config_file"] = str(_deepspeed_file(plan, config))
        if not plan.uses_gpu:
            config["use_cpu"] = True  # with ACCELERATE_USE_CPU instead, a DeepSpeed file silently becomes DDP
    config.update(num_machines=plan.nodes, num_processes=plan.world_size)
    return dict(config)


def accelerate_config_name(plan: Plan) -> str:
    """Name of the plan's file in accelerate_configs/."""
    return "cpu" if not plan.uses_gpu and plan.strategy.ddp else plan.parallelism


def _deepspeed_file(plan: Plan, config: Mapping[str, Any]) -> Path:
    """Path of the DeepSpeed file that an accelerate configuration names, if it has the plan's ZeRO stage."""
    name = config["deepspeed_config"]["deepspeed_config_file"]
    file = REPOSITORY / str(name)
    try:
        zero = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]
        stage, offloads = int(zero["stage"]), "offload_optimizer" in zero
    except FileNotFoundError as error:
        raise SetupError(f"parallelism: {plan.parallelism} needs {name}: not found") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{name}: not a DeepSpeed configuration with zero_optimization.stage ({error})") from error
    if (stage, offloads) != (plan.strategy.zero_stage, plan.strategy.cpu_offload):
        raise SetupError(
            f"{name}: found stage {stage}{' with offload' if offloads else ''}, expected that of parallelism "
            f"{plan.parallelism}. Correct the file, or set parallelism={_strategy_name(stage, offloads)}"
        )
    return file


def _strategy_name(stage: int, offloads: bool) -> str:
    try:
        return strategies.running(zero_stage=stage, cpu_offload=offloads).name
    except LookupError:
        return "another"


def write_accelerate_config(plan: Plan, run_dir: RunDir) -> None:
    """Write the accelerate configuration to the run directory."""
    content = yaml.safe_dump(accelerate_config(plan), sort_keys=False)
    run_dir.accelerate_config.write_text(content, encoding="utf-8")


def environment(plan: Plan, inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the ranks: the inherited ones and those that the plan needs."""
    chosen = dict(inherited)
    # Programs of the virtual environment, which may not be activated: torch searches ninja on PATH.
    chosen["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), inherited.get("PATH")]))
    chosen["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), inherited.get("PYTHONPATH")]))
    chosen.setdefault("PYTHONSAFEPATH", "1")  # a torch.py in the current folder is not the library
    # Compiled code is cached as pickles, by default in /tmp/torchinductor_USER, which any user can create first.
    chosen.setdefault("TORCHINDUCTOR_CACHE_DIR", str(runs_root().absolute() / ".prepared" / "compiled"))
    chosen.setdefault("TOKENIZERS_PARALLELISM", "true" if plan.world_size == 1 else "false")
    # training/rank_launcher.py forwards stop signals. torch's agent would terminate its ranks, and kill them 30 seconds
    # later: it only handles those of a closed terminal, with the time that a save needs.
    chosen.setdefault("PET_SHUTDOWN_TIMEOUT", str(grace_seconds(plan)))
    chosen["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    if sys.platform.startswith("linux") and plan.nodes == 1:
        chosen.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine needs no other interface, nor its host name
        chosen.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if plan.uses_gpu and "PYTORCH_CUDA_ALLOC_CONF" not in inherited:
        # Without it the allocator may hold half as much again as it uses: planner/memory.py, FRAGMENTATION.
        chosen.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if plan.devices:
        chosen["CUDA_VISIBLE_DEVICES"] = plan.devices
    if not plan.uses_gpu:
        chosen["CUDA_VISIBLE_DEVICES"] = ""
        chosen["DS_ACCELERATOR"] = "cpu"
        if not plan.strategy.deepspeed:
            chosen["ACCELERATE_USE_CPU"] = "true"
    # On GPUs too: accelerate and torchrun would set 1, and DeepSpeed's Adam for offloaded optimizers runs on the CPU.
    threads = max(len(os.sched_getaffinity(0)) // (plan.world_size // plan.nodes), 1)
    chosen.setdefault("OMP_NUM_THREADS", str(threads))
    return chosen


def free_port(address: str, first: int = 0) -> int:
    """Return a free port: `first` or the next free one, or any if `first` is 0.

    Raises:
        SetupError: 100 ports are in use.
    """
    for port in range(first, first + _MAX_PORTS):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of an attempt that has just ended
            probe.bind((address, port))
            return int(probe.getsockname()[1])
    raise SetupError(f"MASTER_PORT: ports {first} to {first + _MAX_PORTS - 1} are in use on this host. Set another one")
