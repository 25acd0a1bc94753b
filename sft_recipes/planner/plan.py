"""Resolve a recipe for given hardware into the plan of a run: every number derived, with its origin."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.config import gpu_types as gpu_table
from sft_recipes.config import strategies
from sft_recipes.config.architecture import parameter_count
from sft_recipes.config.schema import TABLE_KEYS, Batch, Data, Generation, Lora, Model, Monitor, Recipe
from sft_recipes.config.sizes import hyperparameter, size_class_of
from sft_recipes.config.strategies import STRATEGIES, Strategy
from sft_recipes.planner import batch, cost, memory
from sft_recipes.runtime import run_dir, units
from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.text import flatten


@dataclass(frozen=True)
class Topology:
    """The processes of a run: `gpus` over all nodes; 0 means CPU with `processes` ranks."""

    gpus: int
    processes: int
    nodes: int = 1
    gpu_type: str | None = None
    devices: str | None = None


@dataclass(frozen=True)
class Prepared:
    """Results of data preparation; `packing` is false if the rows may not be packed for this model."""

    fingerprint: str
    folder: str
    model: str
    architecture: dict[str, Any]
    examples: int
    rows: int
    supervised_tokens: int
    tokens: int
    validation_rows: int
    notes: list[str] = dataclasses.field(default_factory=list)
    packing: bool = True


@dataclass(frozen=True)
class Sections:
    """The recipe's sections that a run reads unchanged; `trainer` without the keys of the hyperparameter table."""

    model: Model
    data: Data
    batch: Batch
    generation: Generation
    monitor: Monitor
    lora: Lora | None
    trainer: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A resolved recipe.

    Attributes:
        data_prepared: False while rows and steps are estimates.
        notes: findings of data preparation, such as a train/inference template mismatch.
        fewest_gpus: the fewest GPUs that fit, computed by the command `plan` (planner/suggest.py), as
            `cheapest_change` is.
        origins: the source of each number: file and line, size class, command line, or derived.
        allowed_changes: keys that differ from the plan that the run started with (`--allow-change`).
        init_from: run, run_id and step of the last weights that the run starts from (`--init-from`).
        run_id: random, set when the run is created; identifies what the run saves.
    """

    recipe: str
    created: str
    size: str
    requested_size: str
    model: str
    method: str
    parallelism: str
    precision: str
    gpus: int
    nodes: int
    devices: str | None
    gpu_type: str | None
    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    learning_rate: float
    lr_scheduler_type: str
    num_train_epochs: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    max_length: int
    packing: bool
    data_prepared: bool
    examples: int | None
    rows: int | None
    steps_per_epoch: int | None
    dropped_rows_per_epoch: int | None
    optimizer_steps: int | None
    warmup_steps: int | None
    examples_per_step: float | None
    supervised_tokens_per_step: float | None
    supervised_share: float | None
    parameters: int | None
    trained_parameters: int | None
    dtypes: dict[str, str]
    memory_bytes_per_gpu: dict[str, int] | None
    host_bytes_per_node: dict[str, int] | None
    checkpoint_bytes: int | None
    disk_bytes: int | None
    fits: bool | None
    assumed_mfu: float
    forecast: dict[str, float | None] | None
    data_fingerprint: str | None
    sections: Sections
    origins: dict[str, str]
    allowed_changes: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)
    fewest_gpus: int | None = None
    cheapest_change: str | None = None
    run_id: str = ""
    init_from: dict[str, Any] | None = None

    @property
    def parent(self) -> RunDir | None:
        """The run of `init_from`."""
        return run_dir.find(self.init_from["run"], "INIT_FROM") if self.init_from else None

    @property
    def uses_gpu(self) -> bool:
        """Whether the ranks run on GPUs."""
        return self.gpus > 0

    @property
    def strategy(self) -> Strategy:
        """The parallelism strategy, with what it shards and supports."""
        return STRATEGIES[self.parallelism]

    @property
    def shards_parameters(self) -> bool:
        """Whether the weights are sharded."""
        return self.strategy.shards_parameters


# Fields in which two plans of one run may differ: dates, forecasts, and results of data preparation (whose fingerprint
# is compared instead).
NOT_COMPARED = {
    "created",
    "data_prepared",
    "examples",
    "rows",
    "steps_per_epoch",
    "dropped_rows_per_epoch",
    "optimizer_steps",
    "warmup_steps",
    "packing",  # data preparation may turn it off; sections.trainer has the recipe's
    "examples_per_step",
    "supervised_tokens_per_step",
    "supervised_share",
    "parameters",  # counted during data preparation if the recipe has no architecture
    "trained_parameters",
    "memory_bytes_per_gpu",
    "host_bytes_per_node",
    "checkpoint_bytes",
    "disk_bytes",
    "fits",
    "assumed_mfu",
    "forecast",
    "notes",
    "fewest_gpus",
    "cheapest_change",
    "gpu_type",
    "devices",
    "origins",
    "allowed_changes",
    "run_id",
}


def resolve(recipe: Recipe, topology: Topology) -> Plan:
    """Resolve a recipe for this hardware.

    Raises:
        ConfigError: the effective batch does not fit the number of ranks, or there are too few optimizer steps.
    """
    _check_attention(recipe, topology)
    world_size = topology.gpus or topology.processes
    parallelism = _strategy_of(recipe, world_size).name
    values = {key: hyperparameter(recipe, key)[0] for key in TABLE_KEYS}
    effective = values.pop("effective_batch_size")
    per_device = batch.per_device_batch_size(effective, recipe.batch.max_per_device_batch_size, world_size)
    trainer = recipe.trainer
    plan = Plan(
        recipe=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        size=size_class_of(recipe),
        requested_size=recipe.size,
        model=_model_name(recipe),
        method=recipe.method,
        parallelism=parallelism,
        precision=recipe.precision,
        gpus=topology.gpus,
        nodes=topology.nodes,
        devices=topology.devices,
        gpu_type=topology.gpu_type,
        world_size=world_size,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=batch.gradient_accumulation_steps(effective, per_device, world_size),
        effective_batch_size=effective,
        **values,
        max_length=trainer["max_length"],
        packing=trainer["packing"],
        data_prepared=False,
        examples=recipe.data.examples,
        rows=None,
        steps_per_epoch=None,
        dropped_rows_per_epoch=None,
        optimizer_steps=None,
        warmup_steps=None,
        examples_per_step=None,
        supervised_tokens_per_step=None,
        supervised_share=None,
        parameters=None,
        trained_parameters=None,
        dtypes=memory.dtypes(parallelism, recipe.precision, recipe.lora),
        memory_bytes_per_gpu=None,
        host_bytes_per_node=None,
        checkpoint_bytes=None,
        disk_bytes=None,
        fits=None,
        assumed_mfu=recipe.hardware.mfu,
        forecast=None,
        data_fingerprint=None,
        sections=_sections(recipe),
        origins=_origins(recipe, topology),
        allowed_changes=[],
    )
    plan = _with_resources(plan, recipe.model.architecture)
    return _with_steps(plan, _estimated_rows(recipe), recipe.data.examples)


def _check_attention(recipe: Recipe, topology: Topology) -> None:
    if recipe.model.attention == "flash_attention_2" and (not topology.gpus or recipe.precision == "fp32"):
        actual = "fp32" if topology.gpus else "CPU"
        raise ConfigError(
            f"model.attention: flash_attention_2: found {actual}, expected 16 bits on a GPU. Set model.attention=auto"
            f"{' or precision=bf16' if topology.gpus else ''}"
        )


def memory_inputs(plan: Plan, architecture: dict[str, Any]) -> memory.MemoryInputs:
    """Return the inputs of the memory forecast of this plan."""
    lora, trainer = plan.sections.lora, plan.sections.trainer
    return memory.MemoryInputs(
        architecture=architecture,
        parallelism=plan.parallelism,
        precision=plan.precision,
        world_size=plan.world_size,
        tokens=plan.per_device_train_batch_size * plan.max_length,
        gradient_checkpointing=trainer["gradient_checkpointing"],
        lora=lora,
        nodes=plan.nodes,
        optimizer=trainer.get("optim", "adamw_torch_fused"),
        scores_of=plan.max_length if plan.sections.model.attention == "eager" else 0,
        accumulates=plan.gradient_accumulation_steps > 1,
        on_cpu=not plan.uses_gpu,
    )


def _with_resources(plan: Plan, architecture: dict[str, Any]) -> Plan:
    """Return the plan with memory and disk forecasts; unchanged if the architecture is not given."""
    load = memory_inputs(plan, architecture)
    per_gpu, available = memory.bytes_per_gpu(load), gpu_table.memory_bytes(plan.gpu_type)
    if per_gpu is None:
        return plan
    return dataclasses.replace(
        plan,
        parameters=parameter_count(architecture),
        trained_parameters=load.trained,
        memory_bytes_per_gpu=per_gpu,
        host_bytes_per_node=memory.host_bytes_per_node(load),
        checkpoint_bytes=memory.checkpoint_bytes(load),
        disk_bytes=memory.disk_bytes(load),
        fits=None if available is None else per_gpu["total"] + per_gpu["reserve"] <= available,
    )


def with_prepared_data(plan: Plan, prepared: Prepared) -> Plan:
    """Return the plan with the numbers that follow from prepared data: rows, steps, warm-up.

    Raises:
        ConfigError: fewer rows than one effective batch, too few optimizer steps, or a model that does not fit (if the
            recipe has no architecture).
    """
    plan = dataclasses.replace(plan, packing=plan.packing and prepared.packing)
    if plan.memory_bytes_per_gpu is None:
        plan = _with_resources(plan, prepared.architecture)
        if plan.fits is False and plan.memory_bytes_per_gpu is not None:
            raise ConfigError(
                f"model.name_or_path: {plan.model} {describe_shortage(plan)}. Set batch.max_per_device_batch_size=1, "
                f"parallelism=zero3, or more GPUs"
            )
    if prepared.rows < plan.effective_batch_size:
        packed = f"{prepared.examples} examples, packed into " if plan.packing else ""
        raise ConfigError(
            f"data.train: fewer than one effective batch: found {packed}{prepared.rows} rows, expected "
            f"{plan.effective_batch_size} or more. Add examples, or set "
            f"batch.effective_batch_size={_power_of_two_below(prepared.rows)}"
            f"{' allow_out_of_range=[effective_batch_size]' if plan.size != 'tiny' else ''}"
            f"{', or trainer.packing=false' if plan.packing and prepared.examples > prepared.rows else ''}"
        )
    updated = dataclasses.replace(
        plan,
        data_prepared=True,
        data_fingerprint=prepared.fingerprint,
        notes=prepared.notes,
        supervised_tokens_per_step=round(prepared.supervised_tokens / prepared.rows * plan.effective_batch_size, 1),
        supervised_share=round(prepared.supervised_tokens / prepared.tokens, 4),
    )
    return _with_steps(updated, prepared.rows, prepared.examples)


def describe_shortage(plan: Plan) -> str:
    """Describe the memory that a plan needs and that of its GPU."""
    needs, has = plan.memory_bytes_per_gpu or {}, gpu_table.memory_bytes(plan.gpu_type) or 0
    return (
        f"needs about {needs['total'] / units.GIB:.1f} GiB per GPU and {needs['reserve'] / units.GIB:.1f} GiB of "
        f"reserve, found {has / units.GIB:.1f} GiB ({plan.gpu_type})"
    )


def find_differences(old: Plan, new: Plan) -> dict[str, tuple[Any, Any]]:
    """Return the differences between two plans of one run by dotted name; empty if the run can resume.

    The data fingerprint is compared only if both plans have one.
    """
    left, right = comparable_values(old), comparable_values(new)
    unknown = {"data_fingerprint"} if not (old.data_fingerprint and new.data_fingerprint) else set()
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if key not in unknown and left.get(key) != right.get(key)
    }


def comparable_values(plan: Plan) -> dict[str, Any]:
    """Return the values that identify a plan, by dotted name; without `monitor`, which does not affect the weights."""
    return {
        key: value
        for key, value in flat_values(plan).items()
        if key.split(".")[0] not in NOT_COMPARED and not key.startswith("sections.monitor.")
    }


def flat_values(plan: Plan) -> dict[str, Any]:
    """Return every value of a plan, by dotted name."""
    return flatten(dataclasses.asdict(plan))


def write(plan: Plan, path: Path) -> None:
    """Write `plan.json` atomically."""
    write_atomic(path, to_json(plan) + "\n")


def read(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: the file is missing, incomplete, or of another version.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Plan(**{**stored, "sections": _sections_from_json(stored["sections"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: not a plan of this version: found {error}. Start another run with NAME=…"
        ) from error


def to_json(plan: Plan) -> str:
    """Return the plan as indented JSON."""
    return json.dumps(dataclasses.asdict(plan), indent=2)


def _strategy_of(recipe: Recipe, world_size: int) -> Strategy:
    """Return the strategy that runs this recipe on this many ranks.

    Raises:
        ConfigError: it does not support the recipe, or that many ranks.
    """
    strategy, where = STRATEGIES[recipe.parallelism], recipe.origins.get("parallelism", "parallelism")
    if recipe.lora and recipe.lora.quantize and strategy.shards_parameters:
        raise ConfigError(
            f"{where}: {strategy.name} does not shard 4-bit weights: found lora.quantize={recipe.lora.quantize}, "
            f"expected none. Set parallelism=ddp or zero2, or remove lora.quantize"
        )
    if world_size > 1 and not strategy.several_processes:
        raise ConfigError(
            f"{where}: parallelism {strategy.name}: found {world_size} processes, expected 1. "
            f"Set parallelism=ddp, or GPUS=1"
        )
    strategy = strategies.for_world_size(recipe.parallelism, world_size)
    if recipe.lora and recipe.lora.experts and strategy.shards_parameters:
        raise ConfigError(
            f"{where}: {strategy.name} shards parameters, which lora.experts adapts whole: found {strategy.name}, "
            f"expected ddp or zero2. Set parallelism=ddp, or remove lora.experts"
        )
    return strategy


def _model_name(recipe: Recipe) -> str:
    if recipe.model.name_or_path:
        return recipe.model.name_or_path
    return f"{recipe.model.architecture.get('model_type', '?')}, built from scratch"


def _sections(recipe: Recipe) -> Sections:
    """Return the sections that the run reads; the table's keys are fields of the plan itself."""
    trainer = {key: value for key, value in recipe.trainer.items() if key not in TABLE_KEYS}
    return Sections(recipe.model, recipe.data, recipe.batch, recipe.generation, recipe.monitor, recipe.lora, trainer)


