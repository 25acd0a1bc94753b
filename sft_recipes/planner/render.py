"""Format plans and recipes as plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft_recipes.config.gpu_types import find_gpu_type
from sft_recipes.config.schema import OVERFIT_LOSS, DataSource
from sft_recipes.planner import save_time
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.units import GIB


def describe_ranks(plan: Plan) -> str:
    """Return strategy and ranks: `zero2 on 8 GPUs`, `ddp, 2 processes on CPU`, `single process on CPU`."""
    if not plan.strategy.several_processes:
        return f"single process on {'1 GPU' if plan.uses_gpu else 'CPU'}"
    plural = plan.world_size > 1
    if plan.uses_gpu:
        return f"{plan.parallelism} on {plan.world_size} GPU{'s' if plural else ''}"
    return f"{plan.parallelism}, {plan.world_size} process{'es' if plural else ''} on CPU"


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
    for candidate in (_KEYS.get(name, key), key, f"trainer.{key}"):
        if candidate in plan.origins:
            return plan.origins[candidate]
    return "default" if name in _DEFAULTED else "derived"


_KERNEL = "runs a kernel from the Hub as this user, unchecked (model.attention)"
_REMOTE_CODE = "runs Python of the model repository as this user, unchecked (model.trust_remote_code)"
_KEYS = {
    "model": "model.name_or_path",
    "remote code": "model.trust_remote_code",
    "train data": "data.train",
    "validation data": "data.validation",
    "retention eval": "data.retention_eval",
    "size class": "size",
    "overfit": "data.overfit_rows",
}
_DEFAULTED = {"precision", "parallelism", "max length", "packing", "validation data"}


def _lines(plan: Plan) -> list[tuple[str, str]]:
    lines = [
        ("recipe", plan.recipe),
        ("size class", plan.size + _nearest(plan)),
        ("model", plan.model + (f", {plan.parameters:,} parameters" if plan.parameters else "")),
        *(
            [("initial weights", f"{plan.init_from['run']}, its last step {plan.init_from['step']:,}")]
            if plan.init_from
            else []
        ),
        *([("remote code", _REMOTE_CODE)] if plan.sections.model.trust_remote_code else []),
        *([("remote code", _KERNEL)] if "/" in plan.sections.model.attention else []),
        ("method", _method(plan)),
        ("train data", _sources(plan.sections.data.training)),
        ("validation data", _sources(plan.sections.data.held_out) or _split(plan)),
        *([("overfit", _overfit(plan))] if plan.sections.data.overfit_rows else []),
        *([("retention eval", source)] if (source := plan.sections.data.retention_eval) else []),
        ("hardware", _hardware(plan)),
        ("parallelism", plan.parallelism),
        ("precision", f"{plan.precision} ({', '.join(f'{k} {v}' for k, v in plan.dtypes.items())})"),
        ("world size", str(plan.world_size)),
        ("per device train batch size", str(plan.per_device_train_batch_size)),
        ("gradient accumulation steps", str(plan.gradient_accumulation_steps)),
        ("effective batch size", f"{plan.effective_batch_size} {'packed rows' if plan.packing else 'rows'}"),
        ("max length", f"{plan.max_length} tokens"),
        ("packing", "on" if plan.packing else "off"),
        ("learning rate", f"{plan.learning_rate:g}"),
        ("lr scheduler type", plan.lr_scheduler_type),
        ("num train epochs", f"{plan.num_train_epochs:g}"),
        ("warmup ratio", f"{plan.warmup_ratio:g}"),
        ("weight decay", f"{plan.weight_decay:g}"),
        ("max grad norm", f"{plan.max_grad_norm:g}"),
        ("optimizer steps", _estimate(plan, plan.optimizer_steps)),
        ("warmup steps", _estimate(plan, plan.warmup_steps)),
        ("rows per epoch", _rows(plan)),
        ("examples per step", _estimate(plan, plan.examples_per_step)),
        ("supervised tokens per step", _estimate(plan, plan.supervised_tokens_per_step)),
    ]
    return lines + _memory(plan) + _forecast(plan) + _what_would_fit(plan)


def _sources(sources: list[DataSource]) -> str:
    weights = (f" (weight {source.weight:g})" if source.weight != 1 else "" for source in sources)
    return ", ".join(f"{source.path}{weight}" for source, weight in zip(sources, weights, strict=True))


def _nearest(plan: Plan) -> str:
    return "" if plan.requested_size == plan.size else f" (nearest to {plan.requested_size})"


def _method(plan: Plan) -> str:
    if plan.method == "full":
        return "full fine-tuning"
    lora = plan.sections.lora
    assert lora is not None
    frozen = f"frozen weights in {lora.quantize or plan.precision}"
    trained = f", {plan.trained_parameters:,} parameters trained" if plan.trained_parameters else ""
    return f"{plan.method}: r {lora.r}, alpha {lora.alpha}, {lora.target_modules}, {frozen}{trained}"


def _overfit(plan: Plan) -> str:
    return f"first {plan.sections.data.overfit_rows} rows, repeated each step; expects a loss below {OVERFIT_LOSS}"


def _split(plan: Plan) -> str:
    if plan.sections.data.overfit_rows:
        return "the training rows"
    return f"a seeded {plan.sections.data.validation_fraction:.0%} of the training data"


def _hardware(plan: Plan) -> str:
    if not plan.uses_gpu:
        return f"CPU, {plan.world_size} process{'es' if plan.world_size > 1 else ''}"
    return f"{plan.gpus} GPUs on {plan.nodes} node(s), {_gpu(plan)}"


def _gpu(plan: Plan) -> str:
    """Return the GPU type, or its memory if the type is not in the table."""
    if plan.gpu_type is None:
        return "GPU type not set"
    return plan.gpu_type if find_gpu_type(plan.gpu_type) else f"GPU type not in the table, {plan.gpu_type} GiB"


def _estimate(plan: Plan, value: Any) -> str:
    if value is None:
        return "unknown until the data is prepared"
    return f"{value:,}" + ("" if plan.data_prepared else " (estimate until the data is prepared)")


def _rows(plan: Plan) -> str:
    if plan.rows is None or plan.steps_per_epoch is None:
        return _estimate(plan, None)
    dropped = f"{plan.dropped_rows_per_epoch} of {plan.rows} rows dropped per epoch (drop_last, reshuffled each epoch)"
    return f"{_estimate(plan, plan.rows)}; {dropped}"


def _memory(plan: Plan) -> list[tuple[str, str]]:
    if plan.memory_bytes_per_gpu is None:
        return [("memory", "unknown: model.architecture is not set")]
    where = "GPU" if plan.uses_gpu else "process"
    lines = [(f"memory per {where}", _parts(plan.memory_bytes_per_gpu, " peak"))]
    if reserve := plan.memory_bytes_per_gpu["reserve"]:
        covers = "driver, CUDA context, NCCL" if plan.world_size > 1 else "driver, CUDA context"
        lines.append(("reserve per GPU", f"{_gib(reserve)}: {covers} and allocator fragmentation, estimated"))
    if plan.host_bytes_per_node and plan.uses_gpu:
        lines.append(("host memory per node", _parts(plan.host_bytes_per_node)))
    if plan.disk_bytes and plan.checkpoint_bytes:
        lines.append(("disk", f"at most {_gib(plan.disk_bytes)}; {_gib(plan.checkpoint_bytes)} per checkpoint"))
        lines.append(("time per save", save_time.describe(plan)))
    if plan.fits is not None:
        lines.append(("fits", f"{'yes' if plan.fits else 'no'} ({_gpu(plan)})"))
    return lines


def _parts(number_bytes: dict[str, int], when: str = "") -> str:
    parts = ", ".join(
        f"{part} {number / GIB:.2f}"
        for part, number in number_bytes.items()
        if part not in ("total", "reserve") and number
    )
    return f"{_gib(number_bytes['total'])}{when}, estimated ({parts})"


def _gib(number_bytes: float) -> str:
    return f"{number_bytes / GIB:,.2f} GiB"


def _forecast(plan: Plan) -> list[tuple[str, str]]:
    forecast = plan.forecast
    if forecast is None:
        known = plan.uses_gpu and plan.parameters and plan.optimizer_steps
        return [("time", _why_no_forecast(plan))] if known else []
    hours, money = (forecast["seconds"] or 0) / 3600, forecast["money"]
    price = "" if money is None else f", {money:,.2f} at GPU_HOUR_PRICE"
    return [
        (
            "time",
            f"{hours:.1f} hours, {forecast['gpu_hours']:,.0f} GPU-hours{price}; forecast at {forecast['hfu']:.0%} "
            f"of peak FLOP/s ({forecast['mfu']:.0%} MFU plus recomputation){_assumed_share(plan)}",
        ),
        ("evaluations and saves", f"{forecast['overhead_share']:.1%} of that time, saves at 2 GB/s per node"),
    ]


def _why_no_forecast(plan: Plan) -> str:
    if plan.precision != "bf16":
        return f"no forecast: the table of GPU types has bf16 FLOP/s only, and the precision is {plan.precision}"
    return f"no forecast: unknown peak FLOP/s ({_gpu(plan)}; set GPU_TYPE to one of docs/models.md)"


def _assumed_share(plan: Plan) -> str:
    if plan.supervised_share is None:
        return "; all tokens supervised, an upper bound until the data is prepared"
    return f"; {plan.supervised_share:.0%} of tokens supervised"


def _what_would_fit(plan: Plan) -> list[tuple[str, str]]:
    if plan.fits is None or not plan.uses_gpu:
        return []
    gpu = plan.gpu_type if find_gpu_type(plan.gpu_type) else f"{plan.gpu_type} GiB"
    none = f"no number of {gpu} fits the unchanged recipe"
    lines = [("fewest GPUs", f"{plan.fewest_gpus} x {gpu}" if plan.fewest_gpus else none)]
    return lines if plan.fits else [*lines, ("cheapest change", plan.cheapest_change or "none: use a larger GPU")]


def format_comparison(plans: Sequence[tuple[int, Plan | str]]) -> str:
    """Format one line per GPU count: the plan, or the error."""
    rows = [["GPUs", "parallelism", "micro-batch", "accumulation", "memory per GPU", "fits", "hours", "GPU-hours"]]
    errors = []
    for gpus, plan in plans:
        if isinstance(plan, str):
            errors.append(f"{gpus} GPUs: {plan}")
            continue
        memory, forecast = plan.memory_bytes_per_gpu, plan.forecast
        rows.append(
            [
                str(gpus),
                plan.parallelism,
                str(plan.per_device_train_batch_size),
                str(plan.gradient_accumulation_steps),
                _gib(memory["total"]) if memory else "?",
                {True: "yes", False: "no", None: "?"}[plan.fits],
                f"{(forecast['seconds'] or 0) / 3600:.1f}" if forecast else "?",
                f"{forecast['gpu_hours']:,.0f}" if forecast else "?",
            ]
        )
    return "\n".join([format_table(rows), *errors])
