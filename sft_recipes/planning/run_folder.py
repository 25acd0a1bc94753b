"""Knows the layout of `runs/`: what lies where in a run's folder, and which folder a start goes on with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_recipes.planning import plan as plans
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.schema import RecipeError

EXIT_FAULT, EXIT_USER, EXIT_DIVERGED = 1, 2, 3
EXIT_STOPPED = 75  # saved, not finished: the same command goes on


@dataclass(frozen=True)
class RunFolder:
    """One run's folder and the names of what lies in it."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def plan(self) -> Path:
        """The plan, written by the launcher before anything starts."""
        return self.path / "plan.json"

    @property
    def manifest(self) -> Path:
        """What became of the run: versions, data, tokens, losses, state."""
        return self.path / "manifest.json"

    @property
    def outcome(self) -> Path:
        """How the newest start ended: its exit code and, for a user's error, the line."""
        return self.path / "outcome.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a log step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model answered to the same held-out prompts at each evaluation, one JSON object an answer."""
        return self.path / "samples.jsonl"

    @property
    def warnings(self) -> Path:
        """What the guards saw, one JSON object a warning."""
        return self.path / "warnings.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The page that `report` writes."""
        return self.path / "report.html"

    @property
    def log(self) -> Path:
        """What rank 0 said, in plain lines."""
        return self.path / "log.txt"

    @property
    def final(self) -> Path:
        """The best model."""
        return self.path / "final"

    @property
    def last(self) -> Path:
        """The model as the last step left it."""
        return self.path / "last"

    @property
    def merged(self) -> Path:
        """The best adapters and their base as one model, once `merge` has written it."""
        return self.path / "merged"

    @property
    def answers(self) -> Path:
        """What the model answered to held-out prompts before and after."""
        return self.path / "answers.json"

    @property
    def prepared(self) -> Path:
        """Where the prepared data lies, and what it counts."""
        return self.path / "prepared.json"

    @property
    def configuration(self) -> Path:
        """The resolved trl.SFTConfig, every field."""
        return self.path / "sft_config.json"

    @property
    def accelerate_config(self) -> Path:
        """The engine's launch shape for this run's hardware."""
        return self.path / "accelerate.yaml"

    @property
    def ranks(self) -> Path:
        """A file a living rank, named by host and rank, with its process id."""
        return self.path / ".ranks"

    @property
    def sanity(self) -> Path:
        """Which receipt of the sanity gate this start rests on, or that it was skipped."""
        return self.path / "sanity.json"

    @property
    def verdict(self) -> Path:
        """What a trial of the sanity gate came to; in the trial's own folder."""
        return self.path / "verdict.json"

    @property
    def lock(self) -> Path:
        """Held by the process that carries the run."""
        return self.path / ".lock"

    def checkpoint(self, step: int) -> Path:
        """The whole checkpoint of a step."""
        return self.path / f"checkpoint-{step}"

    def best(self, step: int) -> Path:
        """The weights of a step that was among the best."""
        return self.path / f"best-{step}"

    def step_of(self, checkpoint: Path) -> int:
        """The step of a `checkpoint-N`."""
        return int(checkpoint.name.rpartition("-")[2])

    def numbered(self, kind: str) -> list[int]:
        """Steps for which `checkpoint-N` or `best-N` folders are there, ascending."""
        found = (re.fullmatch(rf"{kind}-(\d+)", path.name) for path in self.path.glob(f"{kind}-*"))
        return sorted(int(match[1]) for match in found if match)

    def state(self) -> str:
        """`new`, `running` (or cut off), `stopped`, `failed`, `diverged` or `finished`."""
        state = read_json(self.manifest).get("state", "new")
        return str(state)


@dataclass(frozen=True)
class Start:
    """What a start will do: the folder, the plan to carry out, and what to tell the user first."""

    folder: RunFolder
    plan: Plan
    goes_on: bool
    notes: tuple[str, ...] = ()


