"""Says what would make a plan fit: how few GPUs, and which change costs least."""

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
    """The fewest GPUs of this gpu_type that hold the recipe as it is and keep its batch; None where none do."""
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        if _fits(recipe, topology_for(gpus, gpu_type)):
            return gpus
    return None


def cheapest_change(recipe: Recipe, topology: Topology, most_gpus: int | None = None) -> str | None:
    """The first change that at most so many GPUs can carry and that makes the recipe fit, in order of what it costs.

    Recomputing activations, smaller micro-batches, sharing out more, 4-bit weights under adapters, more GPUs,
    offloading, adapters instead of all weights.
    """
    for said, changed, where in _changes(recipe, topology):
        if (most_gpus is None or where.gpus <= most_gpus) and _fits(changed, where):
            return said
    return None


def lighter_overrides(recipe: Recipe, topology: Topology, most: int = 2) -> list[str]:
    """The cheapest changes on these GPUs whose forecast is at least a tenth smaller, for a run that ran out of memory
    although it was to fit; where nothing is forecast, what always helps and is not in force yet."""
    now = _needs(recipe, topology)
    less = (
        said
        for said, changed, where in (_changes(recipe, topology) if now else ())
        if where.gpus <= topology.gpus and 0 < _needs(changed, where) <= 0.9 * now
    )
    helps = {
        "batch.max_per_device_batch_size=1": recipe.batch.max_per_device_batch_size > 1,
        "trainer.gradient_checkpointing=true": not recipe.trainer["gradient_checkpointing"],
        f"trainer.max_length={recipe.trainer['max_length'] // 2}": recipe.trainer["max_length"] > 1,
    }
    return list(itertools.islice(less, most)) or [said for said, free in helps.items() if free][:most]


def _needs(recipe: Recipe, topology: Topology) -> int:
    """Forecast bytes a GPU; 0 where the stack cannot carry it."""
    try:
        forecast = plans.resolve(recipe, topology).memory_bytes_per_gpu
    except UserError:
        return 0
    return forecast["total"] if forecast else 0


def topology_for(gpus: int, gpu_type: str | None) -> Topology:
    """So many GPUs in nodes of eight."""
    return Topology(gpus=gpus, processes=gpus, nodes=nodes_for(gpus), gpu_type=gpu_type)


def nodes_for(gpus: int) -> int:
    """The nodes of eight that so many GPUs take."""
    return max(1, -(-gpus // GPUS_PER_NODE))


def _changes(recipe: Recipe, topology: Topology) -> Iterator[tuple[str, Recipe, Topology]]:
    """Each change with its words; beside any the micro-batch may shrink too, which costs a little speed alone."""
    words: list[str] = []
    if not recipe.trainer["gradient_checkpointing"]:
        recipe = dataclasses.replace(recipe, trainer={**recipe.trainer, "gradient_checkpointing": True})
        words = ["trainer.gradient_checkpointing=true"]
        yield words[0], recipe, topology
    yield from _smaller(recipe, topology, words)
    wider = wider_than(recipe.parallelism)
    for parallelism in wider if topology.gpus > 1 else ():
        yield from _smaller(_under(recipe, parallelism), topology, [*words, f"parallelism={parallelism}"])
    if recipe.lora and not recipe.lora.quantize:
        lora = dataclasses.replace(recipe.lora, quantize="nf4")
        yield from _smaller(
            _under(recipe, DATA_PARALLEL.name, lora),
            topology,
            [*words, f"lora.quantize=nf4 parallelism={DATA_PARALLEL.name}"],
        )
    yield from _more_gpus(recipe, topology, words, wider[-1] if wider else recipe.parallelism)
    if not recipe.lora:
        yield from _offloaded(recipe, topology, words)
        for lora, said in ((Lora(), "lora.r=16"), (Lora(quantize="nf4"), "lora.quantize=nf4")):
            row = nearest_size_class((parameter_count(recipe.model.architecture) or 0) / 1e9, "lora")
            adapted = dataclasses.replace(_under(recipe, DATA_PARALLEL.name, lora), size=row, allow_out_of_range=[])
            yield from _smaller(adapted, topology, [*words, said, f"size={row}", f"parallelism={DATA_PARALLEL.name}"])


def _offloaded(recipe: Recipe, topology: Topology, words: list[str]) -> Iterator[tuple[str, Recipe, Topology]]:
    """With what it asks of the nodes' own memory, which nobody has looked at."""
    offloaded = _under(recipe, OFFLOADED.name)
    for said, changed, where in _smaller(offloaded, topology, [*words, f"parallelism={OFFLOADED.name}"]):
        needed = plans.resolve(changed, where).host_bytes_per_node or {"total": 0}
        yield f"{said} ({needed['total'] / units.GIB:,.0f} GiB of host memory a node)", changed, where


def _more_gpus(
    recipe: Recipe, topology: Topology, words: list[str], widest: str
) -> Iterator[tuple[str, Recipe, Topology]]:
    """The next larger counts that keep the batch, as it is and with all shared out."""
    for gpus in batch.world_sizes_that_divide(_effective_batch_size(recipe)):
        for parallelism in dict.fromkeys((recipe.parallelism, widest)) if gpus > topology.gpus else ():
            said = [] if parallelism == recipe.parallelism else [f"parallelism={parallelism}"]
            yield from _smaller(
                _under(recipe, parallelism), topology_for(gpus, topology.gpu_type), [*words, *said, f"GPUS={gpus}"]
            )


def _smaller(recipe: Recipe, topology: Topology, words: list[str]) -> Iterator[tuple[str, Recipe, Topology]]:
    at_most = recipe.batch.max_per_device_batch_size
    said = words
    while True:
        if said:
            yield " ".join(said), recipe, topology
        if at_most == 1:
            return
        at_most = max(at_most // 2, 1)
        said = [*words, f"batch.max_per_device_batch_size={at_most}"]
        recipe = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, max_per_device_batch_size=at_most))


def _under(recipe: Recipe, parallelism: str, lora: Lora | None = None) -> Recipe:
    """The recipe with another strategy, and with these adapters where they are given."""
    return dataclasses.replace(recipe, parallelism=parallelism, lora=lora or recipe.lora)


def _effective_batch_size(recipe: Recipe) -> int:
    return int(hyperparameter(recipe, "effective_batch_size")[0])


def _fits(recipe: Recipe, topology: Topology) -> bool:
    """Whether it fits and the stack can carry it."""
    try:
        return plans.resolve(recipe, topology).fits is True
    except UserError:
        return False
