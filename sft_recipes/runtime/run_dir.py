"""The layout of `runs/` and of a run directory."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.errors import SetupError

EXIT_ERROR, EXIT_USER, EXIT_DIVERGED, EXIT_NO_PROGRESS = 1, 2, 3, 4
EXIT_STOPPED = 75  # stopped early with a complete checkpoint: the same command resumes
EXIT_CODES = {  # docs/reference.md lists them
    0: "finished",
    EXIT_ERROR: "error; a failed sanity check; an error found by `diagnose` or `doctor`",
    EXIT_USER: "wrong input; no optimizer step was taken",
    EXIT_DIVERGED: "diverged: NaN/Inf loss or gradient, or an alert in `monitor.stop_on`",
    EXIT_NO_PROGRESS: "three attempts without progress (no new checkpoint)",
    EXIT_STOPPED: "stopped early with a complete checkpoint; the same command resumes",
}
FINGERPRINTED_STEPS = 2  # recorded after each save: the second also depends on the optimizer state after the first


@dataclass(frozen=True)
class RunDir:
    """A run directory and its files."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def plan(self) -> Path:
        """The plan, written by the launcher before the ranks start."""
        return self.path / "plan.json"

    @property
    def manifest(self) -> Path:
        """Versions, data, tokens, losses and state of the run."""
        return self.path / "manifest.json"

    @property
    def outcome(self) -> Path:
        """How the latest attempt ended: its exit code and, for a user error, the message."""
        return self.path / "outcome.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per log step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Generations for the same held-out prompts at each evaluation, one JSON object each."""
        return self.path / "samples.jsonl"

    @property
    def warnings(self) -> Path:
        """Alerts, one JSON object each."""
        return self.path / "warnings.jsonl"

    @property
    def integrity_log(self) -> Path:
        """Fingerprints of each rank's state at a save and in the steps after it, one JSON object per recorded step."""
        return self.path / "integrity.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def log(self) -> Path:
        """The log of rank 0."""
        return self.path / "log.txt"

    @property
    def final(self) -> Path:
        """The best model."""
        return self.path / "final"

    @property
    def last(self) -> Path:
        """The model after the last step."""
        return self.path / "last"

    @property
    def merged(self) -> Path:
        """The best adapters merged into their base model, written by `merge`."""
        return self.path / "merged"

    @property
    def generations(self) -> Path:
        """Generations for held-out prompts before and after training."""
        return self.path / "generations.json"

    @property
    def prepared(self) -> Path:
        """Location and counts of the prepared data."""
        return self.path / "prepared.json"

    @property
    def configuration(self) -> Path:
        """The resolved trl.SFTConfig, every field."""
        return self.path / "sft_config.json"

    @property
    def accelerate_config(self) -> Path:
        """The accelerate configuration of this run."""
        return self.path / "accelerate.yaml"

    @property
    def ranks(self) -> Path:
        """Heartbeats of the ranks, one file each, named by host and rank."""
        return self.path / ".ranks"

    @property
    def stack_traces(self) -> Path:
        """Python stack traces of each rank when the run stalled or crashed, named by host and rank."""
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
        """Written by the trial of the sanity check for the processes that reload its checkpoint."""
        return self.path / "trial.json"

    @property
    def replay(self) -> Path:
        """The run, checkpoints and steps of a replay; in the directory of the replay."""
        return self.path / "replay.json"

    @property
    def lock(self) -> Path:
        """Locked by the launcher of the run."""
        return self.path / ".lock"

    @property
    def saving(self) -> Path:
        """Files being written, under their final names; leftovers here are incomplete."""
        return self.path / ".saving"

    @property
    def removing(self) -> Path:
        """Directories being removed: moved here first, so that every checkpoint outside is complete."""
        return self.path / ".removing"

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.path / f"checkpoint-{step}"

    def best(self, step: int) -> Path:
        """Return the path of the weights of a step that was among the best."""
        return self.path / f"best-{step}"

    def numbered(self, kind: str) -> list[int]:
        """Return the steps of the `checkpoint-N` or `best-N` directories, ascending."""
        matches = (re.fullmatch(rf"{kind}-(\d+)", path.name) for path in self.path.glob(f"{kind}-*"))
        return sorted(int(match[1]) for match in matches if match)

    def latest_complete(self) -> int:
        """Return the step of the latest complete checkpoint of this run; 0 if there is none."""
        run_id = read_json(self.plan).get("run_id", "")
        records = ((step, read_json(self.checkpoint(step) / "complete.json")) for step in self.numbered("checkpoint"))
        complete = (step for step, record in records if record and record.get("run_id", "") == run_id)
        return max(complete, default=0)

    def describe_restart(self) -> str:
        """Return what the same command does after this attempt: resume, or start from step 0 without a checkpoint."""
        if step := self.latest_complete():
            return f"run the same command to resume from checkpoint-{step}"
        return "no checkpoint is complete: the same command starts again from step 0"

    def state(self) -> str:
        """Return `new`, `running` (or killed), `stopped`, `failed`, `diverged` or `finished`."""
        state = read_json(self.manifest).get("state", "new")
        return str(state)


def runs_root() -> Path:
    """Return RUNS_DIR, or `runs/` in the current directory."""
    return Path(os.environ.get("RUNS_DIR") or "runs")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or incomplete.

    Raises:
        SetupError: no permission to read the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return {}
    except PermissionError as error:
        raise SetupError(
            f"{path}: found no read permission, expected a run of this user. Set another NAME=, or ask its owner"
        ) from error
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def check_name(name: str) -> str:
    """Return the name of a run if it is valid.

    Raises:
        SetupError: it has a separator, a leading dot, or characters with a meaning in shells.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise SetupError(
            f"NAME: found {name!r}, expected at most 100 letters, digits, '.', '_' and '-', no path. Set NAME=…"
        )
    return name


def find(run: str, variable: str = "RUN") -> RunDir:
    """Return an existing run, by its name or path.

    Args:
        variable: that names it, for the error.

    Raises:
        SetupError: no such run.
    """
    for path in (runs_root() / run, Path(run)):
        if (path / "plan.json").is_file():
            return RunDir(path)
    names = ", ".join(folder.name for folder in all_runs()) or "none yet"
    raise SetupError(f"{variable}: no run {run!r} in {runs_root()}/: expected one of: {names}")


def all_runs(recipe: str | None = None) -> list[RunDir]:
    """Return the runs, oldest plan first."""
    folders = [RunDir(path.parent) for path in runs_root().glob("*/plan.json") if path.is_file()]
    if recipe is not None:
        folders = [folder for folder in folders if read_json(folder.plan).get("recipe") == recipe]
    return sorted(folders, key=lambda folder: (str(read_json(folder.plan).get("created")), folder.name))
