"""Runs a plan: data preparation, sanity check, ranks, result. Stays the parent of all, for signals and exit codes."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sft_recipes.launch import attempts, command, process_group, ranks, sanity_check
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.run_selection import RunStart
from sft_recipes.launch.stop_request import handle_stop_signals
from sft_recipes.launch.watchdog import LaunchResult
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime import env as variables
from sft_recipes.runtime.errors import SetupError, UserError
from sft_recipes.runtime.run_dir import (
    EXIT_ERROR,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    EXIT_USER,
    RunDir,
    read_json,
    write_json,
)

log = logging.getLogger(__name__)


def start_run(start: RunStart, suggest_cheaper: Callable[[], list[str]], nodes: NodeLaunchers | None = None) -> int:
    """Run a plan to its end.

    Args:
        suggest_cheaper: returns the cheapest changes that need less memory; called if a rank runs out of it.
        nodes: the node launchers, led by this one; None on one machine.

    Returns:
        Exit code.

    Raises:
        SetupError: the prepared data does not suit the plan, or differs from the data of the run's earlier attempts.
    """
    if error := attempts.check_attempts(start):
        log.error(error)
        return EXIT_NO_PROGRESS
    with handle_stop_signals() as stop_request:
        return _run(start, RunContext(start.run_dir, start.plan, stop_request, nodes, suggest_cheaper))


def _run(start: RunStart, context: RunContext) -> int:
    run_dir = context.run_dir
    stored = plans.read(run_dir.plan) if start.resumes else None
    plans.write(context.plan if stored is None else stored, run_dir.plan)
    next_plan = run_dir.path / "plan.next.json"
    plans.write(context.plan, next_plan)
    code = prepare_data(context, next_plan)
    if code:
        next_plan.unlink()
        _remove_unstarted(start)
        return code
    try:
        settled = _settle(context.plan, stored, read_json(run_dir.prepared))
    except UserError:
        next_plan.unlink()
        _remove_unstarted(start)
        raise
    next_plan.unlink()
    run_dir.outcome.unlink(missing_ok=True)
    context = context.within(run_dir, settled)
    code = _check_sanity(context)
    if code:
        _remove_unstarted(start)
        return code
    plans.write(settled, run_dir.plan)  # not earlier: a run never resumes with a plan that failed its sanity check
    log.info(_start_message(start, settled))
    code = _train(context)
    if code == EXIT_USER:
        _remove_unstarted(start)
    if read_json(run_dir.outcome).get("out_of_memory"):
        changes = context.suggest_cheaper()
        write_json(run_dir.manifest, {**read_json(run_dir.manifest), "takes_less": changes})
        log.info("to reduce memory, cheapest first: %s", "; or ".join(changes))
    return code


def _train(context: RunContext) -> int:
    """Run the ranks, and return the exit code."""
    run_dir = context.run_dir
    for leftover in (run_dir.ranks, run_dir.stack_traces):
        shutil.rmtree(leftover, ignore_errors=True)
    attempts.record_attempt(run_dir)
    result = ranks.run_ranks(context, "training.main")
    code, error = _read_outcome(run_dir, result)
    if code in (0, EXIT_USER, EXIT_STOPPED):
        attempts.discard_attempt(run_dir)
    elif no_progress := attempts.no_progress_error(run_dir):
        code, error = EXIT_NO_PROGRESS, no_progress
    if error:
        log.error(error)
    return code


def _check_sanity(context: RunContext) -> int:
    """Run the sanity check unless a result is cached, and record the result's path in the run directory."""
    run_dir = context.run_dir
    if variables.sanity_is_skipped():
        write_json(run_dir.sanity, {"skipped": True})
        return 0
    cached = sanity_check.cached_result(context.plan)
    if cached.is_file():
        log.info("sanity check passed (cached: %s)", cached)
    elif code := sanity_check.run(context, run_dir.prepared):
        return code
    write_json(run_dir.sanity, {"result": str(cached)})
    return 0


