"""Says what would make a plan fit: how few GPUs, and which change costs least."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sft_recipes.planning import batch, memory
from sft_recipes.planning.plan import Topology, engine_of, fits, load_of
from sft_recipes.planning.recipes import hyperparameter
from sft_recipes.planning.schema import Lora, Recipe, RecipeError

GPUS_PER_NODE = 8
_STAGES = ("ddp", "zero1", "zero2", "zero3")


def smallest_gpu_count(recipe: Recipe, card: str | None) -> int | None:
    """The fewest GPUs of this card that hold the recipe as it is and keep its batch; None where none do."""
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        if _fits(recipe, on(gpus, card), _effective_batch_size(recipe)):
            return gpus
    return None


def cheapest_change(recipe: Recipe, topology: Topology) -> str | None:
    """The first change, in order of what it costs, that makes the recipe fit: recomputing activations, smaller
    micro-batches, sharding more, 4-bit weights under adapters, more GPUs, offloading, adapters instead of all
    weights."""
    for said, changed, where in _changes(recipe, topology):
        if _fits(changed, where, _effective_batch_size(recipe)):
            return said
    return None


def on(gpus: int, card: str | None) -> Topology:
    """So many GPUs in nodes of eight."""
    return Topology(gpus=gpus, processes=gpus, nodes=max(1, -(-gpus // GPUS_PER_NODE)), card=card)


def _changes(recipe: Recipe, topology: Topology) -> Iterator[tuple[str, Recipe, Topology]]:
    words: list[str] = []
    if not recipe.trainer["gradient_checkpointing"]:
        recipe = dataclasses.replace(recipe, trainer={**recipe.trainer, "gradient_checkpointing": True})
        words = ["trainer.gradient_checkpointing=true"]
        yield words[0], recipe, topology
    # Beside any larger change the micro-batch may shrink too: it costs a little speed and nothing else.
    stages = list(_STAGES[_STAGES.index(recipe.parallelism) :]) if recipe.parallelism in _STAGES else []
    for engine in [recipe.parallelism, *stages] if topology.gpus > 1 else [recipe.parallelism]:
        said = [] if engine == recipe.parallelism else [f"parallelism={engine}"]
        yield from _smaller(_sharded(recipe, engine), topology, [*words, *said])
    if recipe.lora and not recipe.lora.quantize:
        lora = dataclasses.replace(recipe.lora, quantize="nf4")
        adapted = dataclasses.replace(_sharded(recipe, "ddp"), lora=lora)
        yield from _smaller(adapted, topology, [*words, "lora.quantize=nf4 parallelism=ddp"])
    widest = _sharded(recipe, "zero3") if stages and not (recipe.lora and recipe.lora.quantize) else recipe
    said = [] if widest.parallelism == recipe.parallelism else ["parallelism=zero3"]
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        if gpus > topology.gpus:
            for candidate, with_words in ((recipe, words), (widest, [*words, *said])):
                yield from _smaller(candidate, on(gpus, topology.card), [*with_words, f"GPUS={gpus}"])
    if not recipe.lora:
        yield from _smaller(_sharded(recipe, "zero3_offload"), topology, [*words, "parallelism=zero3_offload"])
        for lora, name in ((Lora(), "LoRA (lora.r=16)"), (Lora(quantize="nf4"), "QLoRA (lora.quantize=nf4)")):
            adapted = dataclasses.replace(_sharded(recipe, "ddp"), lora=lora)
            yield from _smaller(adapted, topology, [f"{name} with parallelism=ddp and a lora row for size"])


def _smaller(recipe: Recipe, topology: Topology, words: list[str]) -> Iterator[tuple[str, Recipe, Topology]]:
    at_most = recipe.batch.per_device_at_most
    said = words
    while True:
        if said:
            yield " ".join(said), recipe, topology
        if at_most == 1:
            return
        at_most = max(at_most // 2, 1)
        said = [*words, f"batch.per_device_at_most={at_most}"]
        recipe = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, per_device_at_most=at_most))


def _sharded(recipe: Recipe, engine: str) -> Recipe:
    return dataclasses.replace(recipe, parallelism=engine)


def _effective_batch_size(recipe: Recipe) -> int:
    return int(hyperparameter(recipe, "effective_batch_size")[0])


def _fits(recipe: Recipe, topology: Topology, effective_batch_size: int) -> bool:
    """Whether it fits and the stack can carry it."""
    try:
        engine = engine_of(recipe, topology.gpus or topology.processes)
        per_device = batch.per_device_batch_size(
            effective_batch_size, recipe.batch.per_device_at_most, topology.gpus or topology.processes
        )
    except RecipeError:
        return False
    return bool(fits(memory.bytes_per_gpu(load_of(recipe, topology, engine, per_device)), topology.card))
