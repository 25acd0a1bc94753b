"""Resolve a recipe for given hardware into the plan of a run: every number derived, with its origin."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.config import gpu_types, schema
from sft_recipes.config.architecture import parameter_count
from sft_recipes.config.schema import TABLE_KEYS, Recipe
from sft_recipes.config.sizes import hyperparameter, size_class_of
from sft_recipes.config.strategies import DATA_PARALLEL, STRATEGIES, Strategy
from sft_recipes.planner import batch, choose, cost, lr_schedule, memory
from sft_recipes.planner.choose import Configuration
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

    model: schema.Model
    data: schema.Data
    batch: schema.Batch
    generation: schema.Generation
    monitor: schema.Monitor
    lora: schema.Lora | None
    trainer: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ComparedValues:
    """Values that identify a plan: a run resumes with the plan that has the same ones.

    Attributes:
        init_from: run, run_id and step of the last weights that the run starts from (`--init-from`).
    """

    recipe: str
    size: str
    requested_size: str
    model: str
    method: str
    parallelism: str = ""  # like the sizes and dtypes below, set by `_configure`
    precision: str
    gpus: int
    nodes: int
    world_size: int
    per_device_train_batch_size: int = 0
    gradient_accumulation_steps: int = 0
    effective_batch_size: int
    learning_rate: float
    lr_scheduler_type: str
    num_train_epochs: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    max_length: int
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    sections: Sections
    data_fingerprint: str | None = None
    init_from: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(ComparedValues):
    """A resolved recipe, with values in which two plans of one run may differ: dates, forecasts, and results of data
    preparation, whose fingerprint is compared instead.

    Attributes:
        packing: data preparation may turn it off; `sections.trainer` has the recipe's.
        data_prepared: False while rows and steps are estimates.
        parameters: counted during data preparation if the recipe has no architecture.
        zero3_sizes: values of DeepSpeed's configuration that depend on the model; empty if it has no architecture.
        step_seconds: estimate for an optimizer step before data preparation.
        alternatives: the next best configurations that fit, each of another strategy or checkpointing.
        notes: findings of data preparation, such as a train/inference template mismatch.
        fewest_gpus: the fewest GPUs that fit, computed by the command `plan` (planner/suggest.py), as
            `cheapest_change` is.
        origins: the source of each number: file and line, size class, command line, or derived.
        allowed_changes: keys that differ from the plan that the run started with (`--allow-change`).
        run_id: random, set when the run is created; identifies what the run saves.
    """

    created: str
    devices: str | None
    gpu_type: str | None
    packing: bool
    assumed_mfu: float
    network_gbs: float
    origins: dict[str, str]
    data_prepared: bool = False
    examples: int | None = None
    rows: int | None = None
    steps_per_epoch: int | None = None
    dropped_rows_per_epoch: int | None = None
    optimizer_steps: int | None = None
    warmup_steps: int | None = None
    examples_per_step: float | None = None
    supervised_tokens_per_step: float | None = None
    supervised_share: float | None = None
    parameters: int | None = None
    trained_parameters: int | None = None
    memory_bytes_per_gpu: dict[str, int] | None = None
    host_bytes_per_node: dict[str, int] | None = None
    checkpoint_bytes: int | None = None
    disk_bytes: int | None = None
    zero3_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    fits: bool | None = None
    step_seconds: float | None = None
    alternatives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    forecast: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    fewest_gpus: int | None = None
    cheapest_change: str | None = None
    allowed_changes: list[str] = dataclasses.field(default_factory=list)
    run_id: str = ""

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
    def fused_kernels(self) -> bool:
        """Whether the run uses Liger's layers if its GPU and model type allow it (training/fused_kernels.py)."""
        return self.uses_gpu and self.precision == "bf16" and self.sections.model.fused_kernels is not False

    @property
    def data_workers(self) -> int:
        """Processes of each rank that collate rows: by default two on a GPU, while it computes (PyTorch's tuning guide,
        "asynchronous data loading"); not measured in this project."""
        workers: int = self.sections.trainer.get("dataloader_num_workers", 2 if self.uses_gpu else 0)
        return workers


