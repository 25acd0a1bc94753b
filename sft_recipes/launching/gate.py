"""Tries a settled plan before it becomes a run: starts the trial on a copy, tells the verdict, keeps the receipt."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_recipes.launching import command, lock, process
from sft_recipes.planning import plan as plans
from sft_recipes.planning import show, trial
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.run_folder import (
    EXIT_FAULT,
    EXIT_STOPPED,
    EXIT_USER,
    RunFolder,
    read_json,
    runs_root,
    write_json,
)

# What it should take is five minutes; loading tens of billions of weights may take longer. Whoever waits for another
# rank for ever has hung.
SECONDS_AT_MOST = 1800


def receipt(plan: Plan) -> Path:
    """Where the receipt of this plan, data and environment lies, once the trial has passed."""
    return runs_root() / ".sanity" / f"{trial.key(plan)}.json"


def carry_out(plan: Plan, prepared: Path, say: Callable[[str], None], lighter: Callable[[], list[str]]) -> int:
    """Tries the plan and says what came of it: 0 where all passed, 1 where something failed, 2 for a user's error.

    Args:
        plan: settled.
        prepared: the run's `prepared.json`, which is read alone.
        lighter: the cheapest changes that take less memory, asked for where it ran out.
    """
    written = receipt(plan)
    written.parent.mkdir(parents=True, exist_ok=True)
    written.parent.chmod(0o700)  # receipts quote the data
    _forget_what_was_killed(written.parent)
    short = trial.of(plan)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=written.parent) as place:
        folder = RunFolder(Path(place))
        with lock.held(folder):
            plans.write(short, folder.plan)
            shutil.copy(prepared, folder.prepared)
            command.write_engine(short, folder)
            say(
                f"sanity: {plan.recipe}, {short.optimizer_steps} steps of {short.effective_batch_size} on {short.rows} "
                f"rows, the longest among them, {show.engine_and_ranks(plan)}; on a copy (SANITY=skip leaves it out)"
            )
            environment = command.environment(short, os.environ)
            code = process.run(command.launch(short, folder, "sanity"), environment, seconds_at_most=SECONDS_AT_MOST)
            verdict, outcome = read_json(folder.verdict), read_json(folder.outcome)
    if code == EXIT_STOPPED:
        return EXIT_STOPPED
    if outcome.get("error"):
        print(f"error: {outcome['error']}", file=sys.stderr)
        return EXIT_USER
    if not verdict:
        hung = f"no verdict within {SECONDS_AT_MOST // 60} minutes: a rank waits for another, or the disk is slow"
        said = hung if code == process.TIMED_OUT else f"the trial ended without a verdict (exit code {code})"
        print(f"error: {said}; what it said is above, SANITY=skip leaves it out", file=sys.stderr)
        return EXIT_FAULT
    return _tell(plan, verdict, written, say, lighter)


def _forget_what_was_killed(place: Path) -> None:
    """Trials that no live process carries out any more; each may hold a checkpoint."""
    for path in place.glob("trial-*"):
        if not lock.is_held(RunFolder(path)):
            shutil.rmtree(path, ignore_errors=True)


def _tell(
    plan: Plan, verdict: dict[str, Any], written: Path, say: Callable[[str], None], lighter: Callable[[], list[str]]
) -> int:
    failed = [check for check in verdict["checks"] if check["passed"] is False]
    for check in verdict["checks"]:
        word = {True: "PASS", False: "FAIL", None: "  - "}[check["passed"]]
        say(f"{word}  {check['name']:<15} {check['said']}")
        if check["passed"] is False:
            say(f"      {'':<15} what to do: {check['way_out'] or '; or '.join(lighter())}")
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
        money = plan.forecast["money"]
        said.append(
            f"the plan said {_hours(plan.forecast['seconds'])}, {plan.forecast['gpu_hours']:,.1f} GPU-hours"
            f"{'' if money is None else f', {money:,.2f}'}"
        )
    return ", ".join(said)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
