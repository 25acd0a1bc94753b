"""Selects the run directory of an attempt: a new one, or that of an unfinished run, which it resumes; and the run whose
last weights a new one starts from (INIT_FROM)."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.planner import rank_change
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import library_version
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, all_runs, find, read_json, runs_root, write_json

log = logging.getLogger(__name__)
# Files of an attempt that was killed before it had a plan.
_WITHOUT_PLAN = (".lock", "plan.json.partial", "exits", "manifest.json")
# Values that are equal in runs of the same model and data, by the names of a plan; most telling first.
_MODEL_KEYS = ["name_or_path", "revision", "from_scratch", "architecture"]
_DATA_KEYS = ["train", "validation", "retention_eval", "revision", "overfit_rows"]
_INPUTS = (
    *("method", "init_from.run", "model"),
    *(f"sections.model.{key}" for key in _MODEL_KEYS),
    *(f"sections.data.{key}" for key in _DATA_KEYS),
)
# What weights, tokenizer and template depend on, by the names of a plan.
_WEIGHTS_KEYS = ["name_or_path", "revision", "from_scratch", "architecture", "chat_template", "add_tokens"]
_SAME_AS_PARENT = ("method", "model", "sections.lora", *(f"sections.model.{key}" for key in _WEIGHTS_KEYS))


@dataclass(frozen=True)
class RunStart:
    """An attempt that is about to start.

    Attributes:
        resumes: whether it resumes an unfinished run.
    """

    run_dir: RunDir
    plan: Plan
    resumes: bool


@dataclass(frozen=True)
class RunRequest:
    """Options of `train` about the run.

    Attributes:
        resume: fail if there is no run to resume.
        allow_change: keys of the plan that may differ from the run's plan.
        strict_versions: fail if library versions differ from those of the latest attempt.
        replan: resolve the recipe again with this parallelism, which it leaves open.
    """

    name: str | None = None
    resume: bool = False
    allow_change: tuple[str, ...] = ()
    strict_versions: bool = False
    replan: Callable[[str], Plan] | None = None


@dataclass(frozen=True)
class Resolved:
    """A recipe resolved on this machine.

    Attributes:
        suggest_cheaper: returns the cheapest changes that need less memory, as `key=value`.
        replan: resolves the recipe again with this parallelism; None unless it leaves that open.
    """

    plan: Plan
    suggest_cheaper: Callable[[], list[str]]
    replan: Callable[[str], Plan] | None


def select(plan: Plan, request: RunRequest, locked: dict[str, str]) -> RunStart:
    """Select the run directory for a plan, and print which runs it skips and what has changed.

    Args:
        locked: names of runs that a live process holds, with that process.

    Raises:
        SetupError: the run has another plan or is in use, or `--resume` finds nothing to resume.
    """
    if request.name is not None:
        return _select_named(plan, RunDir.named(request.name), request, locked)
    usable = [run for run in _numbered(plan.recipe) if os.access(run.path, os.R_OK | os.W_OK | os.X_OK)]
    left = []
    for run in (run for run in usable if not run.path.is_symlink()):
        _restore_plan(run)
    for run in reversed(all_runs(plan.recipe)):
        if run.name in locked:
            log.info(f"skipping {run.name}: in use by {locked[run.name]}")
        elif run.path.is_symlink():
            log.info(f"skipping {run.name}: a symbolic link, not a run directory")
        elif run.state() == "finished":
            continue
        elif other := _other_inputs(plans.read(run.plan), plan):
            left.append(f"not resuming {run.name}: {other}. Resume it with its own settings and NAME={run.name}")
        else:
            return _resume(plan, run, request)
    if request.resume:
        fix = left[0] if left else "Start one without RESUME"
        raise SetupError(f"RESUME: no unfinished run of {plan.recipe} with this model and data. {fix}")
    if left:
        log.info(left[0])
    number = 1 + max((int(run.name.rpartition("-")[2]) for run in _numbered(plan.recipe)), default=0)
    return _start_new(RunDir(runs_root() / f"{plan.recipe}-{number}"), plan)


def _select_named(plan: Plan, run: RunDir, request: RunRequest, locked: dict[str, str]) -> RunStart:
    if run.name in locked:
        raise SetupError(f"NAME: {run.name} is in use by {locked[run.name]}. Wait for it, or set another NAME")
    if run.path.is_symlink():
        raise SetupError(f"NAME: {run.path} is a symbolic link, not a run directory. Set another NAME or RUNS_DIR")
    _restore_plan(run)
    if run.plan.is_file():
        return _resume(plan, run, request)
    if run.path.exists() and any(path.name not in _WITHOUT_PLAN for path in run.path.iterdir()):
        raise SetupError(f"NAME: {run.path} exists and is not a run. Nothing is overwritten: set another NAME")
    if request.resume:
        raise SetupError(f"RESUME: {run.path} has no run to resume. Start one without RESUME")
    return _start_new(run, plan)


def _start_new(run: RunDir, plan: Plan) -> RunStart:
    return RunStart(run, replace(plan, run_id=secrets.token_hex(8)), False)


def _resume(plan: Plan, run: RunDir, request: RunRequest) -> RunStart:
    stored, finished = plans.read(run.plan), run.state() == "finished"
    if request.replan and not plan.strategy.reads_checkpoints_of(stored.strategy):
        plan = request.replan(rank_change.resuming_strategy(stored.strategy).name)
        if plan.fits is False and not finished:
            shortage = f"its {plan.parallelism} {plans.describe_shortage(plan)}"
            raise SetupError(f"run {run.name} cannot resume here: {shortage}. Use larger GPUs, or another NAME=…")
    differences = plans.find_differences(stored, plan)
    if run.numbered("checkpoint") and (reason := rank_change.incompatibility(rank_change.ranks_of(stored), plan)):
        raise SetupError(f"run {run.name} cannot resume: {reason}")
    followed = rank_change.implied_changes(stored, plan)
    changes = {_user_key(key): change for key, change in differences.items() if key not in followed}
    rejected = {
        key: change for key, change in changes.items() if finished or not _is_allowed(key, request.allow_change)
    }
    if rejected:
        state, fix = "is finished and has", "Start a new run with NAME=…"
        if not finished:
            state, fix = "has", f"Resume it with ALLOW_CHANGE={','.join(rejected)}, or start a new run with NAME=…"
        raise SetupError(f"run {run.name} {state} another plan: {_list_changes(rejected)}. {fix}")
    keys = [_user_key(key) for key in plans.flat_values(plan)]
    if unknown := [name for name in request.allow_change if not any(_is_allowed(key, (name,)) for key in keys)]:
        raise SetupError(f"ALLOW_CHANGE: {unknown[0]!r} is not a key of a plan. Use keys listed as changed")
    accepted = sorted({*stored.allowed_changes, *differences, *request.allow_change})
    resumed = replace(plan, created=stored.created, run_id=stored.run_id, allowed_changes=accepted)
    if ranks := {key: differences[key] for key in sorted(followed)}:
        log.info(f"changed since the last attempt, same effective batch: {_list_changes(ranks)}")
    check_versions(run, request.strict_versions)
    return RunStart(run, resumed, True)


def _other_inputs(stored: Plan, plan: Plan) -> str:
    """Return the first difference between model or data of a run and of the plan; empty if there is none."""
    differences = plans.find_differences(stored, plan)
    changed = (key for name in _INPUTS for key in differences if key.startswith(name))
    return next((_list_changes({_user_key(key): differences[key]}) for key in changed), "")


def _list_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())


def _user_key(key: str) -> str:
    """A key of the plan as a user writes it."""
    return key.removeprefix("sections.")


def _is_allowed(key: str, allowed: tuple[str, ...]) -> bool:
    """Whether a name in `allowed` is the key, with or without its section, or a prefix of it."""
    return any(
        key == name or key.endswith(f".{name}") or name.endswith(f".{key}") or key.startswith(f"{name}.")
        for name in allowed
    )


def _restore_plan(run: RunDir) -> None:
    """Restore a corrupt or missing `plan.json` from the latest checkpoint with a copy.

    Raises:
        SetupError: there are checkpoints, and none of them has a copy.
    """
    steps = run.numbered("checkpoint")
    if read_json(run.plan) or not steps:
        return
    for step in reversed(steps):
        if copy := read_json(run.checkpoint(step) / "complete.json").get("plan"):
            write_json(run.plan, copy)
            log.info(f"{run.plan} was missing or corrupt: restored from checkpoint-{step}")
            return
    reason = f"its {run.plan.name} is missing or corrupt"
    raise SetupError(f"NAME: {run.path} has checkpoints, but {reason}. Restore it, or start a new run with NAME=…")


def check_versions(run: RunDir, strict: bool) -> None:
    """Print the library versions that differ from those of the latest attempt.

    Raises:
        SetupError: they differ, and `strict` is set.
    """
    starts = read_json(run.manifest).get("starts") or [{}]
    before: dict[str, str] = starts[-1].get("versions", {})
    now = {name: library_version(name) for name in before if name != "python"}
    changed = "; ".join(f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name])
    if changed and strict:
        fix = "Install those, or resume without STRICT_VERSIONS"
        raise SetupError(f"run {run.name} was trained with other library versions: {changed}. {fix}")
    if changed:
        log.info(f"library versions changed since the last attempt: {changed}")


def _numbered(recipe: str) -> list[RunDir]:
    """Runs named after the recipe, including those without a readable plan."""
    paths = runs_root().glob(f"{recipe}-*")
    return [RunDir(path) for path in paths if re.fullmatch(rf"{re.escape(recipe)}-\d+", path.name)]


def start_from(plan: Plan, name: str) -> Plan:
    """Return the plan with name, id and last step of the run that it starts from.

    Raises:
        SetupError: no such run, an unfinished one, or one of another model, tokenizer, template or method.
    """
    run = find(name, "INIT_FROM")
    stored, last = plans.read(run.plan), read_json(run.last / "complete.json")
    if run.state() != "finished" or last.get("run_id") != stored.run_id or not run.final.is_dir():
        found = f"found state {run.state()}, expected a finished run with last/ and final/"
        raise SetupError(f"INIT_FROM: {run.name}: {found}. Finish it with NAME={run.name}, or name another run")
    differences = plans.find_differences(stored, plan)
    for key in (key for key in differences if key.startswith(_SAME_AS_PARENT) and key != "sections.lora.dropout"):
        old, new = differences[key]
        found = f"{_user_key(key)}: found {new!r}, expected {old!r} as in that run"
        raise SetupError(f"INIT_FROM: {run.name} has another model or method: {found}. Use its settings")
    return replace(plan, init_from={"run": name, "run_id": stored.run_id, "step": last["step"]})
