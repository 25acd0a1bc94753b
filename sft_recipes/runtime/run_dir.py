"""The layout of `runs/` and of a run directory, and the exit codes of all commands (docs/reference.md lists both).

Exit codes:
    0: finished
    1: error; a failed sanity check; an error found by `diagnose` or `doctor`
    2: wrong input; no optimizer step was taken
    3: diverged: NaN/Inf loss or gradient, or an alert in `monitor.stop_on`
    4: three attempts without progress (no new checkpoint)
    75: stopped early with a complete checkpoint; the same command resumes
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.errors import SetupError

EXIT_ERROR, EXIT_USER, EXIT_DIVERGED, EXIT_NO_PROGRESS, EXIT_STOPPED = 1, 2, 3, 4, 75
FINGERPRINTED_STEPS = 2  # recorded after each save: the second also depends on the optimizer state after the first


class Entry:
    """A file or folder of a run directory, and its content (docs/reference.md lists them)."""

    def __init__(self, name: str, content: str):
        self.name, self.content = name, content

    def __get__(self, run_dir: RunDir, _: type) -> Path:
        return run_dir.path / self.name


@dataclass(frozen=True)
class RunDir:
    """A run directory and its files."""

    path: Path

    plan = Entry("plan.json", "The plan, written by the launcher before the ranks start.")
    next_plan = Entry("plan.next.json", "The plan of an attempt before its sanity check has passed.")
    attempt = Entry("attempt.json", "The attempt that `prepare` leaves for `train` on every node.")
    manifest = Entry("manifest.json", "Versions, data, tokens, losses and state of the run.")
    outcome = Entry("outcome.json", "How the latest attempt ended: its exit code and, for a user error, the message.")
    metrics = Entry("metrics.jsonl", "One JSON object per log step.")
    samples = Entry("samples.jsonl", "Generations for held-out prompts at each evaluation, as JSON lines.")
    warnings = Entry("warnings.jsonl", "Alerts, as JSON lines.")
    integrity_log = Entry("integrity.jsonl", "Fingerprints of each rank's state in recorded steps.")
    tensorboard = Entry("tensorboard", "TensorBoard's event files.")
    report = Entry("report.html", "The HTML report.")
    log = Entry("log.txt", "The log of rank 0.")
    final = Entry("final", "The best model.")
    last = Entry("last", "The model after the last step.")
    merged = Entry("merged", "The best adapters merged into their base model, written by `merge`.")
    evaluation = Entry("eval", "Comparisons of base and trained model by `eval`: TASKS.json, and results in TASKS/.")
    generations = Entry("generations.json", "Generations for held-out prompts before and after training.")
    prepared = Entry("prepared.json", "Location and counts of the prepared data.")
    configuration = Entry("sft_config.json", "The resolved trl.SFTConfig, every field.")
    accelerate_config = Entry("accelerate.yaml", "The accelerate configuration of this run.")
    deepspeed_config = Entry("deepspeed.json", "The DeepSpeed configuration of this run, sized for its model.")
    ranks = Entry(".ranks", "Heartbeats of the ranks, one file each, named by host and rank.")
    stack_traces = Entry("stack_traces", "Python stack traces of each rank when the run stalled or crashed.")
    sanity = Entry("sanity.json", "Path of the sanity check's result, or that the check was skipped.")
    result = Entry("result.json", "Result of a sanity check or a replay, in its own directory.")
    trial = Entry("trial.json", "Written by the trial of the sanity check for the reload of its checkpoint.")
    replay = Entry("replay.json", "The run, checkpoints and steps of a replay; in the directory of the replay.")
    lock = Entry(".lock", "Locked by the launcher of the run.")
    saving = Entry(".saving", "Files being written, under their final names; leftovers here are incomplete.")
    removing = Entry(".removing", "Directories being removed, so that every checkpoint outside is complete.")

    @classmethod
    def named(cls, name: str) -> RunDir:
        """Return the directory of a run by its name, whether it exists or not.

        Raises:
            SetupError: the name has a separator, a leading dot, or characters with a meaning in shells.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise SetupError(f"NAME: found {name!r}, expected at most 100 letters, digits, '.', '_', '-'. Set NAME=…")
        return cls(runs_root() / name)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

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
        raise SetupError(f"{path}: found no read permission. Set another NAME=, or ask its owner") from error
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


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
