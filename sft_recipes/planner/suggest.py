"""Suggest what makes a plan fit: the fewest GPUs, and the cheapest change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from sft_recipes.config.architecture import parameter_count
from sft_recipes.config.schema import Lora, Recipe
from sft_recipes.config.sizes import hyperparameter, nearest_size_class
from sft_recipes.config.strategies import DATA_PARALLEL, OFFLOADED, wider_than
from sft_recipes.planner import batch
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime import units
from sft_recipes.runtime.errors import UserError

GPUS_PER_NODE = 8


def smallest_gpu_count(recipe: Recipe, gpu_type: str | None) -> int | None:
    """Return the fewest GPUs of this type that fit the recipe and keep its batch; None if no number does."""
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        if _fits(recipe, topology_for(gpus, gpu_type)):
            return gpus
    return None


def cheapest_change(recipe: Recipe, topology: Topology, max_gpus: int | None = None) -> str | None:
    """Return the cheapest change that makes the recipe fit on at most `max_gpus` GPUs.

    In order of cost: recomputed activations, smaller micro-batches, more sharding, 4-bit weights under adapters, more
    GPUs, offloading, adapters instead of all weights.
    """
    for overrides, changed, target in _changes(recipe, topology):
        if (max_gpus is None or target.gpus <= max_gpus) and _fits(changed, target):
            return overrides
    return None


def lighter_overrides(recipe: Recipe, topology: Topology, limit: int = 2) -> list[str]:
    """Return the cheapest changes on these GPUs that need at least 10% less memory, for a run that ran out of memory.

    Without a forecast: general changes that are not set yet.
    """
    current = _forecast_bytes(recipe, topology)
    lighter = (
        overrides
        for overrides, changed, target in (_changes(recipe, topology) if current else ())
        if target.gpus <= topology.gpus and 0 < _forecast_bytes(changed, target) <= 0.9 * current
    )
    fallbacks = {
        "batch.max_per_device_batch_size=1": recipe.batch.max_per_device_batch_size > 1,
        "trainer.gradient_checkpointing=true": not recipe.trainer["gradient_checkpointing"],
        f"trainer.max_length={recipe.trainer['max_length'] // 2}": recipe.trainer["max_length"] > 1,
    }
    return list(itertools.islice(lighter, limit)) or [key for key, available in fallbacks.items() if available][:limit]


def _forecast_bytes(recipe: Recipe, topology: Topology) -> int:
    """Return the forecast bytes per GPU; 0 if the plan is invalid."""
    try:
        forecast = plans.resolve(recipe, topology).memory_bytes_per_gpu
    except UserError:
        return 0
    return forecast["total"] if forecast else 0


def topology_for(gpus: int, gpu_type: str | None) -> Topology:
    """Return a topology of this many GPUs in nodes of eight."""
    return Topology(gpus=gpus, processes=gpus, nodes=nodes_for(gpus), gpu_type=gpu_type)


def nodes_for(gpus: int) -> int:
    """Return the nodes of eight GPUs that this many GPUs need."""
    return max(1, -(-gpus // GPUS_PER_NODE))


def _changes(recipe: Recipe, topology: Topology) -> Iterator[tuple[str, Recipe, Topology]]:
    """Yield each change with its overrides; each may also shrink the micro-batch, which costs little speed."""
    overrides: list[str] = []
    if not recipe.trainer["gradient_checkpointing"]:
        recipe = dataclasses.replace(recipe, trainer={**recipe.trainer, "gradient_checkpointing": True})
        overrides = ["trainer.gradient_checkpointing=true"]
        yield overrides[0], recipe, topology
    yield from _with_smaller_batches(recipe, topology, overrides)
    wider = wider_than(recipe.parallelism)
    for parallelism in wider if topology.gpus > 1 else ():
        yield from _with_smaller_batches(
            _with_strategy(recipe, parallelism), topology, [*overrides, f"parallelism={parallelism}"]
        )
    if recipe.lora and not recipe.lora.quantize:
        lora = dataclasses.replace(recipe.lora, quantize="nf4")
        yield from _with_smaller_batches(
            _with_strategy(recipe, DATA_PARALLEL.name, lora),
            topology,
            [*overrides, f"lora.quantize=nf4 parallelism={DATA_PARALLEL.name}"],
        )
    yield from _more_gpus(recipe, topology, overrides, wider[-1] if wider else recipe.parallelism)
    if not recipe.lora:
        yield from _offloaded(recipe, topology, overrides)
        for lora, override in ((Lora(), "lora.r=16"), (Lora(quantize="nf4"), "lora.quantize=nf4")):
            size = nearest_size_class((parameter_count(recipe.model.architecture) or 0) / 1e9, "lora")
            adapted = dataclasses.replace(
                _with_strategy(recipe, DATA_PARALLEL.name, lora), size=size, allow_out_of_range=[]
            )
            yield from _with_smaller_batches(
                adapted, topology, [*overrides, override, f"size={size}", f"parallelism={DATA_PARALLEL.name}"]
            )


def _offloaded(recipe: Recipe, topology: Topology, overrides: list[str]) -> Iterator[tuple[str, Recipe, Topology]]:
    """Yield offloading, with the host memory that it needs, which is not checked here."""
    offloaded = _with_strategy(recipe, OFFLOADED.name)
    for text, changed, target in _with_smaller_batches(
        offloaded, topology, [*overrides, f"parallelism={OFFLOADED.name}"]
    ):
        needed = plans.resolve(changed, target).host_bytes_per_node or {"total": 0}
        yield f"{text} ({needed['total'] / units.GIB:,.0f} GiB of host memory per node)", changed, target


def _more_gpus(
    recipe: Recipe, topology: Topology, overrides: list[str], widest: str
) -> Iterator[tuple[str, Recipe, Topology]]:
    """Yield the larger GPU counts that keep the batch, with the same strategy and the one that shards most."""
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        for parallelism in dict.fromkeys((recipe.parallelism, widest)) if gpus > topology.gpus else ():
            strategy = [] if parallelism == recipe.parallelism else [f"parallelism={parallelism}"]
            yield from _with_smaller_batches(
                _with_strategy(recipe, parallelism),
                topology_for(gpus, topology.gpu_type),
                [*overrides, *strategy, f"GPUS={gpus}"],
            )


def _with_smaller_batches(
    recipe: Recipe, topology: Topology, overrides: list[str]
) -> Iterator[tuple[str, Recipe, Topology]]:
    size = recipe.batch.max_per_device_batch_size
    current = overrides
    while True:
        if current:
            yield " ".join(current), recipe, topology
        if size == 1:
            return
        size = max(size // 2, 1)
        current = [*overrides, f"batch.max_per_device_batch_size={size}"]
        recipe = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, max_per_device_batch_size=size))


def _with_strategy(recipe: Recipe, parallelism: str, lora: Lora | None = None) -> Recipe:
    """Return the recipe with another strategy, and with these adapters if given."""
    return dataclasses.replace(recipe, parallelism=parallelism, lora=lora or recipe.lora)


def _effective_batch_size(recipe: Recipe) -> int:
    return int(hyperparameter(recipe, "effective_batch_size")[0])


def _fits(recipe: Recipe, topology: Topology) -> bool:
    """Return whether the plan is valid and fits."""
    try:
        return plans.resolve(recipe, topology).fits is True
    except UserError:
        return False
