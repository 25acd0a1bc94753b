"""Derives the trial of the sanity check from a settled plan, the key of its cached result, and its forecast."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.atomic_write import sha256
from sft_recipes.runtime.code_hash import code_hash
from sft_recipes.runtime.env import STACK, gpu_hour_price, library_version
from sft_recipes.runtime.paths import REPOSITORY

STEPS = 12  # two of warmup, ten at the recipe's learning rate
WARMUP_STEPS = 2
SAVED_AT = STEPS - 2  # the last two steps are repeated from it: the second of them needs the optimizer state too
ROWS, LONGEST = 64, 16
RELOAD = "reload"  # directory of the second part, in the trial's
MAX_RESUMED_PARAMETERS = 15_000_000_000  # the 13B class has up to 15 billion; a larger model saves for minutes
# Trainer fields that would replace the trial's own schedule and evaluations.
_IGNORED_FIELDS = ("lr_scheduler_kwargs", "eval_delay", "eval_on_start")
# Code that decides what a sanity check does. command.py sets the environment of the ranks.
_CODE = ("config", "planner", "data", "training", "sanity", "runtime", "launch/command.py")


def trial_plan(plan: Plan) -> Plan:
    """Reduce a plan to `STEPS` steps, with its parallelism, ranks, micro-batch and learning rate.

    A plan with gradient accumulation keeps two micro-batches: the same code path and memory.
    """
    accumulation = min(plan.gradient_accumulation_steps, 2)
    effective = plan.per_device_train_batch_size * plan.world_size * accumulation
    rows = -(-min(plan.rows or ROWS, ROWS) // effective) * effective
    kept = {key: value for key, value in plan.sections.trainer.items() if key not in _IGNORED_FIELDS}
    sections = dataclasses.replace(
        plan.sections,
        trainer={**kept, "max_steps": STEPS, "eval_steps": STEPS, "save_steps": SAVED_AT, "logging_steps": 1},
        data=dataclasses.replace(plan.sections.data, retention_eval=None),
        monitor=dataclasses.replace(plan.sections.monitor, stop_on=[], early_stopping_patience=None),
    )
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
        sections=sections,
    )


def checks_resume(plan: Plan) -> bool:
    """Whether the trial saves a checkpoint, reloads it and resumes."""
    return (plan.parameters or 0) <= MAX_RESUMED_PARAMETERS


def cache_key(plan: Plan) -> str:
    """SHA-256 of what a result depends on: plan, data, model files, libraries, code and configuration files."""
    flat, name = plans.comparable_values(plan), plan.sections.model.name_or_path
    # A model on the Hub is identified by its revision.
    files = [file for file in sorted(Path(name).glob("*")) if file.is_file()] if name and Path(name).is_dir() else []
    parts = {
        "plan": {name: value for name, value in flat.items() if name != "recipe"},
        "gpu_type": plan.gpu_type,
        "weights": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "libraries": {name: library_version(name) for name in STACK},
        "code": code_hashes(REPOSITORY),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def code_hashes(repository: Path) -> dict[str, str]:
    """Hash the code and configuration files that a sanity check depends on, once per process."""
    package = repository / "sft_recipes"
    modules = [file for part in _CODE for file in (package / part, *(package / part).rglob("*.py")) if file.is_file()]
    hashes = {module: code_hash(module) for module in modules}
    hashes |= {file: sha256(file) for file in repository.glob("*_configs/*")}
    return {str(file.relative_to(repository)): digest for file, digest in sorted(hashes.items())}


def measured_forecast(plan: Plan, measured: Mapping[str, Any]) -> dict[str, float | None]:
    """Forecast seconds, GPU-hours and cost of the run from the trial's steps, evaluation and save.

    Args:
        measured: `step_seconds` and `accumulation` of the trial, `eval_rows` of the run, `eval_seconds_per_row`,
            `save_seconds` of a checkpoint (None if the trial saved none: then the plan's forecast counts).
    """
    steps, trainer = plan.optimizer_steps or 0, plan.sections.trainer
    evaluations, saves = -(-steps // trainer["eval_steps"]), -(-steps // trainer["save_steps"])
    seconds = steps * measured["step_seconds"] * plan.gradient_accumulation_steps / measured["accumulation"]
    seconds += evaluations * measured["eval_rows"] * measured["eval_seconds_per_row"]
    if measured["save_seconds"] is None:
        seconds += (plan.forecast or {}).get("saving_seconds") or 0.0
    else:
        seconds += saves * measured["save_seconds"]
    gpu_hours, price = seconds * plan.gpus / 3600, gpu_hour_price()
    return {
        "seconds": round(seconds, 1),
        "gpu_hours": round(gpu_hours, 2) if plan.gpus else None,
        "money": round(gpu_hours * price, 2) if price is not None and plan.gpus else None,
    }
