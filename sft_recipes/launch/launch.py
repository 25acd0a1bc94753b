"""Carries a start through: lock, data, ranks, outcome. Stays as the parent, so that signals and exit codes pass."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from sft_recipes.launch import attempts, command, process_group, ranks, sanity_check
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.process_group import StopRequest
from sft_recipes.launch.run_selection import Start
from sft_recipes.launch.watchdog import Ended
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime import env as variables
from sft_recipes.runtime.errors import SetupError, UserError
from sft_recipes.runtime.run_dir import (
    EXIT_FAULT,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    EXIT_USER,
    RunDir,
    read_json,
    write_json,
)


def carry_out(
    start: Start, say: Callable[[str], None], lighter: Callable[[], list[str]], peers: NodeLaunchers | None = None
) -> int:
    """Runs the plan to its end and returns the exit code of the contract.

    Args:
        say: shows a line to the user.
        lighter: the cheapest changes that take less memory, asked for where it ran out.
        peers: the parents on the other nodes, which this one leads.

    Raises:
        SetupError: the prepared data does not make a run, or it is not the data that the run began with.
    """
    if refused := attempts.refusal(start):
        return process_group.fail(refused, EXIT_NO_PROGRESS)
    with process_group.listening() as asked:
        return _carry_out(start, say, lighter, asked, peers)


def _carry_out(
    start: Start,
    say: Callable[[str], None],
    lighter: Callable[[], list[str]],
    asked: StopRequest,
    peers: NodeLaunchers | None,
) -> int:
    folder, plan = start.folder, start.plan
    stored = plans.read(folder.plan) if start.goes_on else None
    plans.write(plan if stored is None else stored, folder.plan)
    incoming = folder.path / "plan.next.json"
    plans.write(plan, incoming)
    code = prepare(incoming, command.environment(plan, os.environ), asked, peers)
    if code:
        incoming.unlink()
        _forget(folder, start)
        return code
    try:
        settled = _settle(plan, stored, read_json(folder.prepared))
    except UserError:
        incoming.unlink()
        _forget(folder, start)
        raise
    incoming.unlink()
    folder.outcome.unlink(missing_ok=True)
    code = _sanity(settled, folder, say, lighter, asked, peers)
    if code:
        _forget(folder, start)
        return code
    plans.write(settled, folder.plan)  # not before: what a trial refuses is not what the run goes on with
    say(_announcement(start, settled))
    code = _train(folder, settled, asked, peers)
    if code == EXIT_USER:
        _forget(folder, start)
    if read_json(folder.outcome).get("out_of_memory"):
        takes_less = lighter()
        write_json(folder.manifest, {**read_json(folder.manifest), "takes_less": takes_less})
        say(f"the cheapest changes that take less: {'; or '.join(takes_less)}")
    return code


def _train(folder: RunDir, plan: Plan, asked: StopRequest, peers: NodeLaunchers | None) -> int:
    """Starts the ranks, and the exit code of how they ended."""
    for of_before in (folder.ranks, folder.stack_traces):
        shutil.rmtree(of_before, ignore_errors=True)
    attempts.count(folder)
    ended = ranks.carry_out(plan, folder, "training.main", asked, peers)
    code, error = _outcome(folder, ended)
    if code in (0, EXIT_USER, EXIT_STOPPED):
        attempts.forgive(folder)
    elif exhausted := attempts.exhausted(folder):
        code, error = EXIT_NO_PROGRESS, exhausted
    return process_group.fail(error, code) if error else code


def _sanity(
    plan: Plan,
    folder: RunDir,
    say: Callable[[str], None],
    lighter: Callable[[], list[str]],
    asked: StopRequest,
    peers: NodeLaunchers | None,
) -> int:
    """Has the plan tried where nothing has tried it yet; what became of that is written into the run's folder."""
    if variables.sanity_is_skipped():
        write_json(folder.sanity, {"skipped": True})
        return 0
    receipt = sanity_check.receipt(plan)
    code = 0 if receipt.is_file() else sanity_check.carry_out(plan, folder.prepared, say, lighter, asked, peers)
    if not code:
        write_json(folder.sanity, {"receipt": str(receipt)})
    return code


