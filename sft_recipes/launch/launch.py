"""Runs a plan: data preparation, sanity check, ranks, result. Stays the parent of all, for signals and exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sft_recipes.launch import attempts, command, node_checks, process_group, ranks, run_lock, sanity_check
from sft_recipes.launch.attempts import Attempt
from sft_recipes.launch.node_exchange import NodeMissingError
from sft_recipes.launch.outcome import record_folder, write_record
from sft_recipes.launch.placement import Placement
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.run_selection import Resolved, RunRequest, select
from sft_recipes.launch.stop_request import StoppedError, handle_stop_signals
from sft_recipes.launch.topology import check_disk
from sft_recipes.launch.watchdog import LaunchResult
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime import env as variables
from sft_recipes.runtime.errors import SetupError, UserError
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, EXIT_USER, RunDir, read_json, write_json

log = logging.getLogger(__name__)


def start_run(
    request: RunRequest, placement: Placement | None, trains: bool, resolve: Callable[[], Resolved], dry_run: bool
) -> int:
    """Select a run and prepare its attempt, and train it here unless it has several nodes; return the exit code.

    Args:
        placement: this node's place; None outside of a job.
        trains: False for `prepare`.
        resolve: resolves the recipe.

    Raises:
        UserError: the plan does not fit, or not to the run.
    """
    with handle_stop_signals() as stop_request:
        try:
            if request.name is not None and (placement or not trains):
                run_lock.wait_until_free(RunDir.named(request.name), stop_request)
            resolved = resolve()
        except StoppedError:
            log.info("stopped before the start; no step was taken. Run the same command to start again")
            return EXIT_STOPPED
        plan = resolved.plan
        start = select(plan, replace(request, replan=resolved.replan), run_lock.locked_runs())
        run_dir = start.run_dir
        if (code := _finished(run_dir)) is not None:
            return code
        if dry_run:
            print(shlex.join(command.launch(plan, run_dir, placement=placement if plan.nodes > 1 else None)))
            return 0
        if trains:
            node_checks.check_gpus(plan)
        check_disk(plan, run_dir)
        context = RunContext(run_dir, start.plan, stop_request, resolved.suggest_cheaper)
        identifier = placement.attempt if placement else os.environ.get("SFT_RECIPES_ATTEMPT") or "manual"
        attempt = Attempt(identifier, plan.nodes, tuple(sys.argv[2:]), start.resumes, request.name is not None)
        with run_lock.lock(run_dir):
            in_job = placement if trains and os.environ.get("SFT_RECIPES_LOGS") else None
            code = node_checks.check_all_nodes(context, in_job.name) if in_job else 0
            code = code or _run_attempt(context, attempt, trains, request.resume)
            if in_job and run_dir.path.is_dir():
                in_job.records = record_folder(run_dir.path, in_job.attempt)
                write_record(in_job, code, stop_request.signals)
    if not trains and not code and not placement:
        log.info(f"prepared {run_dir.path}: start the same command with `train` on each of {plan.nodes} nodes")
    return code


def _finished(run_dir: RunDir) -> int | None:
    """Return the exit code of a finished run; None for one to start or resume."""
    if run_dir.state() != "finished":
        return None
    if not run_dir.final.is_dir():
        log.info(f"{run_dir.path} is finished, but {run_dir.final} is missing: writing it again")
        return None
    log.info(f"{run_dir.path} is finished; its model is in {run_dir.final} (start another run with NAME=…)")
    return int(read_json(run_dir.manifest).get("exit_code", 0))


def _run_attempt(context: RunContext, attempt: Attempt, trains: bool, explicit_resume: bool) -> int:
    """Prepare an attempt of a run, and train it here unless it has several nodes; return the exit code.

    Raises:
        SetupError: the prepared data does not suit the plan, or differs from the data of the run's earlier attempts.
    """
    run_dir = context.run_dir
    if not explicit_resume and (code := attempts.check_progress(run_dir)):
        return code
    attempts.record_attempt(run_dir)
    attempts.write(run_dir, attempt)
    try:
        code = _prepare_run(context, attempt)
        if code == 0 and not trains:
            return 0
        code = code or train_run(context, attempts.read(run_dir))
    except UserError:
        attempts.conclude(run_dir, attempt, EXIT_USER)
        raise
    return attempts.conclude(run_dir, attempt, code)


def _prepare_run(context: RunContext, attempt: Attempt) -> int:
    """Prepare the data and settle the plan; return 0 or the exit code."""
    run_dir, plan_file = context.run_dir, context.run_dir.next_plan
    stored = plans.read(run_dir.plan) if attempt.resumes else None
    plans.write(stored or context.plan, run_dir.plan)
    plans.write(context.plan, plan_file)
    run_dir.outcome.unlink(missing_ok=True)
    shutil.rmtree(record_folder(run_dir.path, attempt.id), ignore_errors=True)
    if code := prepare_data(context, plan_file):
        return code
    settled = _settle(context.plan, stored, read_json(run_dir.prepared))
    plans.write(settled, plan_file)
    command.write_accelerate_config(settled, run_dir)
    is_cached = not variables.sanity_is_skipped() and sanity_check.cached_result(settled).is_file()
    attempts.write(run_dir, replace(attempt, prepared=True, sanity_cached=is_cached))
    return 0


def train_node(name: str, placement: Placement, suggest_cheaper: Callable[[Plan], list[str]]) -> int:
    """Train a prepared run on this node, in lockstep with the launchers of the other nodes; return the exit code, which
    the exit record also has.

    Raises:
        SetupError: the run is not prepared, or with other arguments.
    """
    run_dir = RunDir.named(name)
    if not placement.is_first:
        logging.getLogger("sft_recipes").setLevel(logging.ERROR)  # node 0 prints what is the same on all nodes
    placement.records = record_folder(run_dir.path, placement.attempt)
    if (code := _finished(run_dir)) is not None:
        write_record(placement, code, [])
        return code
    attempt, code, error, lost_peer, arguments = None, EXIT_ERROR, None, False, sys.argv[2:]
    with handle_stop_signals() as stop_request, contextlib.ExitStack() as lock:
        try:
            _, plan = attempts.open_prepared(run_dir, placement, arguments)
            lock.enter_context(run_lock.lock(run_dir, shared=True, writes_holder=placement.is_first))
            attempt, plan = attempts.open_prepared(run_dir, placement, arguments)  # not that of a later attempt
            context = RunContext(run_dir, plan, stop_request, lambda: suggest_cheaper(plan), placement)
            code = node_checks.check_all_nodes(context, placement.name) or train_run(context, attempt)
        except UserError as wrong:
            code, error = EXIT_USER, str(wrong)
            raise
        except StoppedError:
            code = EXIT_STOPPED
            log.info("stopped before training; no step was taken. Run the same command to start again")
        except NodeMissingError as missing:
            error, lost_peer = str(missing), True
            log.error(error)
        finally:
            if attempt and placement.is_first:
                code = attempts.conclude(run_dir, attempt, code)
            if run_dir.path.is_dir():
                write_record(placement, code, stop_request.signals, error, lost_peer)
    return code


def train_run(context: RunContext, attempt: Attempt) -> int:
    """Run the sanity check and the ranks of a prepared attempt, and return the exit code. Call on every node."""
    run_dir = context.run_dir
    context = context.within(run_dir, plans.read(run_dir.next_plan))
    if code := _check_sanity(context, attempt):
        return code
    if context.is_first_node:
        plans.write(context.plan, run_dir.plan)
        for leftover in (run_dir.ranks, run_dir.stack_traces):
            shutil.rmtree(leftover, ignore_errors=True)
        log.info(_start_message(run_dir, attempt, context.plan))
    if code := context.agree():  # node 0 has written the files
        return code
    if context.is_first_node:
        run_dir.next_plan.unlink()  # now the run has started
    result = ranks.run_ranks(context, "training.main")
    if not context.is_first_node:
        return result.code or int(read_json(run_dir.outcome).get("exit_code", 0))
    code, error = _read_outcome(run_dir, result)
    if error:
        log.error(error)
    if read_json(run_dir.outcome).get("out_of_memory"):
        changes = context.suggest_cheaper()
        write_json(run_dir.manifest, {**read_json(run_dir.manifest), "takes_less": changes})
        log.info("to reduce memory, cheapest first: %s", "; or ".join(changes))
    return code


def _check_sanity(context: RunContext, attempt: Attempt) -> int:
    """Run the sanity check unless a result is cached, and record the result's path in the run directory."""
    if variables.sanity_is_skipped():
        result: dict[str, object] = {"skipped": True}
    elif not attempt.sanity_cached and (code := sanity_check.run(context, context.run_dir.prepared)):
        return code
    else:
        result = {"result": str(sanity_check.cached_result(context.plan))}
    if context.is_first_node:
        write_json(context.run_dir.sanity, result)
        if attempt.sanity_cached and "result" in result:
            log.info("sanity check passed (cached: %s)", result["result"])
    return 0