def _sections_from_json(stored: dict[str, Any]) -> Sections:
    """Return the sections that `to_json` wrote; a TypeError where a key is unknown or missing."""
    types = {"model": Model, "data": Data, "batch": Batch, "generation": Generation, "monitor": Monitor}
    sections = {name: section(**stored[name]) for name, section in types.items()}
    return Sections(**sections, lora=Lora(**stored["lora"]) if stored["lora"] else None, trainer=stored["trainer"])


def _origins(recipe: Recipe, topology: Topology) -> dict[str, str]:
    table = {key: hyperparameter(recipe, key)[1] for key in TABLE_KEYS}
    derived = {
        "world_size": "derived: one rank per GPU" if topology.gpus else "derived: ranks on the CPU",
        "per_device_train_batch_size": "derived: largest up to batch.max_per_device_batch_size that keeps the batch",
        "gradient_accumulation_steps": "derived: effective batch / (micro-batch x world size)",
        "optimizer_steps": "derived: complete effective batches per epoch x epochs",
        "warmup_steps": "derived: optimizer steps x warmup_ratio, rounded up",
    }
    defaults = {
        f"trainer.{key}": "default" for key in recipe.trainer if key not in TABLE_KEYS and key not in recipe.origins
    }
    return {**defaults, **recipe.origins, **table, **derived}


