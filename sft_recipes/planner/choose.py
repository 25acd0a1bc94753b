"""Choose parallelism, micro-batch and activation checkpointing: the fastest configuration that fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_recipes.config import strategies
from sft_recipes.config.schema import AUTO, Recipe
from sft_recipes.config.strategies import CHOSEN, DATA_PARALLEL, STRATEGIES
from sft_recipes.planner import batch
from sft_recipes.runtime.units import GIB

if TYPE_CHECKING:
    from sft_recipes.planner.plan import Plan

SIMILAR = 1.03  # step times are estimates: up to this factor, less sharding and then less memory decides
LARGEST_MICRO_BATCH = 32
CHECKPOINTING = (False, 2, True)  # no layer, every second one, all
# Memory of a process on the CPU up to which activations are kept; an assumption, since machines are not asked here.
CPU_BYTES = 4 * GIB


@dataclass(frozen=True)
class Configuration:
    """What a recipe may leave open; `gradient_checkpointing` is a number n to recompute every n-th layer."""

    parallelism: str
    micro_batch: int
    gradient_checkpointing: bool | int

    @classmethod
    def of(cls, plan: Plan) -> Configuration:
        """Return the configuration of a plan."""
        checkpointing = plan.sections.trainer["gradient_checkpointing"]
        return cls(plan.parallelism, plan.per_device_train_batch_size, checkpointing)

    @property
    def overrides(self) -> dict[str, Any]:
        """The keys of a recipe that pin it."""
        return {
            "parallelism": self.parallelism,
            "batch.max_per_device_batch_size": self.micro_batch,
            "trainer.gradient_checkpointing": self.gradient_checkpointing,
        }

    def __str__(self) -> str:
        recomputed = describe_checkpointing(self.gradient_checkpointing)
        return f"{self.parallelism}, micro-batch {self.micro_batch}, activation checkpointing {recomputed}"


def describe_checkpointing(interval: bool | int) -> str:
    """Return which layers are recomputed: `off`, `1 of 2 layers`, `all layers`."""
    return {0: "off", 1: "all layers"}.get(int(interval), f"1 of {interval} layers")


def configurations(recipe: Recipe, world_size: int, effective_batch_size: int, on_cpu: bool) -> Iterator[Configuration]:
    """Yield the configurations of a recipe on this many ranks, the one that needs the least memory last.

    Raises:
        ConfigError: the effective batch is not a multiple of the number of ranks.
    """
    largest, checkpointing = recipe.batch.max_per_device_batch_size, recipe.trainer["gradient_checkpointing"]
    sizes = [batch.per_device_batch_size(effective_batch_size, largest or LARGEST_MICRO_BATCH, world_size)]
    if largest is None:
        rows = effective_batch_size // world_size
        sizes = [1] if on_cpu else [size for size in range(sizes[0], 0, -1) if rows % size == 0]
    kinds = CHECKPOINTING if checkpointing == AUTO else (checkpointing,)
    for name, size, kind in itertools.product(_strategies(recipe, world_size, on_cpu), sizes, kinds):
        yield Configuration(strategies.for_world_size(name, world_size).name, size, kind)


def _strategies(recipe: Recipe, world_size: int, on_cpu: bool) -> Sequence[str]:
    if recipe.parallelism != AUTO:
        return [recipe.parallelism]
    if on_cpu or world_size == 1:
        return [DATA_PARALLEL.name]
    whole = recipe.lora is not None and (recipe.lora.quantize or recipe.lora.experts)  # not sharded
    return [name for name in CHOSEN if not (whole and STRATEGIES[name].shards_parameters)]


def choose(candidates: Sequence[Plan]) -> tuple[Plan, list[Plan]]:
    """Return the best of several plans of one recipe, and up to three alternatives that fit.

    Of the plans that fit and are within 3% of the shortest step time: the one that shards least, then the one that
    needs the least memory. If none fits or memory is not known, the one that needs the least; on the CPU the first one
    that needs little memory. FSDP2 only where no other strategy fits.
    """
    last = candidates[-1]
    if not last.uses_gpu:
        return next((plan for plan in candidates if 0 < memory_of(plan) <= CPU_BYTES), last), []
    fitting = sorted((plan for plan in candidates if plan.fits), key=_step_seconds)
    fitting = [plan for plan in fitting if not plan.strategy.fsdp] or fitting
    if not fitting:
        least = [plan for plan in candidates if not plan.strategy.fsdp] or candidates
        return min(least, key=memory_of) if memory_of(last) else least[-1], []
    fastest = _step_seconds(fitting[0])
    similar = [plan for plan in fitting if _step_seconds(plan) <= SIMILAR * fastest]
    best = min(similar, key=lambda plan: (plan.strategy.zero_stage, memory_of(plan)))
    others: dict[tuple[Any, ...], Plan] = {}
    for plan in fitting:
        others.setdefault(_kind(plan), plan)
    others.pop(_kind(best))
    return best, list(others.values())[:3]


def _kind(plan: Plan) -> tuple[Any, ...]:
    return plan.parallelism, plan.sections.trainer["gradient_checkpointing"]


def memory_of(plan: Plan) -> int:
    """Return the forecast bytes per GPU; 0 if the architecture is not known."""
    return (plan.memory_bytes_per_gpu or {"total": 0})["total"]


def _step_seconds(plan: Plan) -> float:
    return plan.step_seconds or 0.0
