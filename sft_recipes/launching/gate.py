"""Tries a settled plan before it becomes a run: starts the trial on a copy, tells the verdict, keeps the receipt."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_recipes.launching import command, process
from sft_recipes.planning import plan as plans
from sft_recipes.planning import trial
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.run_folder import EXIT_STOPPED, RunFolder, read_json, runs_root, write_json

EXIT_FAULT, EXIT_USER = 1, 2


def receipt(plan: Plan) -> Path:
    """Where the receipt of this plan, data and environment lies, once the trial has passed."""
    return runs_root() / ".sanity" / f"{trial.key(plan)}.json"


def carry_out(plan: Plan, prepared: Path, say: Callable[[str], None]) -> int:
    """Tries the plan and says what came of it: 0 where all passed, 1 where something failed, 2 for a user's error.

    Args:
        plan: settled.
        prepared: the run's `prepared.json`, which is read alone.
    """
    written = receipt(plan)
    folder = RunFolder(written.with_name(f"{written.stem}.{os.getpid()}"))
    folder.path.mkdir(parents=True, mode=0o700)
    try:
        short = trial.of(plan)
        plans.write(short, folder.plan)
        shutil.copy(prepared, folder.prepared)
        command.write_engine(short, folder)
        say(_announcement(plan, short))
        environment = command.environment(short, os.environ)
        code = process.run(command.launch(short, folder, "sanity"), environment)
        verdict, outcome = read_json(folder.path / "verdict.json"), read_json(folder.outcome)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
    if code == EXIT_STOPPED:
        return EXIT_STOPPED
    if outcome.get("error"):
        print(f"error: {outcome['error']}", file=sys.stderr)
        return EXIT_USER
    if not verdict:
        print(f"error: the trial ended without a verdict (exit code {code}); what it said is above", file=sys.stderr)
        return EXIT_FAULT
    return _tell(plan, verdict, written, say)


def _announcement(plan: Plan, short: Plan) -> str:
    ranks = f"{plan.world_size} {'GPU' if plan.uses_gpu else 'CPU process'}"
    several = ("s" if plan.uses_gpu else "es") if plan.world_size > 1 else ""
    return (
        f"sanity: {plan.recipe}, {short.optimizer_steps} steps of {short.effective_batch_size} on {short.rows} rows, "
        f"the longest among them, {plan.parallelism} on {ranks}{several}; on a copy (SANITY=skip leaves it out)"
    )


def _tell(plan: Plan, verdict: dict[str, Any], written: Path, say: Callable[[str], None]) -> int:
    failed = [check for check in verdict["checks"] if check["passed"] is False]
    for check in verdict["checks"]:
        word = {True: "PASS", False: "FAIL", None: "  - "}[check["passed"]]
        say(f"{word}  {check['name']:<15} {check['said']}")
        if check["passed"] is False:
            say(f"      {'':<15} what to do: {check['way_out']}")
    forecast = trial.measured_forecast(plan, verdict["figures"]) if verdict["figures"] else None
    if forecast:
        say(f"      {'forecast':<15} {_forecast(plan, verdict['figures'], forecast)}")
    if failed:
        say(f"sanity: {len(failed)} of {len(verdict['checks'])} failed; nothing was trained")
        return EXIT_FAULT
    write_json(written, {"recipe": plan.recipe, **verdict, "forecast": forecast, "plan": plans.compared(plan)})
    say(f"sanity: passed; receipt {written}")
    return 0


def _forecast(plan: Plan, figures: dict[str, Any], forecast: dict[str, Any]) -> str:
    """What the whole run will take, beside what the plan had said."""
    said = [f"{figures['tokens_per_second']:,.0f} tokens/s: {_hours(forecast['seconds'])} for the whole run"]
    if forecast["gpu_hours"] is not None:
        said.append(f"{forecast['gpu_hours']:,.1f} GPU-hours")
    if forecast["money"] is not None:
        said.append(f"{forecast['money']:,.2f} at the given price")
    if plan.forecast and plan.forecast["seconds"]:
        said.append(f"the plan said {_hours(plan.forecast['seconds'])}, {plan.forecast['gpu_hours']:,.1f} GPU-hours")
    return ", ".join(said)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
