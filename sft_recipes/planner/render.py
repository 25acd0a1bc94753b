"""Format plans and recipes as plain-text tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from sft_recipes.config.architecture import find_trace
from sft_recipes.config.gpu_types import find_gpu_type
from sft_recipes.config.schema import OVERFIT_LOSS, DataSource
from sft_recipes.planner import save_time
from sft_recipes.planner.choose import Configuration, describe_checkpointing
from sft_recipes.planner.plan import Plan
from sft_recipes.planner.rank_change import ranks_of
from sft_recipes.runtime.units import GIB


def describe_ranks(plan: Plan) -> str:
    """Return strategy and ranks: `zero2 on 8 ranks, GPU`."""
    return f"{ranks_of(plan)}, {'GPU' if plan.uses_gpu else 'CPU'}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format columns padded to their widest cell, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def format_plan(plan: Plan, explain: bool = False) -> str:
    """Format a plan, one value per line; with `explain`, the origin of each."""
    return format_table([[name, text] + ([_origin(plan, name)] if explain else []) for name, text in _lines(plan)])


def _origin(plan: Plan, name: str) -> str:
    key = name.replace(" ", "_")
    keys = (_KEYS.get(name, key), f"trainer.{key}")
    return next((plan.origins[key] for key in keys if key in plan.origins), "derived")


_KEYS = {
    "model": "model.name_or_path",
    "remote code": "model.trust_remote_code",
    "train data": "data.train",
    "validation data": "data.validation",
    "retention eval": "data.retention_eval",
    "size class": "size",
    "overfit": "data.overfit_rows",
    "activation checkpointing": "trainer.gradient_checkpointing",
}


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    model, data, lora = plan.sections.model, plan.sections.data, plan.sections.lora
    yield "recipe", plan.recipe
    nearest = "" if plan.requested_size == plan.size else f" (nearest to {plan.requested_size})"
    yield "size class", plan.size + nearest
    yield "model", plan.model + (f", {plan.parameters:,} parameters" if plan.parameters else "")
    if plan.init_from:
        yield "initial weights", f"{plan.init_from['run']}, its last step {plan.init_from['step']:,}"
    if model.trust_remote_code:
        yield "remote code", "runs Python of the model repository as this user, unchecked (model.trust_remote_code)"
    if "/" in model.attention:
        yield "remote code", "runs a kernel from the Hub as this user, unchecked (model.attention)"
    if lora:
        trained = f", {plan.trained_parameters:,} parameters trained" if plan.trained_parameters else ""
        frozen = f"frozen weights in {lora.quantize or plan.precision}"
        yield "method", f"{plan.method}: r {lora.r}, alpha {lora.alpha}, {lora.target_modules}, {frozen}{trained}"
    else:
        yield "method", "full fine-tuning"
    yield "train data", _sources(data.sources("train"))
    split = (
        "the training rows" if data.overfit_rows else f"a seeded {data.validation_fraction:.0%} of the training data"
    )
    yield "validation data", _sources(data.sources("validation")) or split
    if data.overfit_rows:
        yield "overfit", f"first {data.overfit_rows} rows, repeated each step; expects a loss below {OVERFIT_LOSS}"
    if data.retention_eval:
        yield "retention eval", data.retention_eval
    on_gpus = f"{plan.gpus} GPUs on {plan.nodes} node(s), {_gpu(plan)}"
    yield "hardware", on_gpus if plan.uses_gpu else f"CPU, {plan.world_size} process(es)"
    yield "parallelism", plan.parallelism
    yield "precision", f"{plan.precision} ({', '.join(f'{k} {v}' for k, v in plan.dtypes.items())})"
    for key in ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
        yield key.replace("_", " "), str(getattr(plan, key))
    yield "activation checkpointing", describe_checkpointing(plan.sections.trainer["gradient_checkpointing"])
    yield "effective batch size", f"{plan.effective_batch_size} {'packed rows' if plan.packing else 'rows'}"
    yield "max length", f"{plan.max_length} tokens"
    yield "learning rate", f"{plan.learning_rate:g}"
    yield "lr scheduler type", plan.lr_scheduler_type
    for key in ("num_train_epochs", "warmup_ratio", "weight_decay", "max_grad_norm"):
        yield key.replace("_", " "), f"{getattr(plan, key):g}"
    for key in ("optimizer_steps", "warmup_steps"):
        yield key.replace("_", " "), _estimate(plan, getattr(plan, key))
    dropped = f"{plan.dropped_rows_per_epoch} of {plan.rows} rows dropped per epoch (drop_last, reshuffled each epoch)"
    yield "rows per epoch", _estimate(plan, plan.rows) + ("" if plan.rows is None else f"; {dropped}")
    for key in ("examples_per_step", "supervised_tokens_per_step"):
        yield key.replace("_", " "), _estimate(plan, getattr(plan, key))
    yield from _memory(plan)
    yield from _forecast(plan)
    yield from _alternatives(plan)


def _sources(sources: list[DataSource]) -> str:
    return ", ".join(source.path + (f" (weight {source.weight:g})" if source.weight != 1 else "") for source in sources)


def _gpu(plan: Plan) -> str:
    """Return the GPU type, or its memory if the type is not in the table."""
    if plan.gpu_type is None:
        return "GPU type not set"
    return plan.gpu_type if find_gpu_type(plan.gpu_type) else f"{plan.gpu_type} GiB, GPU type not in the table"


def _estimate(plan: Plan, value: Any) -> str:
    if value is None:
        return "unknown until the data is prepared"
    return f"{value:,}" + ("" if plan.data_prepared else " (estimate until the data is prepared)")


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.memory_bytes_per_gpu is None:
        yield "memory", "unknown: model.architecture is not set, or its layers have not been traced"
        return
    if trace := find_trace(plan.sections.model.architecture):
        window = f"; sliding window of {trace['window']} tokens" if trace["window"] else ""
        yield "memory forecast", f"from a trace of the layers on fake tensors, assuming {trace['assumed']}{window}"
    yield f"memory per {'GPU' if plan.uses_gpu else 'process'}", _parts(plan.memory_bytes_per_gpu, " peak")
    if reserve := plan.memory_bytes_per_gpu["reserve"]:
        covers = "driver, CUDA context" + (", NCCL" if plan.world_size > 1 else "")
        yield "reserve per GPU", f"{_gib(reserve)}: {covers} and allocator fragmentation, estimated"
    if plan.host_bytes_per_node and plan.uses_gpu:
        yield "host memory per node", _parts(plan.host_bytes_per_node)
    yield "disk", f"at most {_gib(plan.disk_bytes or 0)}; {_gib(plan.checkpoint_bytes or 0)} per checkpoint"
    yield "time per save", save_time.describe(plan)
    if plan.fits is not None:
        yield "fits", f"{'yes' if plan.fits else 'no'} ({_gpu(plan)})"


def _parts(number_bytes: dict[str, int], when: str = "") -> str:
    shown = {part: number for part, number in number_bytes.items() if part not in ("total", "reserve") and number}
    parts = ", ".join(f"{part} {number / GIB:.2f}" for part, number in shown.items())
    return f"{_gib(number_bytes['total'])}{when}, estimated ({parts})"


def _gib(number_bytes: float) -> str:
    return f"{number_bytes / GIB:,.2f} GiB"


def _forecast(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield time, cost, and what would fit."""
    if forecast := plan.forecast:
        price = "" if forecast["money"] is None else f", {forecast['money']:,.2f} at GPU_HOUR_PRICE"
        share = "all (an upper bound until the data is prepared)"
        if plan.supervised_share is not None:
            share = f"{plan.supervised_share:.0%}"
        hours = f"{forecast['seconds'] / 3600:.1f} hours, {forecast['gpu_hours']:,.0f} GPU-hours{price}"
        peak = f"{forecast['hfu']:.0%} of peak FLOP/s ({forecast['mfu']:.0%} MFU plus recomputation)"
        yield "time", f"{hours}; forecast at {peak}; {share} of the tokens supervised"
        yield "evaluations and saves", f"{forecast['overhead_share']:.1%} of that time, saves at 2 GB/s per node"
    elif plan.uses_gpu and plan.parameters and plan.optimizer_steps:
        yield "time", f"no forecast: needs bf16 and a GPU type of docs/models.md, found {plan.precision}, {_gpu(plan)}"
    if plan.fits is not None:
        yield (
            "fewest GPUs",
            f"{plan.fewest_gpus} x {_gpu(plan)}" if plan.fewest_gpus else "none fits the unchanged recipe",
        )
    if plan.fits is False:
        yield "cheapest change", plan.cheapest_change or "none: use a larger GPU"