def resolve(recipe: Recipe, topology: Topology) -> Plan:
    """Resolve a recipe for this hardware; what it leaves open is chosen (planner/choose.py).

    Raises:
        ConfigError: the effective batch does not fit the number of ranks, there are too few optimizer steps, or the
            learning-rate schedule is unknown.
    """
    world_size, trainer = topology.gpus or topology.processes, recipe.trainer
    _check_support(recipe, topology, world_size)
    values = {key: hyperparameter(recipe, key)[0] for key in TABLE_KEYS}
    lr_schedule.check(values["lr_scheduler_type"], trainer.get("lr_scheduler_kwargs", {}))
    effective = values["effective_batch_size"]
    configurations = list(choose.configurations(recipe, world_size, effective, not topology.gpus))
    unchanged = {key: value for key, value in trainer.items() if key not in TABLE_KEYS}
    from_scratch = f"{recipe.model.architecture.get('model_type', '?')}, built from scratch"
    plan = Plan(
        recipe=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        size=size_class_of(recipe),
        requested_size=recipe.size,
        model=recipe.model.name_or_path or from_scratch,
        method=recipe.method,
        precision=recipe.precision,
        gpus=topology.gpus,
        nodes=topology.nodes,
        devices=topology.devices,
        gpu_type=topology.gpu_type,
        world_size=world_size,
        **values,
        max_length=trainer["max_length"],
        packing=trainer["packing"],
        examples=recipe.data.examples,
        assumed_mfu=recipe.hardware.mfu,
        network_gbs=recipe.hardware.network_gbs,
        sections=Sections(
            recipe.model, recipe.data, recipe.batch, recipe.generation, recipe.monitor, recipe.lora, unchanged
        ),
        origins=_origins(recipe, topology),
    )
    candidates = [_with_resources(_configure(plan, each), recipe.model.architecture) for each in configurations]
    plan, others = choose.choose(candidates)
    origins, alternatives = plan.origins | _chosen_origins(recipe, plan), map(_describe_alternative, others)
    plan = dataclasses.replace(plan, origins=origins, alternatives=list(alternatives))
    return _with_steps(plan, _estimated_rows(recipe, effective), recipe.data.examples)


def _configure(plan: Plan, configuration: Configuration) -> Plan:
    micro_batch, parallelism = configuration.micro_batch, configuration.parallelism
    trainer = plan.sections.trainer | {"gradient_checkpointing": configuration.gradient_checkpointing}
    return dataclasses.replace(
        plan,
        parallelism=parallelism,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=plan.effective_batch_size // (micro_batch * plan.world_size),
        dtypes=memory.dtypes(parallelism, plan.precision, plan.sections.lora),
        sections=dataclasses.replace(plan.sections, trainer=trainer),
    )


def _describe_alternative(plan: Plan) -> dict[str, Any]:
    return {
        **dataclasses.asdict(Configuration.of(plan)),
        "memory_bytes": (plan.memory_bytes_per_gpu or {})["total"],
        "step_seconds": plan.step_seconds,
    }


def _check_support(recipe: Recipe, topology: Topology, world_size: int) -> None:
    """Reject a strategy or attention that does not support the recipe, or that many ranks."""
    lora, attention = recipe.lora, recipe.model.attention
    strategy = STRATEGIES.get(recipe.parallelism, DATA_PARALLEL)  # `auto` chooses a supported one
    if attention == "flash_attention_2" and (not topology.gpus or recipe.precision == "fp32"):
        actual = recipe.precision if topology.gpus else "CPU"
        key, text = "model.attention", f"{attention}: found {actual}, expected bf16 on a GPU. Set model.attention=auto"
    elif lora and (lora.quantize or lora.experts) and strategy.shards_parameters:
        weights = "4-bit weights" if lora.quantize else "what lora.experts adapts"
        key, text = "parallelism", f"{strategy.name} does not shard {weights}. Set parallelism=ddp or zero2"
    elif world_size > 1 and not strategy.several_processes:
        key, text = "parallelism", f"{strategy.name}: found {world_size} processes, expected 1. Set parallelism=ddp"
    else:
        return
    raise ConfigError(f"{recipe.origins.get(key, f'recipes/{recipe.name}.yaml')}: {key}: {text}")


_NODE_COPY = "zero_hpz_partition_size"  # DeepSpeed's key


