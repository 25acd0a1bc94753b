"""Finds the finished run whose last weights a new run starts from (INIT_FROM)."""

from __future__ import annotations

from dataclasses import replace

from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import run_dir
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import read_json

# What weights, tokenizer and template depend on, by the names of a plan.
_MODEL_KEYS = ["name_or_path", "revision", "from_scratch", "architecture", "chat_template", "add_tokens"]
_SAME = ("method", "model", "sections.lora", *(f"sections.model.{key}" for key in _MODEL_KEYS))


def start_from(plan: Plan, name: str) -> Plan:
    """Return the plan with name, id and last step of the run that it starts from.

    Raises:
        SetupError: no such run, an unfinished one, or one of another model, tokenizer, template or method.
    """
    run = run_dir.find(name, "INIT_FROM")
    stored, last = plans.read(run.plan), read_json(run.last / "complete.json")
    if run.state() != "finished" or last.get("run_id") != stored.run_id or not run.final.is_dir():
        raise SetupError(
            f"INIT_FROM: {run.name}: found state {run.state()}, expected a finished run with last/ and final/. Finish "
            f"it with NAME={run.name}, or name another run"
        )
    differences = plans.find_differences(stored, plan)
    for key in (key for key in differences if key.startswith(_SAME) and key != "sections.lora.dropout"):
        old, new = differences[key]
        raise SetupError(
            f"INIT_FROM: {run.name} has another model or method: {key.removeprefix('sections.')}: found {new!r}, "
            f"expected {old!r} as in that run. Use the same recipe and settings, or name another run"
        )
    return replace(plan, init_from={"run": name, "run_id": stored.run_id, "step": last["step"]})
