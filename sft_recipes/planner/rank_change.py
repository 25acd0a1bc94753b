"""Decide whether a run can resume on other ranks than those that saved it, and which plan values follow from that."""

from __future__ import annotations

from dataclasses import dataclass

from sft_recipes.config.strategies import DATA_PARALLEL, STRATEGIES, Strategy
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan

# Plan values that follow from the ranks and their memory while the effective batch stays the same.
DERIVED_FROM_RANKS = frozenset(
    {
        *("world_size", "gpus", "nodes", "per_device_train_batch_size", "gradient_accumulation_steps"),
        "sections.trainer.gradient_checkpointing",
    }
)
# DeepSpeed's conversion finds Adam's two moments by name; tested without loss with torch's AdamW only.
_RESHARDABLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Ranks:
    """The ranks that saved a checkpoint, or that resume from it."""

    parallelism: str
    world_size: int

    @property
    def strategy(self) -> Strategy:
        """The parallelism strategy."""
        return STRATEGIES[self.parallelism]

    def __str__(self) -> str:
        return f"{self.parallelism} on {self.world_size} rank{'' if self.world_size == 1 else 's'}"


def ranks_of(plan: Plan) -> Ranks:
    """Return the ranks of a plan."""
    return Ranks(plan.parallelism, plan.world_size)


def resuming_strategy(saved: Strategy) -> Strategy:
    """Return the strategy that resumes checkpoints of another one on any number of ranks."""
    return saved if saved.several_processes else DATA_PARALLEL


def incompatibility(saved: Ranks, plan: Plan) -> str | None:
    """Return why the ranks of a plan cannot resume a checkpoint of other ranks, and the fix; None if they can.

    Each strategy has its own format of optimizer state. Another strategy fails to load it or, given DeepSpeed files
    without DeepSpeed, silently starts with an empty optimizer.
    """
    now = ranks_of(plan)
    if not now.strategy.reads_checkpoints_of(saved.strategy):
        usable = resuming_strategy(saved.strategy)
        return (
            f"its checkpoints were saved by {saved}, and {now} cannot load their optimizer state. Set "
            f"parallelism={usable.name}, on any number of ranks, or start another run with NAME=…"
        )
    optimizer = plan.sections.trainer.get("optim", _RESHARDABLE_OPTIMIZERS[0])
    if needs_resharding(saved, now) and optimizer not in _RESHARDABLE_OPTIMIZERS:
        return (
            f"its checkpoints were saved by {saved}, and the state of trainer.optim={optimizer} cannot be "
            f"resharded for {now}. Resume on {saved.world_size} ranks, or start another run with NAME=…"
        )
    return None


def needs_resharding(saved: Ranks, now: Ranks) -> bool:
    """Return whether the checkpoint must be resharded before loading: ZeRO writes one state file per rank."""
    return saved.strategy.deepspeed and saved.world_size != now.world_size


def implied_changes(old: Plan, new: Plan) -> set[str]:
    """Return the keys of `plans.find_differences` that follow from the ranks or the type of GPU and need no
    `--allow-change`.

    Empty if the ranks cannot resume, if the effective batch differs, and between CPU and GPU, for which no tolerance
    was measured.
    """
    differences = plans.find_differences(old, new)
    same_kind = old.uses_gpu == new.uses_gpu and "effective_batch_size" not in differences
    if not same_kind or incompatibility(ranks_of(old), new) is not None:
        return set()
    return differences.keys() & (DERIVED_FROM_RANKS | {"parallelism"})
