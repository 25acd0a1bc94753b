"""Suggest what makes a plan fit: the fewest GPUs, and the cheapest change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from sft_recipes.config.architecture import parameter_count
from sft_recipes.config.schema import AUTO, Lora, Recipe
from sft_recipes.config.sizes import hyperparameter, nearest_size_class
from sft_recipes.config.strategies import DATA_PARALLEL, OFFLOADED, wider_than
from sft_recipes.planner import batch
from sft_recipes.planner import plan as plans
from sft_recipes.planner.choose import Configuration, memory_of
from sft_recipes.planner.plan import Plan, Topology
from sft_recipes.runtime.errors import UserError

GPUS_PER_NODE = 8


def smallest_gpu_count(recipe: Recipe, gpu_type: str | None) -> int | None:
    """Return the fewest GPUs of this type that fit the recipe and keep its batch; None if no number does."""
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        if (plan := _plan(recipe, topology_for(gpus, gpu_type))) and plan.fits:
            return gpus
    return None


def cheapest_change(recipe: Recipe, topology: Topology, max_gpus: int | None = None) -> str | None:
    """Return the cheapest change that makes the recipe fit on at most `max_gpus` GPUs.

    In order of cost: recomputed activations, smaller micro-batches, more sharding, 4-bit weights under adapters, more
    GPUs, offloading, adapters instead of all weights.
    """
    for text, changed, target in _changes(recipe, topology):
        if (max_gpus is None or target.gpus <= max_gpus) and (plan := _plan(changed, target)) and plan.fits:
            return text
    return None


def lighter_overrides(recipe: Recipe, topology: Topology) -> list[str]:
    """Return the two cheapest changes on these GPUs that need at least 10% less memory, for a run that ran out of it.

    Without a forecast: general changes.
    """
    plan, found = _plan(recipe, topology), []
    if plan and plan.memory_bytes_per_gpu:
        pinned, most = _with(recipe, Configuration.of(plan).overrides), 0.9 * memory_of(plan)
        for text, changed, target in _changes(pinned, topology):
            if target.gpus <= topology.gpus and (lighter := _plan(changed, target)) and memory_of(lighter) <= most:
                found.append(text)
            if len(found) == 2:
                break
    halved = f"trainer.max_length={recipe.trainer['max_length'] // 2}"
    return found or ["batch.max_per_device_batch_size=1", halved]


def topology_for(gpus: int, gpu_type: str | None) -> Topology:
    """Return a topology of this many GPUs in nodes of eight."""
    return Topology(gpus=gpus, processes=gpus, nodes=nodes_for(gpus), gpu_type=gpu_type)


def nodes_for(gpus: int) -> int:
    """Return the nodes of eight GPUs that this many GPUs need."""
    return max(1, -(-gpus // GPUS_PER_NODE))


def _changes(recipe: Recipe, topology: Topology) -> Iterator[tuple[str, Recipe, Topology]]:
    """Yield each change as a user writes it, with what it changes; each may also shrink the micro-batch, which costs
    little speed."""
    largest = recipe.batch.max_per_device_batch_size or 1  # chosen sizes are small enough
    sizes = [largest >> halvings for halvings in range(largest.bit_length())]
    for overrides, size in itertools.product(_candidates(recipe, topology), sizes):
        change = overrides | ({"batch.max_per_device_batch_size": size} if size < largest else {})
        if change:
            gpus = change.get("GPUS")
            target = topology_for(gpus, topology.gpu_type) if gpus else topology
            text = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
            yield text, _with(recipe, change), target


def _candidates(recipe: Recipe, topology: Topology) -> Iterator[dict[str, Any]]:
    """Yield overrides in order of cost."""
    recomputed = recipe.trainer["gradient_checkpointing"] in (True, AUTO)  # or the plan chooses it where that is needed
    base: dict[str, Any] = {} if recomputed else {"trainer.gradient_checkpointing": True}
    wider, ddp = wider_than(recipe.parallelism), {"parallelism": DATA_PARALLEL.name}
    yield base
    yield from (base | {"parallelism": name} for name in wider if topology.gpus > 1)
    if recipe.lora and not recipe.lora.quantize:
        yield base | {"lora.quantize": "nf4"} | ddp
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        if gpus > topology.gpus:
            yield base | {"GPUS": gpus}
            yield from (base | {"parallelism": widest, "GPUS": gpus} for widest in wider[-1:])
    if not recipe.lora:
        yield base | {"parallelism": OFFLOADED.name}
        size = nearest_size_class((parameter_count(recipe.model.architecture) or 1) / 1e9, "lora")
        yield base | {"lora.r": 16, "size": size} | ddp
        yield base | {"lora.quantize": "nf4", "size": size} | ddp


def _with(recipe: Recipe, change: dict[str, Any]) -> Recipe:
    for key, value in change.items():
        section, _, leaf = key.rpartition(".")
        changed: dict[str, Any] = {} if key == "GPUS" else {key: value}
        if section:
            old: Any = getattr(recipe, section) or Lora()
            new = old | {leaf: value} if section == "trainer" else dataclasses.replace(old, **{leaf: value})
            changed = {section: new}
        recipe = dataclasses.replace(recipe, **changed)
    return recipe


def _effective_batch_size(recipe: Recipe) -> int:
    return int(hyperparameter(recipe, "effective_batch_size")[0])


def _plan(recipe: Recipe, topology: Topology) -> Plan | None:
    """Return the plan; None if it is invalid."""
    try:
        return plans.resolve(recipe, topology)
    except UserError:
        return None
