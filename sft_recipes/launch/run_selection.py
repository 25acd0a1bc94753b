"""Which run directory a start works in: a new one, or that of an unfinished run, which it resumes."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass, fields, replace
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.planner import rank_change
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import library_version
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, all_runs, check_name, read_json, runs_root, write_json

# What a start leaves that was killed before it had a plan.
_OF_A_START = (".lock", "plan.json.partial")


@dataclass(frozen=True)
class Start:
    """What a start will do: the folder, the plan to carry out, what to tell the user first, and whether to go on was
    insisted on (`--resume`)."""

    folder: RunDir
    plan: Plan
    goes_on: bool
    notes: tuple[str, ...] = ()
    insisted: bool = False


@dataclass(frozen=True)
class RunRequest:
    """What a user said of the run to start: its name, that there must be one to go on with, the keys whose change is
    let through, and that the libraries must be those of its last start."""

    name: str | None = None
    resume: bool = False
    allow_change: tuple[str, ...] = ()
    strict_versions: bool = False


def choose(plan: Plan, asked: RunRequest, held_by: dict[str, str]) -> Start:
    """Which folder this start works in: a new one, or that of a run which it goes on with.

    `held_by` names the runs that a live process holds, with that process.

    Raises:
        SetupError: another plan, a run in use, or nothing to go on with where that was insisted on.
    """
    if asked.name is not None:
        return _named(plan, RunDir(runs_root() / check_name(asked.name)), asked, held_by)
    ours = [folder for folder in _numbered(plan.recipe) if os.access(folder.path, os.R_OK | os.W_OK | os.X_OK)]
    notes = [note for folder in ours if not folder.path.is_symlink() for note in _put_plan_back(folder)]
    for folder in reversed(all_runs(plan.recipe)):
        if folder.name in held_by:
            notes.append(f"passing over {folder.name}, which {held_by[folder.name]} is carrying out")
        elif folder.path.is_symlink():
            notes.append(f"passing over {folder.name}, which is a link and no folder of a run")
        elif folder.state() != "finished":
            start = _go_on(plan, folder, asked)
            return replace(start, notes=(*notes, *start.notes))
    if asked.resume:
        raise SetupError(f"RESUME: no unfinished run of {plan.recipe} in {runs_root()}/; leave RESUME out to begin one")
    return _begin(RunDir(runs_root() / f"{plan.recipe}-{_next_number(plan.recipe)}"), plan, tuple(notes))


def _named(plan: Plan, folder: RunDir, asked: RunRequest, held_by: dict[str, str]) -> Start:
    if folder.name in held_by:
        raise SetupError(
            f"NAME: {folder.name} is being carried out by {held_by[folder.name]}; wait, or take another NAME="
        )
    if folder.path.is_symlink():
        raise SetupError(
            f"NAME: {folder.path} is a link, and a run writes to its own folder alone; take another NAME=, or say "
            f"RUNS_DIR=<the folder that shall hold runs>"
        )
    restored = _put_plan_back(folder)
    if folder.plan.is_file():
        start = _go_on(plan, folder, asked)
        return replace(start, notes=(*restored, *start.notes))
    if folder.path.exists() and any(path.name not in _OF_A_START for path in folder.path.iterdir()):
        raise SetupError(f"NAME: {folder.path} is there and is not a run; nothing is overwritten, take another NAME=")
    if asked.resume:
        raise SetupError(f"RESUME: {folder.path} holds no run to go on with; leave RESUME out to begin it")
    return _begin(folder, plan)


def _begin(folder: RunDir, plan: Plan, notes: tuple[str, ...] = ()) -> Start:
    return Start(folder, replace(plan, run_id=secrets.token_hex(8)), False, notes)


def _go_on(plan: Plan, folder: RunDir, asked: RunRequest) -> Start:
    stored = plans.read(folder.plan)
    differ = plans.differences(stored, plan)
    if folder.numbered("checkpoint") and (reason := rank_change.allowed(stored, plan)):
        raise SetupError(f"run {folder.name} cannot go on: {reason}")
    followed = rank_change.followed(stored, plan)
    others = {_as_typed(key): change for key, change in differ.items() if key not in followed}
    finished = folder.state() == "finished"
    refused = {key: change for key, change in others.items() if finished or not _is_accepted(key, asked.allow_change)}
    if refused:
        listed = "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in refused.items())
        accept = f"go on with it all the same: ALLOW_CHANGE={','.join(refused)}; or "
        raise SetupError(
            f"run {folder.name} {'is finished, and had' if finished else 'has'} another plan: {listed} "
            f"({'' if finished else accept}begin a run of its own: NAME=…)"
        )
    _check_accepted(plan, asked.allow_change)
    guards = _other_monitor(stored, plan)
    accepted = sorted({*stored.accepted, *differ, *guards, *asked.allow_change})
    taken = replace(plan, created=stored.created, run_id=stored.run_id, accepted=accepted)
    said = "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in guards.items())
    notes = (
        _other_ranks(differ, followed),
        f"other guards than at the last start, recorded: {said}" if said else "",
        *_other_versions(folder, asked.strict_versions),
    )
    return Start(folder, taken, True, tuple(filter(None, notes)), asked.resume)


def _as_typed(key: str) -> str:
    """A plan's key as a user writes it."""
    return key.removeprefix("sections.")


