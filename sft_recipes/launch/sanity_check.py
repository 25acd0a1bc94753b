"""Runs the sanity check of a settled plan: a trial run on a copy, then processes that reload its checkpoint; prints the
checks and caches the result."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from sft_recipes.launch import command, ranks
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.watchdog import LaunchResult
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render, save_time
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, EXIT_USER, RunDir, read_json, runs_root, write_json
from sft_recipes.runtime.units import format_duration
from sft_recipes.sanity import trial

log = logging.getLogger(__name__)
_LABELS = {True: "PASS", False: "FAIL", None: "SKIP"}


def cached_result(plan: Plan) -> Path:
    """Path of the cached result for this plan, data and environment; it exists once the sanity check has passed."""
    return runs_root() / ".sanity" / f"{trial.cache_key(plan)}.json"


def results_folder() -> Path:
    """Folder of the cached results, which quote the data; made if it is missing."""
    folder = runs_root() / ".sanity"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def run(context: RunContext, prepared: Path) -> int:
    """Run the sanity check of the context's plan, which must be settled. A stop request terminates it: there is nothing
    to save. Call on every node: node 0 writes the files and reports the result.

    Args:
        prepared: the run's `prepared.json`; only read.

    Returns:
        0 if every check passed, 1 if one failed, 2 for a user error, 75 if stopped.
    """
    result_file = cached_result(context.plan)
    trial_dir, short = RunDir(context.run_dir.path / ".trial"), trial.trial_plan(context.plan)
    if context.is_first_node:
        results_folder()
        ranked = render.describe_ranks(short)
        log.info(f"sanity check: {short.optimizer_steps} steps on {short.rows} rows, {ranked} (skip with SANITY=skip)")
        shutil.rmtree(trial_dir.path, ignore_errors=True)  # of an attempt that was killed
        for run_dir in (trial_dir, RunDir(trial_dir.path / trial.RELOAD)):
            run_dir.path.mkdir()
            plans.write(short, run_dir.plan)
            shutil.copy(prepared, run_dir.prepared)
            command.write_accelerate_config(short, run_dir)
    try:
        return context.agree() or _run_parts(context, trial_dir, short, result_file)
    finally:
        if context.is_first_node:
            shutil.rmtree(trial_dir.path, ignore_errors=True)


def _run_parts(context: RunContext, trial_dir: RunDir, short: Plan, result_file: Path) -> int:
    """Run the trial and the reload of its checkpoint; on node 0 report their checks. Return the exit code."""
    results = []
    reload_dir = RunDir(trial_dir.path / trial.RELOAD)
    for run_dir in (trial_dir, *([reload_dir] if trial.checks_resume(context.plan) else [])):
        ended = ranks.run_ranks(context.within(run_dir, short), "sanity.worker", can_save=False)
        code = ended.code
        if context.is_first_node:
            result = read_json(run_dir.result)
            results.append(result)
            code = _report_without_result(ended, result, run_dir) or _report_checks(result["checks"], context)
        if ended.code == 0:  # otherwise the ranks of the other nodes have failed too
            code = context.agree(code)
        if code:
            return code
    if context.is_first_node:
        checks = [check for result in results for check in result["checks"]]
        _report_result(context.plan, {"checks": checks, "measured": results[0]["measured"]}, result_file)
    return 0


def _report_without_result(ended: LaunchResult, result: dict[str, Any], run_dir: RunDir) -> int:
    """Report a part that has no result, and return the exit code; 0 if it has one."""
    outcome = read_json(run_dir.outcome)
    if EXIT_STOPPED in (ended.code, outcome.get("exit_code")):
        log.info("stopped during the sanity check, before training; run the same command to start again")
        return EXIT_STOPPED
    if error := outcome.get("error") or (ended.error if ended.code == EXIT_USER else None):
        log.error(error)
        return int(outcome.get("exit_code", EXIT_USER))
    if not result:
        error = ended.error or f"no result (exit code {ended.code})"
        log.error(f"sanity check: {error}. See the log above; skip the check with SANITY=skip")
        return EXIT_ERROR
    return 0


def _report_checks(checks: list[dict[str, Any]], context: RunContext) -> int:
    """Print a line per check, and the fix of a failed one; return 1 if one failed, else 0."""
    for check in checks:
        log.info(_line(_LABELS[check["passed"]], check["name"], check["detail"]))
        if check["passed"] is False:
            log.info(_line("", "", f"fix: {check['fix'] or '; or '.join(context.suggest_cheaper())}"))
    if failed := sum(check["passed"] is False for check in checks):
        log.info(f"sanity check failed: {failed} of {len(checks)} checks; training not started")
    return EXIT_ERROR if failed else 0


def _line(label: str, name: str, text: str) -> str:
    return f"{label:<4}  {name:<14}  {text}"


def _report_result(plan: Plan, result: dict[str, Any], result_file: Path) -> None:
    """Print the forecast, and cache the result of a sanity check that has passed."""
    measured = result["measured"]
    forecast = trial.measured_forecast(plan, measured)
    log.info(_line("", "forecast", _forecast(plan, measured, forecast)))
    if measured.get("save_bytes"):
        save_time.record_speed(measured["save_bytes"], measured["save_seconds"])
    write_json(
        result_file, {"recipe": plan.recipe, **result, "forecast": forecast, "plan": plans.comparable_values(plan)}
    )
    log.info(f"sanity check passed (result: {result_file})")


def _forecast(plan: Plan, measured: dict[str, Any], forecast: dict[str, Any]) -> str:
    """Forecast of the run from the trial's speed, and the plan's own forecast."""
    text = f"{measured['tokens_per_second']:,.0f} tokens/s, {_cost(forecast)} for the run"
    planned = plan.forecast or {}
    return f"{text} (plan: {_cost(planned)})" if planned.get("seconds") else text


def _cost(forecast: dict[str, Any]) -> str:
    formats = {"gpu_hours": "{:,.1f} GPU-hours", "money": "cost {:,.2f}"}
    known = [text.format(forecast[key]) for key, text in formats.items() if forecast[key] is not None]
    return ", ".join([format_duration(forecast["seconds"]), *known])
