"""Says whether a run may go on with other ranks than those that saved it, and which numbers of its plan then follow."""

from __future__ import annotations

from dataclasses import dataclass

from sft_recipes.config.strategies import DATA_PARALLEL, STRATEGIES, Strategy
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan

# What a plan works out from its ranks while the effective batch stays: how many, where, and how the batch is cut up.
DERIVED_FROM_RANKS = frozenset(
    {"world_size", "gpus", "nodes", "per_device_train_batch_size", "gradient_accumulation_steps"}
)
# DeepSpeed's conversion looks for Adam's two moments by name; with torch's AdamW it was shown to lose nothing.
_CONVERTED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Ranks:
    """Those that saved a checkpoint, or that would go on from it."""

    parallelism: str
    world_size: int

    @property
    def strategy(self) -> Strategy:
        """The parallelism strategy."""
        return STRATEGIES[self.parallelism]

    def __str__(self) -> str:
        return f"{self.parallelism} on {self.world_size} rank{'' if self.world_size == 1 else 's'}"


def ranks_of(plan: Plan) -> Ranks:
    """The ranks that carry a plan."""
    return Ranks(plan.parallelism, plan.world_size)


def incompatibility(saved: Ranks, plan: Plan) -> str | None:
    """Why a checkpoint of some ranks cannot be gone on from by those of a plan, and the way out; None where it can.

    An engine keeps the optimizer's state in a form of its own. Another one fails to read it or, where DeepSpeed's files
    meet a start without DeepSpeed, finds none and begins with an empty optimizer in silence.
    """
    now = ranks_of(plan)
    if not now.strategy.reads_checkpoints_of(saved.strategy):
        usable = saved.strategy if saved.strategy.several_processes else DATA_PARALLEL
        return (
            f"its checkpoints were saved by {saved}, this start would be {now}, and neither can read the "
            f"optimizer state of the other; set parallelism={usable.name}, which may have another number of ranks, or "
            f"begin a run of its own: NAME=…"
        )
    optimizer = plan.sections.trainer.get("optim", _CONVERTED_OPTIMIZERS[0])
    if needs_resharding(saved, now) and optimizer not in _CONVERTED_OPTIMIZERS:
        return (
            f"its checkpoints were saved by {saved}, this start would be {now}, and the state of trainer.optim="
            f"{optimizer} cannot be cut for other ranks; go on with {saved.world_size}, or begin a run of its own: "
            f"NAME=…"
        )
    return None


def needs_resharding(saved: Ranks, now: Ranks) -> bool:
    """Whether these ranks can load what those saved only once it has been cut anew: ZeRO keeps a file for each rank."""
    return saved.strategy.resharding_converts and saved.world_size != now.world_size


def plan_incompatibility(old: Plan, new: Plan) -> str | None:
    """Why the ranks of a new plan cannot go on with a run of the old one; None where they can."""
    return incompatibility(ranks_of(old), new)


def implied_changes(old: Plan, new: Plan) -> set[str]:
    """What of `plans.find_differences` only follows from another number of ranks, and needs nobody's consent.

    Empty where the ranks are as many, where they cannot go on, where the effective batch is another, and between CPU
    and GPU, which no tolerance was measured for.
    """
    differ = plans.find_differences(old, new)
    same_kind = old.uses_gpu == new.uses_gpu and "effective_batch_size" not in differ
    if old.world_size == new.world_size or not same_kind or plan_incompatibility(old, new) is not None:
        return set()
    return differ.keys() & (DERIVED_FROM_RANKS | {"parallelism"})
