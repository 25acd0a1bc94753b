"""Knows the layout of `runs/`: what lies where in a run's folder, and which folder a start goes on with."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_recipes.planning import plan as plans
from sft_recipes.planning import resharding
from sft_recipes.planning.environment import library_version
from sft_recipes.planning.files import write_whole
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.schema import RecipeError

EXIT_FAULT, EXIT_USER, EXIT_DIVERGED, EXIT_NO_PROGRESS = 1, 2, 3, 4
EXIT_STOPPED = 75  # saved, not finished: the same command goes on
STEPS_PROVED = 2  # behind each save: the second needs the optimizer's state of the first too
# What a start leaves that was killed before it had a plan.
_OF_A_START = (".lock", "plan.json.partial")


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
    def proof(self) -> Path:
        """Digests of what each rank held at a save and in the steps behind it, one JSON object a proved step."""
        return self.path / "proof.jsonl"

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
        """Where the ranks of this start stand: each one's pulse, named by its host and rank."""
        return self.path / ".ranks"

    @property
    def stacks(self) -> Path:
        """What each rank was doing when the run hung or crashed: its Python stacks, named by its host and rank."""
        return self.path / "stacks"

    @property
    def sanity(self) -> Path:
        """Which receipt of the sanity gate this start rests on, or that it was skipped."""
        return self.path / "sanity.json"

    @property
    def verdict(self) -> Path:
        """What a trial of the sanity gate, or a replay, came to; in a folder of its own."""
        return self.path / "verdict.json"

    @property
    def trial(self) -> Path:
        """What the sanity check's trial leaves for the processes that reload its checkpoint."""
        return self.path / "trial.json"

    @property
    def replay(self) -> Path:
        """Which checkpoints of which run a replay may go on from, and to which step; in the replay's own folder."""
        return self.path / "replay.json"

    @property
    def lock(self) -> Path:
        """Held by the process that carries the run."""
        return self.path / ".lock"

    @property
    def saving(self) -> Path:
        """What is being written now, under the name that it will have; what lies here was cut off."""
        return self.path / ".saving"

    @property
    def removing(self) -> Path:
        """What is being removed, out of sight first: a folder that is there is whole."""
        return self.path / ".removing"

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

    def newest_whole(self) -> int:
        """The step of the newest checkpoint that this run has sealed; 0 where there is none."""
        run_id = read_json(self.plan).get("run_id", "")
        records = ((step, read_json(self.checkpoint(step) / "complete.json")) for step in self.numbered("checkpoint"))
        sealed = (step for step, record in records if record and record.get("run_id", "") == run_id)
        return max(sealed, default=0)

    def state(self) -> str:
        """`new`, `running` (or cut off), `stopped`, `failed`, `diverged` or `finished`."""
        state = read_json(self.manifest).get("state", "new")
        return str(state)


@dataclass(frozen=True)
class Start:
    """What a start will do: the folder, the plan to carry out, what to tell the user first, and whether to go on was
    insisted on (`--resume`)."""

    folder: RunFolder
    plan: Plan
    goes_on: bool
    notes: tuple[str, ...] = ()
    insisted: bool = False


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
    write_whole(path, json.dumps(content, indent=2) + "\n")


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


@dataclass(frozen=True)
class Asked:
    """What a user said of the run to start: its name, that there must be one to go on with, the keys whose change is
    let through, and that the libraries must be those of its last start."""

    name: str | None = None
    resume: bool = False
    accept: tuple[str, ...] = ()
    strict: bool = False


def choose(plan: Plan, asked: Asked, held_by: dict[str, str]) -> Start:
    """Which folder this start works in: a new one, or that of a run which it goes on with.

    `held_by` names the runs that a live process holds, with that process.

    Raises:
        RecipeError: another plan, a run in use, or nothing to go on with where that was insisted on.
    """
    if asked.name is not None:
        return _named(plan, RunFolder(runs_root() / check_name(asked.name)), asked, held_by)
    ours = [folder for folder in _numbered(plan.recipe) if os.access(folder.path, os.R_OK | os.W_OK | os.X_OK)]
    notes = [note for folder in ours if not folder.path.is_symlink() for note in _put_plan_back(folder)]
    for folder in reversed(_all(plan.recipe)):
        if folder.name in held_by:
            notes.append(f"passing over {folder.name}, which {held_by[folder.name]} is carrying out")
        elif folder.path.is_symlink():
            notes.append(f"passing over {folder.name}, which is a link and no folder of a run")
        elif folder.state() != "finished":
            start = _go_on(plan, folder, asked)
            return replace(start, notes=(*notes, *start.notes))
    if asked.resume:
        raise RecipeError(
            f"RESUME: no unfinished run of {plan.recipe} in {runs_root()}/; leave RESUME out to begin one"
        )
    return _begin(RunFolder(runs_root() / f"{plan.recipe}-{_next_number(plan.recipe)}"), plan, tuple(notes))


def _named(plan: Plan, folder: RunFolder, asked: Asked, held_by: dict[str, str]) -> Start:
    if folder.name in held_by:
        raise RecipeError(
            f"NAME: {folder.name} is being carried out by {held_by[folder.name]}; wait, or take another NAME="
        )
    if folder.path.is_symlink():
        raise RecipeError(
            f"NAME: {folder.path} is a link, and a run writes to its own folder alone; take another NAME=, or say "
            f"RUNS_DIR=<the folder that shall hold runs>"
        )
    restored = _put_plan_back(folder)
    if folder.plan.is_file():
        start = _go_on(plan, folder, asked)
        return replace(start, notes=(*restored, *start.notes))
    if folder.path.exists() and any(path.name not in _OF_A_START for path in folder.path.iterdir()):
        raise RecipeError(f"NAME: {folder.path} is there and is not a run; nothing is overwritten, take another NAME=")
    if asked.resume:
        raise RecipeError(f"RESUME: {folder.path} holds no run to go on with; leave RESUME out to begin it")
    return _begin(folder, plan)


