"""Carries a start through: lock, data, ranks, outcome. Stays as the parent, so that signals and exit codes pass."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sft_recipes.launching import command, gate, process
from sft_recipes.planning import environment as variables
from sft_recipes.planning import plan as plans
from sft_recipes.planning.plan import Plan, Prepared
from sft_recipes.planning.run_folder import (
    EXIT_STOPPED,
    RunFolder,
    Start,
    read_json,
    runs_root,
    write_json,
)
from sft_recipes.planning.schema import RecipeError

EXIT_FAULT, EXIT_USER = 1, 2


@contextlib.contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Holds the run for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        RecipeError: another live process holds it, or the folder cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = folder.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"NAME: {folder.path} cannot be written ({error.strerror}); make it writable, or say "
            "RUNS_DIR=<another folder>"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(
                f"NAME: {folder.name} is being carried out by {_holder(folder.lock)}; wait for it"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def held_by() -> dict[str, str]:
    """The runs that a live process holds, each with that process."""
    holders = {}
    for path in runs_root().glob("*/.lock"):
        with path.open("r", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holders[path.parent.name] = _holder(path)
    return holders


def carry_out(start: Start, say: Callable[[str], None]) -> int:
    """Runs the plan to its end and returns the exit code of the contract.

    Raises:
        RecipeError: the prepared data does not make a run, or it is not the data that the run began with.
    """
    folder, plan = start.folder, start.plan
    stored = plans.read(folder.plan) if start.goes_on else None
    environment = command.environment(plan, os.environ)
    plans.write(plan if stored is None else stored, folder.plan)
    incoming = folder.path / "plan.next.json"
    plans.write(plan, incoming)
    code = process.run(command.prepare(incoming), environment)
    if code:
        incoming.unlink()
        _forget(folder, start)
        return code if code in (EXIT_USER, EXIT_STOPPED) else EXIT_FAULT
    try:
        settled = _settle(plan, stored, read_json(folder.prepared))
    except RecipeError:
        incoming.unlink()
        _forget(folder, start)
        raise
    plans.write(settled, folder.plan)
    incoming.unlink()
    code = _sanity(settled, folder, say)
    if code:
        _forget(folder, start)
        return code
    command.write_engine(settled, folder)
    folder.outcome.unlink(missing_ok=True)
    say(_announcement(start, settled))
    shutil.rmtree(folder.ranks, ignore_errors=True)
    code = _exit_code(folder, process.run(command.launch(settled, folder), environment, folder.ranks))
    if code == EXIT_USER:
        _forget(folder, start)
    return code


def _sanity(plan: Plan, folder: RunFolder, say: Callable[[str], None]) -> int:
    """Has the plan tried where nothing has tried it yet; what became of that is written into the run's folder."""
    skipped, receipt = variables.sanity_is_skipped(), gate.receipt(plan)
    found = receipt.is_file()
    if not skipped and not found:
        code = gate.carry_out(plan, folder.prepared, say)
        if code:
            return code
    write_json(folder.sanity, {"skipped": True} if skipped else {"receipt": str(receipt)})
    return 0


def try_out(plan: Plan, say: Callable[[str], None]) -> int:
    """Prepares a plan's data and has the plan tried, whether it was before or not; leaves a receipt and no run.

    Raises:
        RecipeError: the prepared data does not make a run.
    """
    folder = RunFolder(runs_root() / ".sanity" / f"prepare.{os.getpid()}")
    folder.path.mkdir(parents=True, mode=0o700)
    try:
        plans.write(plan, folder.plan)
        code = process.run(command.prepare(folder.plan), command.environment(plan, os.environ))
        if code:
            return code if code in (EXIT_USER, EXIT_STOPPED) else EXIT_FAULT
        return gate.carry_out(_settle(plan, None, read_json(folder.prepared)), folder.prepared, say)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def _announcement(start: Start, plan: Plan) -> str:
    begins = "going on with" if start.goes_on else "starting"
    ranks = "GPU" if plan.uses_gpu else "CPU process"
    several = ("s" if plan.uses_gpu else "es") if plan.world_size > 1 else ""
    return (
        f"{begins} {start.folder.path}: {plan.optimizer_steps} optimizer steps of {plan.effective_batch_size} rows, "
        f"{plan.parallelism} on {plan.world_size} {ranks}{several}; of {plan.rows} rows, "
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
    write_json(folder.manifest, {**manifest, "state": "failed", "exit_code": EXIT_FAULT})
    print(
        f"error: {folder.path}: the run ended without an outcome (launcher's exit code {launcher_code}); what it said "
        f"last is above and in {folder.log}; the same command goes on from its newest checkpoint",
        file=sys.stderr,
    )
    return EXIT_FAULT


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


def shell_line(plan: Plan, folder: RunFolder) -> str:
    """What DRY_RUN=1 prints: the command that would start the ranks."""
    return shlex.join(command.launch(plan, folder))