def memory_inputs(plan: Plan, architecture: Mapping[str, Any]) -> memory.MemoryInputs | None:
    """Return the inputs of the memory forecast of this plan.

    None if the architecture lacks dimensions, or its layers have been traced for another precision or method only.
    """
    if parameter_count(architecture) is None or not memory.is_traced(architecture, plan.precision, plan.sections.lora):
        return None
    trainer = plan.sections.trainer
    return memory.MemoryInputs(
        architecture=architecture,
        parallelism=plan.parallelism,
        precision=plan.precision,
        world_size=plan.world_size,
        tokens=plan.per_device_train_batch_size * plan.max_length,
        gradient_checkpointing=trainer["gradient_checkpointing"],
        lora=plan.sections.lora,
        nodes=plan.nodes,
        optimizer=trainer.get("optim", "adamw_torch_fused"),
        scores_of=plan.max_length if plan.sections.model.attention == "eager" else 0,
        accumulation=plan.gradient_accumulation_steps,
        on_cpu=not plan.uses_gpu,
        fused_kernels=plan.fused_kernels,
        hierarchical=_NODE_COPY in plan.zero3_sizes,
        row_length=plan.max_length,
    )


def _with_resources(plan: Plan, architecture: Mapping[str, Any]) -> Plan:
    """Return the plan with memory and disk forecasts; unchanged if the architecture is not given."""
    load = memory_inputs(plan, architecture)
    if load is None:
        return plan
    per_gpu, step = memory.bytes_per_gpu(load), cost.step_time(plan, load)
    if 1 < plan.nodes < plan.world_size and plan.strategy.copies_per_node and plan.method == "full":
        copied = dataclasses.replace(load, hierarchical=True)
        with_copy = cost.step_time(plan, copied)
        faster = step is not None and with_copy is not None and with_copy.total * choose.SIMILAR < step.total
        with_copy_per_gpu = memory.bytes_per_gpu(copied)
        if not plan.uses_gpu or (faster and _fits(plan, with_copy_per_gpu)):
            load, per_gpu, step = copied, with_copy_per_gpu, with_copy
    return dataclasses.replace(
        plan,
        step_seconds=round(step.total, 4) if step else None,
        parameters=load.parameters,
        trained_parameters=load.trained,
        memory_bytes_per_gpu=per_gpu,
        host_bytes_per_node=memory.host_bytes_per_node(load),
        checkpoint_bytes=memory.checkpoint_bytes(load),
        disk_bytes=memory.disk_bytes(load),
        zero3_sizes=memory.zero3_sizes(load),
        fits=_fits(plan, per_gpu),
    )


def _fits(plan: Plan, per_gpu: Mapping[str, int]) -> bool | None:
    """Return whether the memory of the plan's GPU suffices; None if it is not known, and on the CPU."""
    available = gpu_types.memory_bytes(plan.gpu_type)
    return None if available is None else per_gpu["total"] + per_gpu["reserve"] <= available