def _is_accepted(key: str, accepted: tuple[str, ...]) -> bool:
    """Whether one of them names the key, with or without the section that it stands in, or all that is below it."""
    return any(
        key == one or key.endswith(f".{one}") or one.endswith(f".{key}") or key.startswith(f"{one}.")
        for one in accepted
    )


def _check_accepted(plan: Plan, accepted: tuple[str, ...]) -> None:
    """
    Raises:
        SetupError: one of them is no key of a plan.
    """
    keys = plans.flat(plan)
    unknown = [one for one in accepted if not any(_is_accepted(_as_typed(key), (one,)) for key in keys)]
    if unknown:
        raise SetupError(
            f"ALLOW_CHANGE: {unknown[0]!r} is no key of a plan; say one of those that are listed as changed"
        )


def _put_plan_back(folder: RunDir) -> tuple[str, ...]:
    """Restores a `plan.json` that is damaged or gone from the newest checkpoint that holds a copy; what to tell.

    Raises:
        SetupError: there are checkpoints, and none of them has one.
    """
    if read_json(folder.plan) or not folder.numbered("checkpoint"):
        return ()
    for step in reversed(folder.numbered("checkpoint")):
        copy = read_json(folder.checkpoint(step) / "complete.json").get("plan")
        if copy:
            write_json(folder.plan, copy)
            return (f"{folder.plan} could not be read; it is that of checkpoint-{step} again",)
    raise SetupError(
        f"NAME: {folder.path} holds checkpoints, but its {folder.plan.name} cannot be read, without which nothing goes "
        f"on from them; put it back, or begin a run of its own: NAME=…"
    )


def _other_monitor(stored: Plan, plan: Plan) -> dict[str, tuple[Any, Any]]:
    """Monitor that changed: they change no weight, but perhaps when a run ends, so they are said and not refused."""
    old, new = stored.sections.monitor, plan.sections.monitor
    return {
        f"monitor.{field.name}": (getattr(old, field.name), getattr(new, field.name))
        for field in sorted(fields(new), key=lambda field: field.name)
        if getattr(old, field.name) != getattr(new, field.name)
    }


def _other_ranks(differ: dict[str, tuple[Any, Any]], followed: set[str]) -> str:
    """What there is to say where the run goes on with other ranks."""
    listed = "; ".join(f"{key} {differ[key][0]} -> {differ[key][1]}" for key in sorted(followed))
    return f"other ranks than at the last start, the effective batch stays, recorded: {listed}" if listed else ""


def _other_versions(folder: RunDir, strict: bool) -> tuple[str, ...]:
    """What there is to say where libraries are not those of the run's last start.

    Raises:
        SetupError: they are not, and that was asked to be refused.
    """
    starts = read_json(folder.manifest).get("starts") or [{}]
    before: dict[str, str] = starts[-1].get("versions", {})
    now = {name: library_version(name) for name in before if name != "python"}
    changed = "; ".join(f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name])
    if changed and strict:
        raise SetupError(
            f"run {folder.name} was trained with other library versions: {changed}; install those again, or leave "
            f"STRICT_VERSIONS out to go on with these"
        )
    return (f"other library versions than at the last start, recorded: {changed}",) if changed else ()


def _numbered(recipe: str) -> list[RunDir]:
    """Those that got their name from the recipe, whether their plan can be read or not."""
    found = runs_root().glob(f"{recipe}-*")
    return [RunDir(path) for path in found if re.fullmatch(rf"{re.escape(recipe)}-\d+", path.name)]


def _next_number(recipe: str) -> int:
    return 1 + max((int(folder.name.rpartition("-")[2]) for folder in _numbered(recipe)), default=0)