def _alternatives(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the best other configurations."""
    for values in plan.alternatives:
        gib, seconds = values["memory_bytes"] / GIB, values["step_seconds"]
        configuration = Configuration(*(values[field.name] for field in dataclasses.fields(Configuration)))
        time = f", {seconds / plan.step_seconds:.0%} of the time per step" if seconds and plan.step_seconds else ""
        yield "alternative", f"{configuration}: {gib:.2f} GiB per GPU{time}"


def format_comparison(plans: Sequence[tuple[int, Plan | str]]) -> str:
    """Format one line per GPU count: the plan, or the error."""
    rows = [["GPUs", "parallelism", "micro-batch", "accumulation", "memory per GPU", "fits", "hours", "GPU-hours"]]
    for gpus, plan in plans:
        if isinstance(plan, Plan):
            memory, forecast = plan.memory_bytes_per_gpu, plan.forecast
            sizes = [str(plan.per_device_train_batch_size), str(plan.gradient_accumulation_steps)]
            fits = [_gib(memory["total"]) if memory else "?", {True: "yes", False: "no", None: "?"}[plan.fits]]
            hours = [f"{forecast['seconds'] / 3600:.1f}", f"{forecast['gpu_hours']:,.0f}"] if forecast else ["?", "?"]
            rows.append([str(gpus), plan.parallelism, *sizes, *fits, *hours])
    errors = [f"{gpus} GPUs: {error}" for gpus, error in plans if isinstance(error, str)]
    return "\n".join([format_table(rows), *errors])
