"""Prints plans and recipes for people: tables in plain text, the same on a terminal and in a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft_recipes.planning.memory import GIB
from sft_recipes.planning.plan import Plan


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plan_table(plan: Plan, explain: bool = False) -> str:
    """The plan as a person reads it; with `explain`, where each value came from."""
    rows = [[name, text] + ([_origin(plan, name)] if explain else []) for name, text in _lines(plan)]
    return table(rows)


def _origin(plan: Plan, name: str) -> str:
    key = name.replace(" ", "_")
    for candidate in (_KEYS.get(name, key), key, f"trainer.{key}"):
        if candidate in plan.origins:
            return plan.origins[candidate]
    return "default" if name in _DEFAULTED else "derived"


_KEYS = {"model": "model.name_or_path", "train data": "data.train", "validation data": "data.validation"}
_DEFAULTED = {"precision", "parallelism", "max length", "packing", "validation data"}


def _lines(plan: Plan) -> list[tuple[str, str]]:
    lines = [
        ("recipe", f"{plan.recipe} (row {plan.size})"),
        ("model", plan.model + (f", {plan.parameters:,} parameters" if plan.parameters else "")),
        ("train data", str(plan.sections["data"]["train"])),
        ("validation data", str(plan.sections["data"]["validation"] or _split(plan))),
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
        ("rows an epoch", _rows(plan)),
        ("examples per step", _estimate(plan, plan.examples_per_step)),
        ("supervised tokens per step", _estimate(plan, plan.supervised_tokens_per_step)),
    ]
    return lines + _memory(plan)


def _split(plan: Plan) -> str:
    return f"a seeded {plan.sections['data']['validation_fraction']:.0%} of the training data"


def _hardware(plan: Plan) -> str:
    if not plan.uses_gpu:
        return f"CPU, {plan.world_size} process{'es' if plan.world_size > 1 else ''}"
    return f"{plan.gpus} GPUs on {plan.nodes} node(s), {plan.card or 'card not named'}"


def _estimate(plan: Plan, value: Any) -> str:
    if value is None:
        return "known when the data is prepared"
    return f"{value:,}" + ("" if plan.settled else " (estimate, settled when the data is prepared)")


def _rows(plan: Plan) -> str:
    if plan.rows is None or plan.steps_per_epoch is None:
        return _estimate(plan, None)
    return _estimate(plan, plan.rows) + f"; {plan.rows_left_out_of_an_epoch} left out as the tail of an epoch"


def _memory(plan: Plan) -> list[tuple[str, str]]:
    if plan.memory_bytes_per_gpu is None:
        return [("memory", "not known: model.architecture is not given")]
    parts = {part: f"{number / GIB:.2f}" for part, number in plan.memory_bytes_per_gpu.items()}
    total = parts.pop("total")
    listed = ", ".join(f"{part} {gib}" for part, gib in parts.items())
    where = "GPU" if plan.uses_gpu else "process"
    lines = [(f"memory a {where}", f"{total} GiB, estimated ({listed})")]
    if plan.fits is not None:
        lines.append(("fits", f"{'yes' if plan.fits else 'no'} ({plan.card})"))
    return lines
