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
    """Each change with its words; beside any the micro-batch may shrink too, which costs a little speed alone."""
    words: list[str] = []
    if not recipe.trainer["gradient_checkpointing"]:
        recipe = dataclasses.replace(recipe, trainer={**recipe.trainer, "gradient_checkpointing": True})
        words = ["trainer.gradient_checkpointing=true"]
        yield words[0], recipe, topology
    yield from _smaller(recipe, topology, words)
    stages = _STAGES[_STAGES.index(recipe.parallelism) + 1 :] if recipe.parallelism in _STAGES else ()
    for engine in stages if topology.gpus > 1 else ():
        yield from _smaller(_under(recipe, engine), topology, [*words, f"parallelism={engine}"])
    if recipe.lora and not recipe.lora.quantize:
        lora = dataclasses.replace(recipe.lora, quantize="nf4")
        yield from _smaller(_under(recipe, "ddp", lora), topology, [*words, "lora.quantize=nf4 parallelism=ddp"])
    yield from _more_gpus(recipe, topology, words, "zero3" if stages else recipe.parallelism)
    if not recipe.lora:
        yield from _smaller(_under(recipe, "zero3_offload"), topology, [*words, "parallelism=zero3_offload"])
        for name, lora in (("LoRA (lora.r=16)", Lora()), ("QLoRA (lora.quantize=nf4)", Lora(quantize="nf4"))):
            said = [f"{name} with parallelism=ddp and a lora row for size"]
            yield from _smaller(_under(recipe, "ddp", lora), topology, said)


def _more_gpus(
    recipe: Recipe, topology: Topology, words: list[str], widest: str
) -> Iterator[tuple[str, Recipe, Topology]]:
    """The next larger counts that keep the batch, as it is and with all shared out."""
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        for engine in dict.fromkeys((recipe.parallelism, widest)) if gpus > topology.gpus else ():
            said = [] if engine == recipe.parallelism else [f"parallelism={engine}"]
            yield from _smaller(_under(recipe, engine), on(gpus, topology.card), [*words, *said, f"GPUS={gpus}"])


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


def _under(recipe: Recipe, engine: str, lora: Lora | None = None) -> Recipe:
    """The recipe under another engine, and with these adapters where they are given."""
    return dataclasses.replace(recipe, parallelism=engine, lora=lora or recipe.lora)


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
