"""The parallelism strategies: what each shards, how it is started, and what it supports.

The only module that knows a strategy's name; everything else asks for its properties.
docs/design/extending.md shows how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Strategy:
    """One value of a recipe's `parallelism`.

    Attributes:
        name: as recipes write it; `accelerate_configs/NAME.yaml` starts it, and `deepspeed_configs/NAME.json` if it is
            DeepSpeed's.
        zero_stage: the ZeRO stage if DeepSpeed runs it, else 0.
        fsdp: whether torch's `fully_shard` (FSDP2) runs it.
        ddp: whether torch's DistributedDataParallel runs it.
        cpu_offload: whether fp32 weights, moments and gradients are kept in host memory.
    """

    name: str
    zero_stage: int = 0
    fsdp: bool = False
    ddp: bool = False
    cpu_offload: bool = False

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed runs it: bf16 weights with an fp32 master copy, one state file per rank."""
        return self.zero_stage > 0

    @property
    def shards_optimizer(self) -> bool:
        """Whether each rank holds only its part of the optimizer state."""
        return self.zero_stage >= 1 or self.fsdp

    @property
    def shards_gradients(self) -> bool:
        """Whether each rank holds only its part of the gradients."""
        return self.zero_stage >= 2 or self.fsdp

    @property
    def shards_parameters(self) -> bool:
        """Whether each rank holds only its part of the weights, so that no rank holds the complete model."""
        return self.zero_stage >= 3 or self.fsdp

    @property
    def exports_master_weights(self) -> bool:
        """Whether DeepSpeed's `zero_to_fp32` reads the fp32 master weights in its checkpoints: not those of ZeRO-1 in
        bf16."""
        return self.zero_stage >= 2

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the complete weights, gradients and optimizer state."""
        return not self.shards_optimizer

    @property
    def copies_per_node(self) -> bool:
        """Whether each node can hold a copy of the weights too (DeepSpeed's hierarchical partitioning)."""
        return self.zero_stage == 3 and not self.cpu_offload

    @property
    def several_processes(self) -> bool:
        """Whether it can run more than one process."""
        return self.ddp or self.shards_optimizer

    def reads_checkpoints_of(self, other: Strategy) -> bool:
        """Whether it can load the optimizer state that `other` saved; replicated ones save the same files."""
        return self == other or (self.replicated and other.replicated)


_ALL = (
    Strategy("single"),
    Strategy("ddp", ddp=True),
    Strategy("zero1", zero_stage=1),
    Strategy("zero2", zero_stage=2),
    Strategy("zero3", zero_stage=3),
    Strategy("zero3_offload", zero_stage=3, cpu_offload=True),
    Strategy("fsdp2", fsdp=True),
)
STRATEGIES = {strategy.name: strategy for strategy in _ALL}

# Strategies that suggestions name by role.
ONE_PROCESS = STRATEGIES["single"]
DATA_PARALLEL = STRATEGIES["ddp"]
OFFLOADED = STRATEGIES["zero3_offload"]
# The ones that `parallelism: auto` chooses from on several GPUs: ZeRO-1 saves no memory over ZeRO-2, and offloading
# costs speed (it is suggested). FSDP2, which has not run on a GPU yet, only where no other fits.
CHOSEN = ("ddp", "zero2", "zero3", "fsdp2")


def for_world_size(name: str, world_size: int) -> Strategy:
    """Return the strategy that runs `name` on this many ranks: data parallelism on one rank is a single process."""
    strategy = STRATEGIES[name]
    return ONE_PROCESS if strategy.ddp and world_size == 1 else strategy


def wider_than(name: str) -> list[str]:
    """Return the strategies that shard more than `name`, in order."""
    order = [strategy.name for strategy in _ALL if not strategy.fsdp and not strategy.cpu_offload]
    return order[order.index(name) + 1 :] if name in order else []


def running(zero_stage: int = 0, cpu_offload: bool = False, fsdp: bool = False, ddp: bool = False) -> Strategy:
    """Return the strategy with these properties, to name what a run uses."""
    wanted = Strategy("", zero_stage, fsdp, ddp, cpu_offload)
    return next(strategy for strategy in _ALL if replace(strategy, name="") == wanted)