def run_sanity_check(plan: Plan, suggest_cheaper: Callable[[], list[str]], nodes: NodeLaunchers | None = None) -> int:
    """Prepare a plan's data and run the sanity check, even if a result is cached; creates no run.

    Raises:
        SetupError: the prepared data does not suit the plan.
    """
    with tempfile.TemporaryDirectory(prefix="sft-") as directory, handle_stop_signals() as stop_request:
        run_dir = RunDir(Path(directory))
        context = RunContext(run_dir, plan, stop_request, nodes, suggest_cheaper)
        plans.write(plan, run_dir.plan)
        code = prepare_data(context, run_dir.plan)
        if code:
            return code
        settled = _settle(plan, None, read_json(run_dir.prepared))
        return sanity_check.run(context.within(run_dir, settled), run_dir.prepared)


def prepare_data(context: RunContext, plan_file: Path) -> int:
    """Prepare the data of the plan in a file, and return 0 or the exit code."""
    nodes = context.nodes
    environment = command.environment(context.plan, os.environ)
    peer_failed = nodes.any_node_lost if nodes else None
    code = process_group.run(
        command.prepare(plan_file), environment, context.stop_request, peer_failed=peer_failed
    ).code
    if nodes and (lost := nodes.request_requeue_if_lost()):
        log.error(lost)
        return EXIT_STOPPED
    if code == EXIT_STOPPED:
        log.info("stopped during data preparation, before training; run the same command to start again")
    return code if code in (0, EXIT_USER, EXIT_STOPPED) else EXIT_ERROR


def _start_message(start: RunStart, plan: Plan) -> str:
    step = start.run_dir.latest_complete()
    action = "resuming" if start.resumes else "starting"
    checkpoint = f" from checkpoint-{step}" if step else ""
    return (
        f"{action} {start.run_dir.path}{checkpoint}: {plan.optimizer_steps} optimizer steps, effective batch "
        f"{plan.effective_batch_size}, {render.describe_ranks(plan)}; {plan.dropped_rows_per_epoch} of {plan.rows} "
        f"rows dropped per epoch (drop_last, reshuffled each epoch)"
    )


def _settle(plan: Plan, stored: Plan | None, prepared: dict[str, object]) -> Plan:
    settled = plans.with_prepared_data(plan, Prepared(**prepared))  # type: ignore[arg-type]
    if stored is not None and "data_fingerprint" not in plan.allowed_changes:
        change = plans.find_differences(stored, settled).get("data_fingerprint")
        if change:
            raise SetupError(
                f"{data_changed_message(plan, *change)}, resume with ALLOW_CHANGE=data_fingerprint, or start a new run "
                f"with NAME=…"
            )
    return settled


def data_changed_message(plan: Plan, before: str | None, now: str | None) -> str:
    """Error if a run's data has changed, with the first fix."""
    named = ", ".join(source.path for source in plan.sections.data.training)
    return f"data.train: {named} changed since the run started (data_fingerprint {before} -> {now}). Restore the data"


def _remove_unstarted(start: RunStart) -> None:
    """Remove the directory of a run that never started, so that the corrected command does not find another plan."""
    if not start.resumes and not start.run_dir.numbered("checkpoint"):
        shutil.rmtree(start.run_dir.path)


def _read_outcome(run_dir: RunDir, result: LaunchResult) -> tuple[int, str | None]:
    """Exit code and error of the attempt: as rank 0 recorded it, else from the result of the ranks."""
    outcome = read_json(run_dir.outcome)
    if "exit_code" in outcome:
        return int(outcome["exit_code"]), outcome.get("error")
    manifest = read_json(run_dir.manifest)
    if result.code == EXIT_STOPPED:
        write_json(run_dir.manifest, {**manifest, "state": "stopped", "exit_code": EXIT_STOPPED})
        log.info("stopped before a new checkpoint was complete; %s", run_dir.describe_restart())
        return EXIT_STOPPED, result.error
    error = result.error or f"the ranks recorded no outcome (exit code of their launcher: {result.code})"
    if run_dir.stack_traces.is_dir():
        error += f"; stack traces: {run_dir.stack_traces}"
    code = EXIT_USER if result.user_error else EXIT_ERROR
    write_json(run_dir.manifest, {**manifest, "state": "failed", "exit_code": code, "error": error})
    if result.user_error:
        return code, error
    return code, f"{run_dir.path}: {error}. See the log above and in {run_dir.log}; {run_dir.describe_restart()}"


def dry_run_command(plan: Plan, run_dir: RunDir) -> str:
    """The command that would start the ranks, for `--dry-run`."""
    return shlex.join(command.launch(plan, run_dir))