def runs_root() -> Path:
    """Where runs lie: `runs/` in the current folder, or RUNS_DIR."""
    return Path(os.environ.get("RUNS_DIR") or "runs")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is not there or was cut short.

    Raises:
        RecipeError: the file may not be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return {}
    except PermissionError as error:
        raise RecipeError(f"{path}: may not be read by this user; is it another user's run?") from error
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def check_name(name: str) -> str:
    """The name, if it can be a folder's.

    Raises:
        RecipeError: it holds a separator, a leading dot, or characters that a shell reads.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise RecipeError(
            f"NAME: {name!r} cannot name a run; wanted letters, digits, '.', '_' and '-', at most 100, no path"
        )
    return name


def find(run: str) -> RunFolder:
    """The folder of a run that is there, by its name or its path.

    Raises:
        RecipeError: there is none.
    """
    for path in (runs_root() / run, Path(run)):
        if (path / "plan.json").is_file():
            return RunFolder(path)
    there = ", ".join(folder.name for folder in _all()) or "none yet"
    raise RecipeError(f"RUN: no run {run!r} in {runs_root()}/; there are: {there}")


def choose(plan: Plan, name: str | None, resume: bool, accept: Iterable[str], held_by: dict[str, str]) -> Start:
    """Which folder this start works in: a new one, or that of a run which it goes on with.

    `held_by` names the runs that a live process holds, with that process.

    Raises:
        RecipeError: another plan, a run in use, or nothing to go on with where that was insisted on.
    """
    if name is not None:
        return _named(plan, RunFolder(runs_root() / check_name(name)), resume, accept, held_by)
    notes = []
    for folder in reversed(_all(plan.recipe)):
        if folder.name in held_by:
            notes.append(f"passing over {folder.name}, which {held_by[folder.name]} is carrying out")
        elif folder.state() != "finished":
            start = _go_on(plan, folder, accept)
            return replace(start, notes=(*notes, *start.notes))
    if resume:
        raise RecipeError(
            f"RESUME: no unfinished run of {plan.recipe} in {runs_root()}/; leave RESUME out to begin one"
        )
    return Start(RunFolder(runs_root() / f"{plan.recipe}-{_next_number(plan.recipe)}"), plan, False, tuple(notes))


def _named(plan: Plan, folder: RunFolder, resume: bool, accept: Iterable[str], held_by: dict[str, str]) -> Start:
    if folder.name in held_by:
        raise RecipeError(
            f"NAME: {folder.name} is being carried out by {held_by[folder.name]}; wait, or take another NAME="
        )
    if folder.plan.is_file():
        return _go_on(plan, folder, accept)
    if folder.path.exists() and any(path.name != ".lock" for path in folder.path.iterdir()):
        raise RecipeError(f"NAME: {folder.path} is there and is not a run; nothing is overwritten, take another NAME=")
    if resume:
        raise RecipeError(f"RESUME: {folder.path} holds no run to go on with; leave RESUME out to begin it")
    return Start(folder, plan, False)


def _go_on(plan: Plan, folder: RunFolder, accept: Iterable[str]) -> Start:
    stored = plans.read(folder.plan)
    accepted = list(accept)
    differ = plans.differences(stored, plan)
    refused = {
        key: change for key, change in differ.items() if key not in accepted and key.split(".")[-1] not in accepted
    }
    if refused:
        listed = "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in refused.items())
        raise RecipeError(
            f"run {folder.name} has another plan: {listed} (go on with it all the same: --accept {','.join(refused)}; "
            f"or begin a run of its own: NAME=…)"
        )
    taken = replace(plan, created=stored.created, accepted=sorted({*stored.accepted, *differ, *accepted}))
    return Start(folder, taken, True)


def _all(recipe: str | None = None) -> list[RunFolder]:
    """Runs by age of their plan, oldest first."""
    found = [RunFolder(path.parent) for path in runs_root().glob("*/plan.json") if path.is_file()]
    if recipe is not None:
        found = [folder for folder in found if read_json(folder.plan).get("recipe") == recipe]
    return sorted(found, key=lambda folder: (str(read_json(folder.plan).get("created")), folder.name))


def _next_number(recipe: str) -> int:
    taken = (re.fullmatch(rf"{re.escape(recipe)}-(\d+)", path.name) for path in runs_root().glob(f"{recipe}-*"))
    return 1 + max((int(match[1]) for match in taken if match), default=0)