def _begin(folder: RunFolder, plan: Plan, notes: tuple[str, ...] = ()) -> Start:
    return Start(folder, replace(plan, run_id=secrets.token_hex(8)), False, notes)


def _go_on(plan: Plan, folder: RunFolder, asked: Asked) -> Start:
    stored = plans.read(folder.plan)
    differ = plans.differences(stored, plan)
    if folder.numbered("checkpoint") and (reason := resharding.allowed(stored, plan)):
        raise RecipeError(f"run {folder.name} cannot go on: {reason}")
    followed = resharding.followed(stored, plan)
    others = {_as_typed(key): change for key, change in differ.items() if key not in followed}
    finished = folder.state() == "finished"
    refused = {key: change for key, change in others.items() if finished or not _is_accepted(key, asked.accept)}
    if refused:
        listed = "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in refused.items())
        accept = f"go on with it all the same: ACCEPT={','.join(refused)}; or "
        raise RecipeError(
            f"run {folder.name} {'is finished, and had' if finished else 'has'} another plan: {listed} "
            f"({'' if finished else accept}begin a run of its own: NAME=…)"
        )
    _check_accepted(plan, asked.accept)
    guards = _other_guards(stored, plan)
    accepted = sorted({*stored.accepted, *differ, *guards, *asked.accept})
    taken = replace(plan, created=stored.created, run_id=stored.run_id, accepted=accepted)
    said = "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in guards.items())
    notes = (
        _other_ranks(differ, followed),
        f"other guards than at the last start, recorded: {said}" if said else "",
        *_other_versions(folder, asked.strict),
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
        RecipeError: one of them is no key of a plan.
    """
    keys = plans.flat(plan)
    unknown = [one for one in accepted if not any(_is_accepted(_as_typed(key), (one,)) for key in keys)]
    if unknown:
        raise RecipeError(f"ACCEPT: {unknown[0]!r} is no key of a plan; say one of those that are listed as changed")


def _put_plan_back(folder: RunFolder) -> tuple[str, ...]:
    """Restores a `plan.json` that is damaged or gone from the newest checkpoint that holds a copy; what to tell.

    Raises:
        RecipeError: there are checkpoints, and none of them has one.
    """
    if read_json(folder.plan) or not folder.numbered("checkpoint"):
        return ()
    for step in reversed(folder.numbered("checkpoint")):
        copy = read_json(folder.checkpoint(step) / "complete.json").get("plan")
        if copy:
            write_json(folder.plan, copy)
            return (f"{folder.plan} could not be read; it is that of checkpoint-{step} again",)
    raise RecipeError(
        f"NAME: {folder.path} holds checkpoints, but its {folder.plan.name} cannot be read, without which nothing goes "
        f"on from them; put it back, or begin a run of its own: NAME=…"
    )


def _other_guards(stored: Plan, plan: Plan) -> dict[str, tuple[Any, Any]]:
    """Guards that changed: they change no weight, but perhaps when a run ends, so they are said and not refused."""
    old, new = stored.sections["guards"], plan.sections["guards"]
    return {f"guards.{key}": (old.get(key), new.get(key)) for key in sorted(new) if old.get(key) != new.get(key)}


def _other_ranks(differ: dict[str, tuple[Any, Any]], followed: set[str]) -> str:
    """What there is to say where the run goes on with other ranks."""
    listed = "; ".join(f"{key} {differ[key][0]} -> {differ[key][1]}" for key in sorted(followed))
    return f"other ranks than at the last start, the effective batch stays, recorded: {listed}" if listed else ""


def _other_versions(folder: RunFolder, strict: bool) -> tuple[str, ...]:
    """What there is to say where libraries are not those of the run's last start.

    Raises:
        RecipeError: they are not, and that was asked to be refused.
    """
    starts = read_json(folder.manifest).get("starts") or [{}]
    before: dict[str, str] = starts[-1].get("versions", {})
    now = {name: library_version(name) for name in before if name != "python"}
    changed = "; ".join(f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name])
    if changed and strict:
        raise RecipeError(
            f"run {folder.name} was trained with other library versions: {changed}; install those again, or leave "
            f"STRICT out to go on with these"
        )
    return (f"other library versions than at the last start, recorded: {changed}",) if changed else ()


def _all(recipe: str | None = None) -> list[RunFolder]:
    """Runs by age of their plan, oldest first."""
    found = [RunFolder(path.parent) for path in runs_root().glob("*/plan.json") if path.is_file()]
    if recipe is not None:
        found = [folder for folder in found if read_json(folder.plan).get("recipe") == recipe]
    return sorted(found, key=lambda folder: (str(read_json(folder.plan).get("created")), folder.name))


def _numbered(recipe: str) -> list[RunFolder]:
    """Those that got their name from the recipe, whether their plan can be read or not."""
    found = runs_root().glob(f"{recipe}-*")
    return [RunFolder(path) for path in found if re.fullmatch(rf"{re.escape(recipe)}-\d+", path.name)]


def _next_number(recipe: str) -> int:
    return 1 + max((int(folder.name.rpartition("-")[2]) for folder in _numbered(recipe)), default=0)
