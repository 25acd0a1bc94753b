"""Writes the command line, the environment and the engine's file that start a plan's ranks."""

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

_PORTS_TRIED = 100


def prepare(plan: Path) -> list[str]:
    """The process that prepares a node's data, before any rank starts."""
    return [sys.executable, "-m", "sft_recipes.data.prepare", str(plan)]


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a start meet: node 0's address, a port of it, and which node this one is."""

    address: str
    port: int
    node: int


def launch(plan: Plan, folder: RunDir, program: str = "training.main", meeting: Rendezvous | None = None) -> list[str]:
    """The command that starts every rank of this node; `write_engine` must have written its configuration.

    Args:
        program: what each rank carries out, a module of `sft_recipes`.
        meeting: where the ranks of several nodes meet; those of one meet on its loopback.

    Source: accelerate's `commands/launch.py`.
    """
    command = [sys.executable, "-m", "sft_recipes.training.rank_launcher"]
    command += ["--config_file", str(folder.accelerate_config)]
    if plan.strategy.several_processes:  # with one rank too: torchrun's default port is the same for every run
        at = meeting or Rendezvous("127.0.0.1", free_port("127.0.0.1"), 0)
        command += ["--main_process_ip", at.address, "--main_process_port", str(at.port)]
        command += ["--machine_rank", str(at.node)]
    return [*command, "-m", f"sft_recipes.{program}", str(folder.plan)]


def links(ranks_here: int, nodes: int, meeting: Rendezvous, result: Path) -> list[str]:
    """The command by which this node's ranks take part in a sum over those of all nodes, which rank 0 writes down."""
    run = ["torch.distributed.run", "--nnodes", str(nodes), "--node_rank", str(meeting.node)]
    run += ["--master_addr", meeting.address, "--master_port", str(meeting.port)]
    run += ["--nproc_per_node", str(ranks_here), "-m", "sft_recipes.tools.allreduce_bench", str(result)]
    return [sys.executable, "-m", *run]


def tensorboard(port: int) -> list[str]:
    """TensorBoard over all runs, on loopback: their figures are this machine's users' alone."""
    module = "tensorboard.main"
    return [sys.executable, "-m", module, "--logdir", str(runs_root()), "--host", "127.0.0.1", "--port", str(port)]


def engine(plan: Plan) -> dict[str, Any]:
    """The accelerate configuration of this plan: the engine's file with this run's processes filled in.

    Raises:
        SetupError: the engine's file is missing or disagrees with its DeepSpeed file.
    """
    source = REPOSITORY / "accelerate_configs" / f"{engine_file(plan)}.yaml"
    if not source.is_file():
        raise SetupError(f"parallelism: {plan.parallelism} needs accelerate_configs/{source.name}, which is not there")
    config = yaml.safe_load(source.read_text(encoding="utf-8"))
    if "deepspeed_config" in config:
        config["deepspeed_config"]["deepspeed_config_file"] = str(_deepspeed_file(plan, config))
        if not plan.uses_gpu:
            config["use_cpu"] = True  # with ACCELERATE_USE_CPU instead, a DeepSpeed file silently becomes DDP
    config.update(num_machines=plan.nodes, num_processes=plan.world_size)
    return dict(config)


def engine_file(plan: Plan) -> str:
    """The name of the plan's file in accelerate_configs/."""
    return "cpu" if not plan.uses_gpu and plan.strategy.ddp else plan.parallelism


def _deepspeed_file(plan: Plan, config: Mapping[str, Any]) -> Path:
    """The DeepSpeed file that an engine's file names, if it is of the same stage."""
    name = config["deepspeed_config"]["deepspeed_config_file"]
    file = REPOSITORY / str(name)
    try:
        zero = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]
        stage, offloads = int(zero["stage"]), "offload_optimizer" in zero
    except FileNotFoundError as error:
        raise SetupError(f"parallelism: {plan.parallelism} needs {name}, which is not there") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{name}: not a DeepSpeed configuration with zero_optimization.stage ({error})") from error
    if (stage, offloads) != (plan.strategy.zero_stage, plan.strategy.cpu_offload):
        raise SetupError(
            f"{name}: says stage {stage}{' with offload' if offloads else ''}, but the plan has parallelism "
            f"{plan.parallelism}; correct the file, or set parallelism={_name_of(stage, offloads)}"
        )
    return file


def _name_of(stage: int, offloads: bool) -> str:
    try:
        return strategies.running(zero_stage=stage, cpu_offload=offloads).name
    except LookupError:
        return "another"


def write_engine(plan: Plan, folder: RunDir) -> None:
    """Writes the engine's configuration into the run's folder."""
    folder.accelerate_config.write_text(yaml.safe_dump(engine(plan), sort_keys=False), encoding="utf-8")


def environment(plan: Plan, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables that the ranks see, over those that were there."""
    chosen = dict(inherited)
    # Programs of the virtual environment, which need not be activated: torch looks for ninja on PATH.
    chosen["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), inherited.get("PATH")]))
    chosen["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), inherited.get("PYTHONPATH")]))
    chosen.setdefault("PYTHONSAFEPATH", "1")  # a torch.py in the folder that a run is started in is no library
    # Compiled code is kept as pickles, by default in /tmp/torchinductor_USER, which anybody can make before USER does.
    chosen.setdefault("TORCHINDUCTOR_CACHE_DIR", str(runs_root().absolute() / ".prepared" / "compiled"))
    chosen.setdefault("TOKENIZERS_PARALLELISM", "true" if plan.world_size == 1 else "false")
    # Signals that ask for a stop are passed on by training/rank_launcher.py, which ends nobody. torch's agent would end its
    # ranks, and kill them 30 seconds later: left to it are those of a closed terminal, and the time that a save needs.
    chosen.setdefault("PET_SHUTDOWN_TIMEOUT", str(grace_seconds(plan)))
    chosen["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    if sys.platform.startswith("linux") and plan.nodes == 1:
        chosen.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine needs no other interface, nor its own name
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
    """A port that nobody listens on: `first` or the next one that is free, any where it is 0."""
    for port in range(first, first + _PORTS_TRIED):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a start just before, which has ended
            probe.bind((address, port))
            return int(probe.getsockname()[1])
    raise SetupError(f"MASTER_PORT: ports {first} to {first + _PORTS_TRIED - 1} are all in use here; name another one")
