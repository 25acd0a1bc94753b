"""Derives from a settled plan the short trial that the sanity gate carries out, and what its receipt is for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.atomic_write import sha256
from sft_recipes.runtime.code_hash import code_hash
from sft_recipes.runtime.env import gpu_hour_price, library_version
from sft_recipes.runtime.paths import REPOSITORY

STEPS = 12  # two to warm up, ten at the recipe's rate
WARMUP_STEPS = 2
SAVED_AT = STEPS - 2  # the last two are taken again from it: the second of them needs the optimizer's state too
ROWS, LONGEST = 64, 16
# Saving and loading a larger one takes minutes by itself.
RESUMED_AT_MOST = 14_500_000_000  # parameters: models of the 13B class have up to 14
# Of the trainer's fields, those that would keep the trial from its own schedule and evaluations.
_NOT_TRIED = ("lr_scheduler_kwargs", "eval_delay", "eval_on_start")
_LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "deepspeed", "peft", "bitsandbytes")


def of(plan: Plan) -> Plan:
    """The plan's own engine, ranks, micro-batch and rate, for `STEPS` steps.

    Accumulation is there where the plan has it, but of two micro-batches, which takes the same path and memory.
    """
    accumulation = min(plan.gradient_accumulation_steps, 2)
    effective = plan.per_device_train_batch_size * plan.world_size * accumulation
    rows = -(-min(plan.rows or ROWS, ROWS) // effective) * effective
    kept = {key: value for key, value in plan.sections.trainer.items() if key not in _NOT_TRIED}
    trainer = {**kept, "max_steps": STEPS, "eval_steps": STEPS, "save_steps": SAVED_AT, "logging_steps": 1}
    return dataclasses.replace(
        plan,
        gradient_accumulation_steps=accumulation,
        effective_batch_size=effective,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        optimizer_steps=STEPS,
        rows=rows,
        steps_per_epoch=rows // effective,
        dropped_rows_per_epoch=0,
        sections=dataclasses.replace(
            plan.sections,
            trainer=trainer,
            data=dataclasses.replace(plan.sections.data, retention_eval=None),
            monitor=dataclasses.replace(plan.sections.monitor, stop_on=[], early_stopping_patience=None),
        ),
    )


def resumes(plan: Plan) -> bool:
    """Whether the trial also saves, loads and goes on."""
    return (plan.parameters or 0) <= RESUMED_AT_MOST


def key(plan: Plan) -> str:
    """SHA-256 over what a receipt is for: plan, data, libraries, and this package's code."""
    flat = plans.compared(plan)
    code = {file: code_hash(file) for file in (REPOSITORY / "sft_recipes").rglob("*.py")}
    code |= {file: sha256(file) for file in REPOSITORY.glob("*_configs/*")}
    parts = {
        "plan": {name: value for name, value in flat.items() if name != "recipe"},
        "gpu_type": plan.gpu_type,
        "weights": _weights(plan.sections.model.name_or_path),
        "libraries": {name: library_version(name) for name in _LIBRARIES},
        "code": {str(file.relative_to(REPOSITORY)): hashed for file, hashed in code.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights(model: str | None) -> list[tuple[str, int, int]]:
    """Name, size and date of a local model's files; what lies on the Hub is known by its revision."""
    files = sorted(Path(model).glob("*")) if model and Path(model).is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def measured_forecast(plan: Plan, figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The whole run's seconds, GPU-hours and money, from what the trial's steps, evaluation and save took.

    Args:
        figures: `step_seconds`, `accumulation` of the trial, `validation_rows` of the run, `evaluation_seconds_a_row`,
            `save_seconds` of a checkpoint (None where the trial left it out: then saving is what the plan says).
    """
    steps, trainer = plan.optimizer_steps or 0, plan.sections.trainer
    training = steps * figures["step_seconds"] * plan.gradient_accumulation_steps / figures["accumulation"]
    evaluations = -(-steps // trainer["eval_steps"])
    evaluating = evaluations * figures["validation_rows"] * figures["evaluation_seconds_a_row"]
    saves = -(-steps // trainer["save_steps"])
    # Weights of best steps are saved too, at most after each evaluation, and the last and the best at the end.
    bytes_a_weight = 2 if plan.dtypes["weights"] == "bf16" else 4
    models = (evaluations + 2) * (plan.trained_parameters or 0) * bytes_a_weight / (plan.checkpoint_bytes or 1)
    saving = (
        (saves + models) * figures["save_seconds"]
        if figures["save_seconds"] is not None
        else (plan.forecast or {}).get("saving_seconds") or 0.0
    )
    seconds = training + evaluating + saving
    gpu_hours, price = seconds * plan.gpus / 3600, gpu_hour_price()
    return {
        "seconds": round(seconds, 1),
        "gpu_hours": round(gpu_hours, 2) if plan.gpus else None,
        "money": round(gpu_hours * price, 2) if price is not None and plan.gpus else None,
    }
