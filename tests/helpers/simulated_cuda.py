"""Print as JSON, for plans on GPUs and with CUDA simulated: the launches by accelerate and torchrun, SFTConfig, and the
configuration that DeepSpeed resolves.

A separate program, because the simulation replaces functions of torch.cuda for the entire process.

    python tests/helpers/simulated_cuda.py FOLDER
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from sft_recipes.config import loader
from sft_recipes.launch import command
from sft_recipes.launch.placement import Placement
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan, Topology
from sft_recipes.runtime.run_dir import RunDir

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
LEADER_ADDRESS = "10.0.0.1"
PORT = 15001


@dataclasses.dataclass(frozen=True)
class Case:
    """A plan on GPUs, and the node whose launch is simulated."""

    recipe: str
    overrides: tuple[str, ...]
    gpus: int
    nodes: int
    node: int = 0
    devices: str | None = None

    @property
    def name(self) -> str:
        return " ".join(
            [self.recipe, *self.overrides, f"{self.gpus}x{self.nodes}", f"node{self.node}", self.devices or ""]
        )

    def plan(self) -> Plan:
        recipe = loader.load(self.recipe, self.overrides)
        gpu_type = recipe.hardware.gpu_type or "h100-80g"
        return plans.resolve(recipe, Topology(self.gpus, self.gpus, self.nodes, gpu_type, self.devices))


def cases() -> list[Case]:
    """Every recipe on its own hardware, and every strategy on one GPU, on one node and on two."""
    golden = Path(__file__).parent / "golden"  # of shipped recipes; recipes/ may also have a user's own
    hardware = {name: loader.load(name).hardware for name in loader.names() if (golden / f"{name}.json").is_file()}
    own = [Case(name, (), planned.gpus, planned.nodes) for name, planned in hardware.items() if planned.gpus]
    strategies = [
        Case("8b", (f"parallelism={name}",), *size) for name in STRATEGIES for size in ((8, 1), (16, 2, 0), (16, 2, 1))
    ]
    one_gpu = [Case("1b", (f"parallelism={name}",), 1, 1) for name in ("single", "zero2", "fsdp2")]
    return [*own, *strategies, *one_gpu, Case("1b", (), 1, 1, devices="2"), Case("1b", (), 2, 1, devices="0,2")]


def simulate() -> None:
    """Replace functions of torch.cuda by the results of a machine with H100s."""
    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30)
    results = {
        "is_available": True, "device_count": 1, "is_bf16_supported": True, "set_device": None, "current_device": 0,
        "get_device_capability": (9, 0), "get_device_name": properties.name, "get_device_properties": properties,
    }  # fmt: skip
    for name, result in results.items():
        setattr(torch.cuda, name, lambda *_, result=result, **__: result)


def launch(plan: Plan, folder: RunDir, node: int) -> dict[str, Any]:
    """Return what accelerate's launcher passes to torchrun, or to the one process that it starts."""
    import accelerate.commands.launch as program
    from torch.distributed import run as torchrun

    from sft_recipes.training import rank_launcher

    caught: dict[str, Any] = {}

    def catch_torchrun(parsed: Any) -> None:
        config, _, arguments = torchrun.config_from_args(parsed)
        caught.update(
            nodes=[config.min_nodes, config.max_nodes],
            ranks_per_node=config.nproc_per_node,
            node=config.rdzv_configs["rank"],
            rendezvous=[config.rdzv_backend, config.rdzv_endpoint],
            restarts=config.max_restarts,
            shutdown_timeout=config.shutdown_timeout,
            arguments=arguments,
            environment=dict(os.environ),
        )

    def catch_process(arguments: list[str], env: dict[str, str], check: bool) -> Any:
        caught.update(arguments=arguments[1:], environment=env)
        return types.SimpleNamespace(returncode=0)

    command.write_accelerate_config(plan, folder)
    meeting = Placement(plan.nodes, node, "", "", None, LEADER_ADDRESS, PORT) if plan.nodes > 1 else None
    command_line = command.launch(plan, folder, "training.main", meeting)
    before, torchrun.run = torchrun.run, catch_torchrun
    rank_launcher.subprocess = types.SimpleNamespace(run=catch_process)  # type: ignore[attr-defined]
    with _environment(command.environment(plan, os.environ)):
        sys.argv = ["accelerate-launch", *command_line[command_line.index("sft_recipes.training.rank_launcher") + 1 :]]
        (program.main if plan.strategy.several_processes else rank_launcher._run_one_process)()
    torchrun.run = before
    return caught


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Any:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def arguments(config: Any) -> dict[str, Any]:
    """Return the arguments that affect computation on a GPU."""
    names = (
        "bf16", "fp16", "use_cpu", "n_gpu", "tf32", "optim", "mixed_precision", "dataloader_pin_memory",
        "gradient_checkpointing", "activation_checkpointing", "activation_checkpointing_kwargs", "torch_compile",
        "per_device_train_batch_size", "gradient_accumulation_steps", "ddp_find_unused_parameters", "max_grad_norm",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    return {**values, "optim": str(config.optim.value), "device": str(config.device)}


def deepspeed(plan: Plan, config: Any, file: str) -> dict[str, Any]:
    """Return DeepSpeed's configuration after transformers has filled in the file of the launch."""
    import deepspeed.comm as dist
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    class OfAllRanks:
        world_size = plan.world_size

        def __getattr__(self, name: str) -> Any:
            return getattr(config, name)

    filled = HfTrainerDeepSpeedConfig(file)
    filled.trainer_config_process(OfAllRanks(), auto_find_batch_size=False)
    text = types.SimpleNamespace(hidden_size=plan.sections.model.architecture["hidden_size"])
    filled.trainer_config_finalize(OfAllRanks(), types.SimpleNamespace(config=text), plan.optimizer_steps or 100)
    dist.get_world_size, dist.get_rank = lambda *_: plan.world_size, lambda *_: 0
    resolved = DeepSpeedConfig(filled.config)
    zero = resolved.zero_config
    return {
        "train_batch": resolved.train_batch_size,
        "micro_batch": resolved.train_micro_batch_size_per_gpu,
        "accumulation": resolved.gradient_accumulation_steps,
        "bf16": resolved.bfloat16_config.enabled,
        "fp16": resolved.float16_config.enabled,
        "clipping": resolved.gradient_clipping,
        "accumulation_dtype": resolved.grad_accum_dtype,
        "communication_dtype": str(resolved.communication_data_type),
        "stage": int(zero.stage),
        "overlaps": zero.overlap_comm,
        "reduce_bucket": int(zero.reduce_bucket_size),
        "gather_bucket": int(zero.allgather_bucket_size),
        "prefetch_bucket": int(zero.prefetch_bucket_size),
        "persistence_threshold": int(zero.param_persistence_threshold),
        "offload_pinned": zero.offload_optimizer.pin_memory if zero.offload_optimizer else None,
        "gathers_on_save": zero.gather_16bit_weights_on_model_save,
    }


def main(place: Path) -> dict[str, Any]:
    os.environ["DS_ACCELERATOR"] = "cuda"
    from sft_recipes.training import sft_config, trainer  # noqa: F401  bitsandbytes does not load with simulated CUDA

    simulate()
    results: dict[str, Any] = {}
    for number, case in enumerate(cases()):
        plan, folder = case.plan(), RunDir(place / str(number))
        folder.path.mkdir()
        launched = launch(plan, folder, case.node)
        config = sft_config.make_sft_config(plan, folder)
        results[case.name] = {"launch": launched, "arguments": arguments(config)}
        if plan.parallelism.startswith("zero"):
            file = launched["environment"]["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
            results[case.name]["deepspeed"] = deepspeed(plan, config, file)
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