def _estimated_rows(recipe: Recipe) -> int | None:
    data, trainer = recipe.data, recipe.trainer
    if data.overfit_rows:
        packed = batch.packed_rows(data.overfit_rows, data.mean_tokens or trainer["max_length"], trainer["max_length"])
        rows = packed if trainer["packing"] else data.overfit_rows
        return batch.fill_effective_batch(rows, hyperparameter(recipe, "effective_batch_size")[0])
    if data.examples is None or not trainer["packing"]:
        return data.examples
    if data.mean_tokens is None:
        return None
    return batch.packed_rows(data.examples, data.mean_tokens, trainer["max_length"])


def _with_steps(plan: Plan, rows: int | None, examples: int | None) -> Plan:
    max_steps = plan.sections.trainer["max_steps"]
    if rows is None:
        return plan
    per_epoch = batch.steps_per_epoch(rows, plan.effective_batch_size)
    steps = batch.optimizer_steps(per_epoch, plan.num_train_epochs, max_steps)
    minimum = plan.sections.batch.min_optimizer_steps
    if max_steps <= 0 and steps < minimum:
        raise ConfigError(
            f"batch.min_optimizer_steps: {rows} rows with an effective batch of {plan.effective_batch_size}: found "
            f"{steps} optimizer steps, expected {minimum} or more. Add examples or epochs, or set "
            f"{'trainer.packing=false or ' if plan.packing else ''}batch.min_optimizer_steps={max(steps, 1)}"
        )
    counted = dataclasses.replace(
        plan,
        examples=examples,
        rows=rows,
        steps_per_epoch=per_epoch,
        dropped_rows_per_epoch=rows - per_epoch * plan.effective_batch_size,
        optimizer_steps=steps,
        warmup_steps=batch.warmup_steps(steps, plan.warmup_ratio),
        examples_per_step=round(examples / rows * plan.effective_batch_size, 1) if examples else None,
    )
    return dataclasses.replace(counted, forecast=_forecast(counted))