def try_out(
    plan: Plan, say: Callable[[str], None], lighter: Callable[[], list[str]], peers: NodeLaunchers | None = None
) -> int:
    """Prepares a plan's data and has the plan tried, whether it was before or not; leaves a receipt and no run.

    Raises:
        SetupError: the prepared data does not make a run.
    """
    with tempfile.TemporaryDirectory(prefix="sft-") as place, process_group.listening() as asked:
        folder = RunDir(Path(place))
        plans.write(plan, folder.plan)
        code = prepare(folder.plan, command.environment(plan, os.environ), asked, peers)
        if code:
            return code
        settled = _settle(plan, None, read_json(folder.prepared))
        return sanity_check.carry_out(settled, folder.prepared, say, lighter, asked, peers)


def prepare(plan: Path, environment: Mapping[str, str], asked: StopRequest, peers: NodeLaunchers | None = None) -> int:
    """Prepares the data of the plan in a file; 0, or the exit code of the contract."""
    code = process_group.run(
        command.prepare(plan), environment, asked, meanwhile=peers.any_node_lost if peers else None
    ).code
    if peers and (lost := peers.request_requeue_if_lost()):
        return process_group.fail(lost, EXIT_STOPPED)
    if code == EXIT_STOPPED:
        print("stopped while the data was prepared; nothing was trained, and the same command begins again")
    return code if code in (0, EXIT_USER, EXIT_STOPPED) else EXIT_FAULT


def _announcement(start: Start, plan: Plan) -> str:
    begins = "going on with" if start.goes_on else "starting"
    return (
        f"{begins} {start.folder.path}: {plan.optimizer_steps} optimizer steps of {plan.effective_batch_size} rows, "
        f"{render.engine_and_ranks(plan)}; of {plan.rows} rows, "
        f"{plan.dropped_rows_per_epoch} are left out of each epoch, other ones each time"
    )


def _settle(plan: Plan, stored: Plan | None, found: dict[str, object]) -> Plan:
    settled = plans.settle(plan, Prepared(**found))  # type: ignore[arg-type]
    if stored is not None and "data_fingerprint" not in plan.accepted:
        change = plans.differences(stored, settled).get("data_fingerprint")
        if change:
            raise SetupError(
                f"{other_data(plan, *change)}, go on all the same with ALLOW_CHANGE=data_fingerprint, or begin a run "
                f"of its own: NAME=…"
            )
    return settled


def other_data(plan: Plan, before: str | None, now: str | None) -> str:
    """What is said where a run's data has changed under it, and the first way out."""
    return (
        f"data.train: {plan.sections.data.train} is no longer the data that this run began with "
        f"(data_fingerprint {before} -> {now}); put it back"
    )


def _forget(folder: RunDir, start: Start) -> None:
    """Takes the folder of a run that never began away again, so that the corrected command is not another plan's."""
    if not start.goes_on and not folder.numbered("checkpoint"):
        shutil.rmtree(folder.path)


def _outcome(folder: RunDir, ended: Ended) -> tuple[int, str | None]:
    """How a start ended, by its exit code and the line on what was wrong: as rank 0 recorded it, else as it was seen
    from here."""
    recorded = read_json(folder.outcome)
    if "exit_code" in recorded:
        return int(recorded["exit_code"]), recorded.get("error")
    manifest = read_json(folder.manifest)
    if ended.code == EXIT_STOPPED:
        write_json(folder.manifest, {**manifest, "state": "stopped", "exit_code": EXIT_STOPPED})
        print(f"stopped before a new checkpoint was whole; the same command goes on with {folder.name}")
        return EXIT_STOPPED, ended.fault
    error = ended.fault or f"the run ended without an outcome (launcher's exit code {ended.code})"
    if folder.stack_traces.is_dir():
        error += f"; what each rank was doing is in {folder.stack_traces}"
    code = EXIT_USER if ended.by_user else EXIT_FAULT
    write_json(folder.manifest, {**manifest, "state": "failed", "exit_code": code, "error": error})
    if ended.by_user:
        return code, error
    return code, (
        f"{folder.path}: {error}; what it said last is above and in {folder.log}; the same command goes on from its "
        f"newest checkpoint"
    )


def shell_line(plan: Plan, folder: RunDir) -> str:
    """What DRY_RUN=1 prints: the command that would start the ranks."""
    return shlex.join(command.launch(plan, folder))