def run_sanity_check(plan: Plan, suggest_cheaper: Callable[[], list[str]]) -> int:
    """Prepare a plan's data and run the sanity check, even if a result is cached; creates no run.

    Raises:
        SetupError: the prepared data does not suit the plan.
    """
    results = sanity_check.results_folder()  # on the disk of the runs, which the trial tests too
    with tempfile.TemporaryDirectory(prefix="trial-", dir=results) as directory, handle_stop_signals() as stop_request:
        run_dir = RunDir(Path(directory))
        context = RunContext(run_dir, plan, stop_request, suggest_cheaper)
        plans.write(plan, run_dir.plan)
        if code := prepare_data(context, run_dir.plan):
            return code
        settled = context.within(run_dir, _settle(plan, None, read_json(run_dir.prepared)))
        return sanity_check.run(settled, run_dir.prepared)


def prepare_data(context: RunContext, plan_file: Path) -> int:
    """Prepare the data of the plan in a file, and return 0 or the exit code."""
    plan = context.plan
    setting = f"{render.describe_ranks(plan)}, effective batch {plan.effective_batch_size}"
    log.info(f"{plan.recipe}: {plan.model}; {setting}; preparing the data")
    program = [sys.executable, "-m", "sft_recipes.data.prepare", str(plan_file)]
    code = process_group.run(program, command.environment(context.plan, os.environ), context.stop_request)
    if code == EXIT_STOPPED:
        log.info("stopped during data preparation, before training; run the same command to start again")
    return code if code in (0, EXIT_USER, EXIT_STOPPED) else EXIT_ERROR


