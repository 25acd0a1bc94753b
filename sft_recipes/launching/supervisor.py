"""Carries a start through: lock, data, ranks, outcome. Stays as the parent, so that signals and exit codes pass."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from sft_recipes.launching import command, gate, process
from sft_recipes.planning import environment as variables
from sft_recipes.planning import plan as plans
from sft_recipes.planning import show
from sft_recipes.planning.plan import Plan, Prepared
from sft_recipes.planning.run_folder import (
    EXIT_FAULT,
    EXIT_STOPPED,
    EXIT_USER,
    RunFolder,
    Start,
    read_json,
    write_json,
)
from sft_recipes.planning.schema import RecipeError


def carry_out(start: Start, say: Callable[[str], None], lighter: Callable[[], list[str]]) -> int:
    """Runs the plan to its end and returns the exit code of the contract.

    Args:
        say: shows a line to the user.
        lighter: the cheapest changes that take less memory, asked for where it ran out.

    Raises:
        RecipeError: the prepared data does not make a run, or it is not the data that the run began with.
    """
    folder, plan = start.folder, start.plan
    stored = plans.read(folder.plan) if start.goes_on else None
    environment = command.environment(plan, os.environ)
    plans.write(plan if stored is None else stored, folder.plan)
    incoming = folder.path / "plan.next.json"
    plans.write(plan, incoming)
    code = _prepare(incoming, environment)
    if code:
        incoming.unlink()
        _forget(folder, start)
        return code
    try:
        settled = _settle(plan, stored, read_json(folder.prepared))
    except RecipeError:
        incoming.unlink()
        _forget(folder, start)
        raise
    plans.write(settled, folder.plan)
    incoming.unlink()
    folder.outcome.unlink(missing_ok=True)
    code = _sanity(settled, folder, say, lighter)
    if code:
        _forget(folder, start)
        return code
    command.write_engine(settled, folder)
    say(_announcement(start, settled))
    shutil.rmtree(folder.ranks, ignore_errors=True)
    code = _exit_code(folder, process.run(command.launch(settled, folder), environment, folder.ranks))
    if code == EXIT_USER:
        _forget(folder, start)
    if read_json(folder.outcome).get("out_of_memory"):
        takes_less = lighter()
        write_json(folder.manifest, {**read_json(folder.manifest), "takes_less": takes_less})
        say(f"the cheapest changes that take less: {'; or '.join(takes_less)}")
    return code


def _sanity(plan: Plan, folder: RunFolder, say: Callable[[str], None], lighter: Callable[[], list[str]]) -> int:
    """Has the plan tried where nothing has tried it yet; what became of that is written into the run's folder."""
    if variables.sanity_is_skipped():
        write_json(folder.sanity, {"skipped": True})
        return 0
    receipt = gate.receipt(plan)
    code = 0 if receipt.is_file() else gate.carry_out(plan, folder.prepared, say, lighter)
    if not code:
        write_json(folder.sanity, {"receipt": str(receipt)})
    return code


def try_out(plan: Plan, say: Callable[[str], None], lighter: Callable[[], list[str]]) -> int:
    """Prepares a plan's data and has the plan tried, whether it was before or not; leaves a receipt and no run.

    Raises:
        RecipeError: the prepared data does not make a run.
    """
    with tempfile.TemporaryDirectory(prefix="sft-") as place:
        folder = RunFolder(Path(place))
        plans.write(plan, folder.plan)
        code = _prepare(folder.plan, command.environment(plan, os.environ))
        return code or gate.carry_out(_settle(plan, None, read_json(folder.prepared)), folder.prepared, say, lighter)


def _prepare(plan: Path, environment: Mapping[str, str]) -> int:
    """Prepares the data of the plan in a file; 0, or the exit code of the contract."""
    code = process.run(command.prepare(plan), environment)
    return code if code in (0, EXIT_USER, EXIT_STOPPED) else EXIT_FAULT


def _announcement(start: Start, plan: Plan) -> str:
    begins = "going on with" if start.goes_on else "starting"
    return (
        f"{begins} {start.folder.path}: {plan.optimizer_steps} optimizer steps of {plan.effective_batch_size} rows, "
        f"{show.engine_and_ranks(plan)}; of {plan.rows} rows, "
        f"{plan.rows_left_out_of_an_epoch} are left out of each epoch, other ones each time"
    )


def _settle(plan: Plan, stored: Plan | None, found: dict[str, object]) -> Plan:
    settled = plans.settle(plan, Prepared(**found))  # type: ignore[arg-type]
    if stored is not None and "data_fingerprint" not in plan.accepted:
        change = plans.differences(stored, settled).get("data_fingerprint")
        if change:
            raise RecipeError(
                f"data.train: {plan.sections['data']['train']} is no longer the data that this run began with "
                f"(data_fingerprint {change[0]} -> {change[1]}); put it back, go on all the same with "
                f"ACCEPT=data_fingerprint, or begin a run of its own: NAME=…"
            )
    return settled


def _forget(folder: RunFolder, start: Start) -> None:
    """Takes the folder of a run that never began away again, so that the corrected command is not another plan's."""
    if not start.goes_on and not folder.numbered("checkpoint"):
        shutil.rmtree(folder.path)


def _exit_code(folder: RunFolder, launcher_code: int) -> int:
    """The code of the outcome that rank 0 recorded; the launcher's own makes every failure 1."""
    outcome = read_json(folder.outcome)
    if "exit_code" in outcome:
        if outcome.get("error"):
            print(f"error: {outcome['error']}", file=sys.stderr)
        return int(outcome["exit_code"])
    if launcher_code == EXIT_STOPPED:
        print(f"stopped before a new checkpoint was whole; the same command goes on with {folder.name}")
        return EXIT_STOPPED
    manifest = read_json(folder.manifest)
    error = f"the run ended without an outcome (launcher's exit code {launcher_code})"
    write_json(folder.manifest, {**manifest, "state": "failed", "exit_code": EXIT_FAULT, "error": error})
    print(
        f"error: {folder.path}: {error}; what it said last is above and in {folder.log}; the same command goes on from "
        f"its newest checkpoint",
        file=sys.stderr,
    )
    return EXIT_FAULT


def shell_line(plan: Plan, folder: RunFolder) -> str:
    """What DRY_RUN=1 prints: the command that would start the ranks."""
    return shlex.join(command.launch(plan, folder))