def _forecast(plan: Plan) -> dict[str, float | None] | None:
    """Return time and cost of a plan whose steps are known; None in fp32, for which there is no table of FLOP/s.

    Packed rows count as full. Before data preparation all tokens count as supervised, an upper bound.
    """
    data, trainer = plan.sections.data, plan.sections.trainer
    architecture = plan.sections.model.architecture
    mean = min(data.mean_tokens or plan.max_length, plan.max_length)
    row_tokens = plan.max_length if plan.packing else mean
    load = memory_inputs(plan, architecture)
    flops = cost.flops_per_token(load, mean, 1.0 if plan.supervised_share is None else plan.supervised_share)
    validation = _validation_examples(plan)
    if flops is None or not plan.optimizer_steps or plan.checkpoint_bytes is None or validation is None:
        return None
    if plan.precision != "bf16":
        return None
    evaluations = math.ceil(plan.optimizer_steps / trainer["eval_steps"])
    work = cost.Work(
        flops=flops,
        train_tokens=plan.optimizer_steps * plan.effective_batch_size * row_tokens,
        evaluations=evaluations,
        tokens_per_evaluation=validation * mean,
        saves=math.ceil(plan.optimizer_steps / trainer["save_steps"]),
        bytes_per_save=plan.checkpoint_bytes,
        models=evaluations + 2,  # with a falling loss each evaluation saves a best model; then last/ and final/
        bytes_per_model=load.trained_bytes,
        one_rank_saves=not plan.strategy.deepspeed,
    )
    return cost.forecast(work, plan.gpu_type, plan.gpus, plan.nodes, plan.assumed_mfu)


def _validation_examples(plan: Plan) -> int | None:
    """Return the examples per evaluation; None if the size of a separate validation set is not given."""
    data = plan.sections.data
    held_out: int = data.overfit_rows or round((plan.examples or 0) * data.validation_fraction)
    examples: int | None = data.validation_examples if data.validation else held_out
    limit: int | None = data.max_eval_samples
    return limit if examples is None else min(examples, limit or examples)


def _power_of_two_below(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)
