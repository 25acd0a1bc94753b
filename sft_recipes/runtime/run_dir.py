"""Knows the layout of `runs/`: what lies where in a run's folder, and which folder a start goes on with."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.errors import SetupError

EXIT_FAULT, EXIT_USER, EXIT_DIVERGED, EXIT_NO_PROGRESS = 1, 2, 3, 4
EXIT_STOPPED = 75  # saved, not finished: the same command goes on
EXIT_CODES = {  # docs/reference.md lists them
    0: "finished",
    1: "error; a failed sanity check; an error found by `diagnose` or `doctor`",
    2: "wrong input; no optimizer step was taken",
    3: "diverged: NaN/Inf loss or gradient, or an alert in `monitor.stop_on`",
    4: "three attempts without progress (no new checkpoint)",
    75: "stopped early with a complete checkpoint; the same command resumes",
}
FINGERPRINTED_STEPS = 2  # behind each save: the second needs the optimizer's state of the first too


@dataclass(frozen=True)
class RunDir:
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
    def integrity_log(self) -> Path:
        """Digests of what each rank held at a save and in the steps behind it, one JSON object a proved step."""
        return self.path / "integrity.jsonl"

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
    def generations(self) -> Path:
        """What the model answered to held-out prompts before and after."""
        return self.path / "generations.json"

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
    def stack_traces(self) -> Path:
        """What each rank was doing when the run hung or crashed: its Python stacks, named by its host and rank."""
        return self.path / "stack_traces"

    @property
    def sanity(self) -> Path:
        """Path of the sanity check's result, or that the check was skipped."""
        return self.path / "sanity.json"

    @property
    def result(self) -> Path:
        """Result of a sanity check or a replay, in its own directory."""
        return self.path / "result.json"

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

    def latest_complete(self) -> int:
        """The step of the newest checkpoint that this run has sealed; 0 where there is none."""
        run_id = read_json(self.plan).get("run_id", "")
        records = ((step, read_json(self.checkpoint(step) / "complete.json")) for step in self.numbered("checkpoint"))
        sealed = (step for step, record in records if record and record.get("run_id", "") == run_id)
        return max(sealed, default=0)

    def state(self) -> str:
        """`new`, `running` (or cut off), `stopped`, `failed`, `diverged` or `finished`."""
        state = read_json(self.manifest).get("state", "new")
        return str(state)


def runs_root() -> Path:
    """Where runs lie: `runs/` in the current folder, or RUNS_DIR."""
    return Path(os.environ.get("RUNS_DIR") or "runs")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is not there or was cut short.

    Raises:
        SetupError: the file may not be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return {}
    except PermissionError as error:
        raise SetupError(f"{path}: may not be read by this user; is it another user's run?") from error
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object whole or not at all."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def check_name(name: str) -> str:
    """The name, if it can be a folder's.

    Raises:
        SetupError: it holds a separator, a leading dot, or characters that a shell reads.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise SetupError(
            f"NAME: {name!r} cannot name a run; wanted letters, digits, '.', '_' and '-', at most 100, no path"
        )
    return name


def find(run: str) -> RunDir:
    """The folder of a run that is there, by its name or its path.

    Raises:
        SetupError: there is none.
    """
    for path in (runs_root() / run, Path(run)):
        if (path / "plan.json").is_file():
            return RunDir(path)
    there = ", ".join(folder.name for folder in all_runs()) or "none yet"
    raise SetupError(f"RUN: no run {run!r} in {runs_root()}/; there are: {there}")


def all_runs(recipe: str | None = None) -> list[RunDir]:
    """Runs by age of their plan, oldest first."""
    found = [RunDir(path.parent) for path in runs_root().glob("*/plan.json") if path.is_file()]
    if recipe is not None:
        found = [folder for folder in found if read_json(folder.plan).get("recipe") == recipe]
    return sorted(found, key=lambda folder: (str(read_json(folder.plan).get("created")), folder.name))
