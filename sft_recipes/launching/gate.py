"""Tries a settled plan before it becomes a run: starts the trial on a copy, tells the verdict, keeps the receipt."""

from __future__ import annotations

import datetime
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_recipes.launching import lock, ranks
from sft_recipes.launching.peers import Peers
from sft_recipes.launching.process import Asked
from sft_recipes.planning import plan as plans
from sft_recipes.planning import saves, show, trial
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


def receipt(plan: Plan) -> Path:
    """Where the receipt of this plan, data and environment lies, once the trial has passed."""
    return runs_root() / ".sanity" / f"{trial.key(plan)}.json"


def carry_out(
    plan: Plan,
    prepared: Path,
    say: Callable[[str], None],
    lighter: Callable[[], list[str]],
    asked: Asked,
    peers: Peers | None = None,
) -> int:
    """Tries the plan and says what came of it: 0 where all passed, 1 where something failed, 2 for a user's error.

    Args:
        plan: settled.
        prepared: the run's `prepared.json`, which is read alone.
        lighter: the cheapest changes that take less memory, asked for where it ran out.
        asked: whoever asks for a stop has the trial ended, since it has nothing to save.
        peers: the parents on the other nodes.
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
            say(
                f"sanity: {plan.recipe}, {short.optimizer_steps} steps of {short.effective_batch_size} on {short.rows} "
                f"rows, the longest among them, {show.engine_and_ranks(plan)}; on a copy (SANITY=skip leaves it out)"
            )
            ended = ranks.carry_out(short, folder, "sanity", asked, peers, saves=False)
            verdict, outcome = read_json(folder.verdict), read_json(folder.outcome)
            stacks = _keep_stacks(folder, written)
    if EXIT_STOPPED in (ended.code, outcome.get("exit_code")):
        say("stopped while the plan was tried; nothing was trained, and the same command begins again")
        if ended.fault:
            say(ended.fault)
        return EXIT_STOPPED
    wrong = outcome.get("error") or (ended.fault if ended.by_user else None)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return EXIT_USER
    if not verdict:
        said = ended.fault or f"the trial ended without a verdict (exit code {ended.code})"
        print(f"error: the trial: {said}{stacks}; what it said is above, SANITY=skip leaves it out", file=sys.stderr)
        return EXIT_FAULT
    return _tell(plan, verdict, written, say, lighter)


def _keep_stacks(folder: RunFolder, written: Path) -> str:
    """Puts what each rank was doing beside the receipts, and says where; the trial's own folder is removed."""
    kept = written.with_suffix(".stacks")
    shutil.rmtree(kept, ignore_errors=True)
    if not folder.stacks.is_dir():
        return ""
    shutil.move(folder.stacks, kept)
    return f"; what each rank was doing is in {kept}"


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
    if verdict["figures"].get("save_bytes"):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        saves.remember(verdict["figures"]["save_bytes"], verdict["figures"]["save_seconds"], now)
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