def _start_message(run_dir: RunDir, attempt: Attempt, plan: Plan) -> str:
    step = run_dir.latest_complete()
    start = f"{'resuming' if attempt.resumes else 'starting'} {run_dir.path}"
    start += f" from checkpoint-{step}" if step else ""
    batch = f"effective batch {plan.effective_batch_size}, {render.describe_ranks(plan)}"
    dropped = f"{plan.dropped_rows_per_epoch} of {plan.rows} rows dropped per epoch (drop_last, reshuffled each epoch)"
    return f"{start}: {plan.optimizer_steps} optimizer steps, {batch}; {dropped}"


def _settle(plan: Plan, stored: Plan | None, prepared: dict[str, object]) -> Plan:
    settled = plans.with_prepared_data(plan, Prepared(**prepared))  # type: ignore[arg-type]
    change = plans.find_differences(stored, settled).get("data_fingerprint") if stored else None
    if change and "data_fingerprint" not in plan.allowed_changes:
        raise SetupError(f"{data_changed_message(plan, *change)}, or set ALLOW_CHANGE=data_fingerprint or NAME=…")
    return settled


def data_changed_message(plan: Plan, before: str | None, now: str | None) -> str:
    """Error if a run's data has changed, with the first fix."""
    named = ", ".join(source.path for source in plan.sections.data.sources("train"))
    return f"data.train: {named} changed since the run started (data_fingerprint {before} -> {now}). Restore the data"


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
    code, error = result.code or EXIT_ERROR, result.error or "the ranks recorded no outcome"
    if run_dir.stack_traces.is_dir():
        error += f"; stack traces: {run_dir.stack_traces}"
    write_json(run_dir.manifest, {**manifest, "state": "failed", "exit_code": code, "error": error})
    if code == EXIT_USER:
        return code, error
    return code, f"{run_dir.path}: {error}. See the log above and in {run_dir.log}; {run_dir.describe_restart()}"