def with_prepared_data(plan: Plan, prepared: Prepared) -> Plan:
    """Return the plan with the numbers that follow from prepared data: rows, steps, warm-up.

    Raises:
        ConfigError: fewer rows than one effective batch, too few optimizer steps, or a model that does not fit (if the
            recipe has no architecture).
    """
    plan = dataclasses.replace(plan, packing=plan.packing and prepared.packing)
    if plan.memory_bytes_per_gpu is None:
        plan = _with_resources(plan, prepared.architecture)
        if plan.fits is False:
            raise ConfigError(
                f"model.name_or_path: {plan.model} {describe_shortage(plan)}. Set batch.max_per_device_batch_size=1, "
                f"parallelism=zero3, or more GPUs"
            )
    if prepared.rows < plan.effective_batch_size:
        raise ConfigError(
            f"data.train: fewer than one effective batch: found {prepared.rows} rows of {prepared.examples} examples, "
            f"expected {plan.effective_batch_size} or more. Add examples, or set batch.effective_batch_size="
            f"{1 << max(prepared.rows.bit_length() - 1, 0)} allow_out_of_range=[effective_batch_size]"
            f"{' or trainer.packing=false' if plan.packing else ''}"
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
    needs, has = plan.memory_bytes_per_gpu or {}, gpu_types.memory_bytes(plan.gpu_type) or 0
    return (
        f"needs about {needs['total'] / units.GIB:.1f} GiB per GPU and {needs['reserve'] / units.GIB:.1f} GiB of "
        f"reserve, found {has / units.GIB:.1f} GiB ({plan.gpu_type})"
    )


def find_differences(old: Plan, new: Plan) -> dict[str, tuple[Any, Any]]:
    """Return the differences between two plans of one run by dotted name; empty if the run can resume.

    The data fingerprint is compared only if both plans have one.
    """
    left, right = comparable_values(old), comparable_values(new)
    if not (old.data_fingerprint and new.data_fingerprint):
        left.pop("data_fingerprint"), right.pop("data_fingerprint")
    keys = sorted(left.keys() | right.keys())
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def comparable_values(plan: Plan) -> dict[str, Any]:
    """Return the values that identify a plan, by dotted name; without `monitor`, which does not affect the weights."""
    compared = {field.name for field in dataclasses.fields(ComparedValues)}
    return {
        key: value
        for key, value in flat_values(plan).items()
        if key.split(".")[0] in compared and not key.startswith("sections.monitor.")
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
        sections = {
            name: schema.SECTIONS[name](**values) if name in schema.SECTIONS and values else values
            for name, values in stored["sections"].items()
        }
        return Plan(**stored | {"sections": Sections(**sections)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a plan of this version ({error}). Start another run with NAME=…") from error


def to_json(plan: Plan) -> str:
    """Return the plan as indented JSON."""
    return json.dumps(dataclasses.asdict(plan), indent=2)


def _origins(recipe: Recipe, topology: Topology) -> dict[str, str]:
    trainer = (f"trainer.{key}" for key in schema.defaults()["trainer"])
    defaults = ("precision", "parallelism", "data.validation", *trainer)
    table = {key: hyperparameter(recipe, key)[1] for key in TABLE_KEYS}
    derived = {
        "world_size": "derived: one rank per GPU" if topology.gpus else "derived: ranks on the CPU",
        "per_device_train_batch_size": "derived: largest up to batch.max_per_device_batch_size that keeps the batch",
        "gradient_accumulation_steps": "derived: effective batch / (micro-batch x world size)",
        "optimizer_steps": "derived: complete effective batches per epoch x epochs",
        "warmup_steps": "derived: optimizer steps x warmup_ratio, rounded up",
    }
    return dict.fromkeys(defaults, "default") | recipe.origins | table | derived


def _chosen_origins(recipe: Recipe, plan: Plan) -> dict[str, str]:
    """Return the origins of what the recipe leaves open."""
    load = memory_inputs(plan, recipe.model.architecture)
    step = cost.step_time(plan, load) if load else None
    reason = "chosen: fits" if plan.fits else "chosen: needs the least memory"
    if not plan.uses_gpu:
        reason = "chosen for the CPU"
    elif step and plan.fits:
        reason = (
            f"chosen: fastest that fits, {step.total:.2f} s per step (computation {step.compute:.2f}, communication "
            f"{step.communication:.2f} mostly in parallel, overhead {step.overhead:.2f}; estimated)"
        )
    chosen = {
        "parallelism": recipe.parallelism == schema.AUTO,
        "per_device_train_batch_size": recipe.batch.max_per_device_batch_size is None,
        "trainer.gradient_checkpointing": recipe.trainer["gradient_checkpointing"] == schema.AUTO,
    }
    return {key: reason for key, is_chosen in chosen.items() if is_chosen}


def _estimated_rows(recipe: Recipe, effective_batch_size: int) -> int | None:
    data, max_length = recipe.data, recipe.trainer["max_length"]
    examples, mean = data.overfit_rows or data.examples, data.mean_tokens
    if examples is None or (recipe.trainer["packing"] and mean is None and not data.overfit_rows):
        return None
    rows = batch.packed_rows(examples, mean or max_length, max_length) if recipe.trainer["packing"] else examples
    return batch.fill_effective_batch(rows, effective_batch_size) if data.overfit_rows else rows


def _with_steps(plan: Plan, rows: int | None, examples: int | None) -> Plan:
    if rows is None:
        return plan
    per_epoch, dropped = divmod(rows, plan.effective_batch_size)
    max_steps, minimum = plan.sections.trainer["max_steps"], plan.sections.batch.min_optimizer_steps
    steps = batch.optimizer_steps(per_epoch, plan.num_train_epochs, max_steps)
    if max_steps <= 0 and steps < minimum:
        raise ConfigError(
            f"batch.min_optimizer_steps: {rows} rows with an effective batch of {plan.effective_batch_size}: found "
            f"{steps} optimizer steps, expected {minimum} or more. Add examples or epochs, or set "
            f"batch.min_optimizer_steps={max(steps, 1)}"
        )
    plan = dataclasses.replace(
        plan,
        examples=examples,
        rows=rows,
        steps_per_epoch=per_epoch,
        dropped_rows_per_epoch=dropped,
        optimizer_steps=steps,
        warmup_steps=batch.warmup_steps(steps, plan.warmup_ratio),
        examples_per_step=round(examples / rows * plan.effective_batch_size, 1) if examples else None,
    )
    load = memory_inputs(plan, plan.sections.model.architecture)
    return dataclasses.replace(plan, forecast=cost.forecast(plan, load) if load else None)
