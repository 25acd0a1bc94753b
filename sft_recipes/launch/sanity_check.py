"""Tries a settled plan before it becomes a run: starts the trial on a copy, then new processes that reload its
checkpoint; shows the verdict, keeps the receipt."""

from __future__ import annotations

import datetime
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.launch import ranks, run_lock
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.process_group import StopRequest
from sft_recipes.launch.watchdog import Ended
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render, save_time
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, RunDir, read_json, runs_root, write_json
from sft_recipes.sanity import trial

_TRIAL, _RELOAD = "sanity.worker", "sanity.reload_worker"


def receipt(plan: Plan) -> Path:
    """Where the receipt of this plan, data and environment lies, once the trial has passed."""
    return runs_root() / ".sanity" / f"{trial.key(plan)}.json"


def carry_out(
    plan: Plan,
    prepared: Path,
    say: Callable[[str], None],
    lighter: Callable[[], list[str]],
    asked: StopRequest,
    peers: NodeLaunchers | None = None,
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
        folder = RunDir(Path(place))
        with run_lock.held(folder):
            say(
                f"sanity: {plan.recipe}, {short.optimizer_steps} steps of {short.effective_batch_size} on {short.rows} "
                f"rows, the longest among them, {render.engine_and_ranks(plan)}; on a copy (SANITY=skip leaves it out)"
            )
            tried = _launch(_TRIAL, short, folder, prepared, asked, peers)
            if code := _ended_without_verdict(tried, written, say):
                return code
            checks, figures = tried.verdict["checks"], tried.verdict["figures"]
            _show(checks, say, lighter)
            if trial.resumes(plan) and not _failed(checks):
                again = RunDir(folder.path / "reload")
                again.path.mkdir()
                reloaded = _launch(_RELOAD, short, again, prepared, asked, peers)
                if code := _ended_without_verdict(reloaded, written, say):
                    return code
                _show(reloaded.verdict["checks"], say, lighter)
                checks = [*checks, *reloaded.verdict["checks"]]
    return _conclude(plan, {"checks": checks, "figures": figures}, written, say)


@dataclass(frozen=True)
class _Launch:
    """One part of the sanity check: its folder, how its ranks ended, and what rank 0 wrote."""

    folder: RunDir
    ended: Ended
    verdict: dict[str, Any]
    outcome: dict[str, Any]


def _launch(
    program: str, plan: Plan, folder: RunDir, prepared: Path, asked: StopRequest, peers: NodeLaunchers | None
) -> _Launch:
    """Start the ranks of one part in its own folder, and wait until they have exited."""
    plans.write(plan, folder.plan)
    shutil.copy(prepared, folder.prepared)
    ended = ranks.carry_out(plan, folder, program, asked, peers, saves=False)
    return _Launch(folder, ended, read_json(folder.verdict), read_json(folder.outcome))


def _ended_without_verdict(launch: _Launch, written: Path, say: Callable[[str], None]) -> int:
    """Report a part that has no verdict; its exit code, 0 where it has one."""
    ended, outcome = launch.ended, launch.outcome
    stacks = _keep_stacks(launch.folder, written)
    if EXIT_STOPPED in (ended.code, outcome.get("exit_code")):
        say("stopped while the plan was tried; nothing was trained, and the same command begins again")
        if ended.fault:
            say(ended.fault)
        return EXIT_STOPPED
    wrong = outcome.get("error") or (ended.fault if ended.by_user else None)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return EXIT_USER
    if not launch.verdict:
        said = ended.fault or f"the trial ended without a verdict (exit code {ended.code})"
        print(f"error: the trial: {said}{stacks}; what it said is above, SANITY=skip leaves it out", file=sys.stderr)
        return EXIT_FAULT
    return 0


def _keep_stacks(folder: RunDir, written: Path) -> str:
    """Puts what each rank was doing beside the receipts, and says where; the trial's own folder is removed."""
    kept = written.with_suffix(".stacks")
    shutil.rmtree(kept, ignore_errors=True)
    if not folder.stack_traces.is_dir():
        return ""
    shutil.move(folder.stack_traces, kept)
    return f"; what each rank was doing is in {kept}"


def _forget_what_was_killed(place: Path) -> None:
    """Trials that no live process carries out any more; each may hold a checkpoint."""
    for path in place.glob("trial-*"):
        if not run_lock.is_held(RunDir(path)):
            shutil.rmtree(path, ignore_errors=True)


def _failed(checks: list[dict[str, Any]]) -> int:
    return sum(check["passed"] is False for check in checks)


def _show(checks: list[dict[str, Any]], say: Callable[[str], None], lighter: Callable[[], list[str]]) -> None:
    """Print a line per check, and what to do where it failed."""
    for check in checks:
        word = {True: "PASS", False: "FAIL", None: "  - "}[check["passed"]]
        say(f"{word}  {check['name']:<15} {check['said']}")
        if check["passed"] is False:
            say(f"      {'':<15} what to do: {check['way_out'] or '; or '.join(lighter())}")


def _conclude(plan: Plan, verdict: dict[str, Any], written: Path, say: Callable[[str], None]) -> int:
    """Print the forecast and the result, and write the receipt if every check passed."""
    failed = _failed(verdict["checks"])
    forecast = trial.measured_forecast(plan, verdict["figures"]) if verdict["figures"] else None
    if forecast:
        say(f"      {'forecast':<15} {_forecast(plan, verdict['figures'], forecast)}")
    if failed:
        say(f"sanity: {failed} of {len(verdict['checks'])} failed; nothing was trained")
        return EXIT_FAULT
    if verdict["figures"].get("save_bytes"):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        save_time.remember(verdict["figures"]["save_bytes"], verdict["figures"]["save_seconds"], now)
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
