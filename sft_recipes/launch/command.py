"""Command lines, environment variables and accelerate configuration that start a plan's ranks."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from sft_recipes.launch.placement import Placement
from sft_recipes.planner.plan import Plan
from sft_recipes.planner.save_time import grace_seconds
from sft_recipes.runtime import env
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import RunDir, read_json, runs_root, write_json

# Variables of a launcher around this one: accelerate and torchrun would read options in them, and a rank its place.
_OF_ANOTHER_LAUNCHER = re.compile(
    r"PET_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NNODES|NODE_RANK|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


def launch(
    plan: Plan, run_dir: RunDir, program: str = "training.main", placement: Placement | None = None
) -> list[str]:
    """Command that starts every rank of this node; `write_accelerate_config` must have written its configuration.

    Args:
        program: main program of each rank, a module of `sft_recipes`.
        placement: of this node among several, where the ranks meet at the next port of node 0; ranks of one node use
            loopback.

    Source: accelerate's `commands/launch.py`.
    """
    command = [sys.executable, "-m", "sft_recipes.training.rank_launcher"]
    command += ["--config_file", str(run_dir.accelerate_config)]
    if plan.strategy.several_processes:  # with one rank too: torchrun's default port is the same for every run
        address, port, node = "127.0.0.1", free_port(), 0
        if placement:
            address, port, node = placement.address, placement.next_port(), placement.rank
        command += ["--main_process_ip", address, "--main_process_port", str(port), "--machine_rank", str(node)]
    return [*command, "-m", f"sft_recipes.{program}", str(run_dir.plan)]


def allreduce_test(ranks: int, result: Path) -> list[str]:
    """Command that starts the all-reduce test on this machine; rank 0 writes `result`."""
    # Not torchrun's --standalone: its rendezvous uses this machine's host name, which need not resolve.
    run = ["torch.distributed.run", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    run += ["--nproc_per_node", str(ranks), "-m", "sft_recipes.tools.allreduce_bench", str(result)]
    return [sys.executable, "-m", *run]


def accelerate_config_name(plan: Plan) -> str:
    """Name of the plan's file in accelerate_configs/."""
    return "cpu" if not plan.uses_gpu and plan.strategy.ddp else plan.parallelism


def write_accelerate_config(plan: Plan, run_dir: RunDir) -> None:
    """Write the accelerate configuration of the plan's processes to the run directory: the file of the parallelism
    strategy; with DeepSpeed's, which gets the plan's sizes."""
    source = REPOSITORY / "accelerate_configs" / f"{accelerate_config_name(plan)}.yaml"
    config = yaml.safe_load(source.read_text(encoding="utf-8"))
    if deepspeed := config.get("deepspeed_config"):
        values = read_json(REPOSITORY / deepspeed["deepspeed_config_file"])
        values["zero_optimization"] |= plan.zero3_sizes
        write_json(run_dir.deepspeed_config, values)
        deepspeed["deepspeed_config_file"] = str(run_dir.deepspeed_config)
        if not plan.uses_gpu:
            config["use_cpu"] = True  # with ACCELERATE_USE_CPU instead, a DeepSpeed file silently becomes DDP
    config.update(num_machines=plan.nodes, num_processes=plan.world_size)
    run_dir.accelerate_config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def environment(plan: Plan, inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the ranks: the inherited ones and those that the plan needs."""
    kept = {name: value for name, value in inherited.items() if not _OF_ANOTHER_LAUNCHER.fullmatch(name)}
    chosen = env.with_repository(kept)
    # Programs of the virtual environment, which may not be activated: torch searches ninja on PATH.
    chosen["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), inherited.get("PATH")]))
    chosen.setdefault("PYTHONSAFEPATH", "1")  # a torch.py in the current folder is not the library
    # Compiled code is cached as pickles, by default in /tmp/torchinductor_USER, which any user can create first.
    chosen.setdefault("TORCHINDUCTOR_CACHE_DIR", str(runs_root().absolute() / ".prepared" / "compiled"))
    chosen.setdefault("TOKENIZERS_PARALLELISM", "true" if plan.world_size == 1 else "false")
    # training/rank_launcher.py forwards stop signals. torch's agent would terminate its ranks, and kill them 30 seconds
    # later: it only handles those of a closed terminal, with the time that a save needs.
    chosen["PET_SHUTDOWN_TIMEOUT"] = str(grace_seconds(plan))
    chosen["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    if plan.nodes == 1:
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


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
