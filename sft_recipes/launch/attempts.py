"""Attempts of a run: what `prepare` leaves for `train` on every node, and how many of them made no progress."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_recipes.launch.placement import Placement
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_USER, RunDir, read_json, write_json

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 3
_KEY = "attempts_without_progress"


@dataclass(frozen=True)
class Attempt:
    """An attempt of a run.

    Attributes:
        id: as in the placement of its nodes.
        arguments: of `prepare`, which `train` must have too.
        resumes: whether it resumes an unfinished run.
        named: whether the user or the job named the run.
        prepared: whether `prepare` has finished.
        sanity_cached: whether a result of the sanity check existed then; all nodes act on this.
    """

    id: str = ""
    nodes: int = 1
    arguments: tuple[str, ...] = ()
    resumes: bool = False
    named: bool = False
    prepared: bool = False
    sanity_cached: bool = False


def write(run_dir: RunDir, attempt: Attempt) -> None:
    """Record an attempt in its run directory."""
    write_json(run_dir.attempt, asdict(attempt))


def read(run_dir: RunDir) -> Attempt:
    """Return the attempt of a run directory; one that is not prepared if there is none."""
    content = read_json(run_dir.attempt)
    return Attempt(**{**content, "arguments": tuple(content.get("arguments", ()))})


def open_prepared(run_dir: RunDir, placement: Placement, arguments: Sequence[str]) -> tuple[Attempt, Plan]:
    """Return the prepared attempt and its settled plan.

    Raises:
        SetupError: nothing is prepared, it is another attempt's, or a file is not visible on this node.
    """

    def is_ours() -> bool:
        attempt = read(run_dir)
        return attempt.prepared and attempt.id == placement.attempt and run_dir.next_plan.exists()

    ours, attempt = wait_until_visible(is_ours, placement), read(run_dir)
    if not ours or (attempt.nodes, attempt.arguments) != (placement.nodes, tuple(arguments)):
        found = f"attempt {attempt.id} on {attempt.nodes} nodes with arguments {shlex.join(attempt.arguments)}"
        raise SetupError(
            f"NAME: {run_dir.path} is {f'prepared for {found}' if attempt.prepared else 'not prepared'}, as seen from "
            f"{placement.name}: expected attempt {placement.attempt} on {placement.nodes} nodes. Run once, on a disk "
            f"of all nodes: python -m sft_recipes prepare {shlex.join(arguments)}"
        )
    paths = [Path(path) for key, path in read_json(run_dir.prepared).items() if key in ("folder", "model")]
    if not wait_until_visible(lambda: all(path.exists() for path in paths), placement):
        missing = next(path for path in paths if not path.exists())
        raise SetupError(f"HF_HOME, RUNS_DIR: {missing}: not visible on {placement.name}. Use a disk of all nodes")
    return attempt, plans.read(run_dir.next_plan)


def wait_until_visible(visible: Callable[[], bool], placement: Placement, seconds: float | None = None) -> bool:
    """Wait until this node sees what another one has written, and return whether it does: NFS may hide a new name for
    half a minute. Node 0 does not wait for its own files."""
    return wait_until(visible, 0 if placement.is_first else seconds or timeouts.FILE_VISIBLE, 0.2)


def count_attempts(record: dict[str, Any] | None, step: int) -> int:
    """Attempts in a record `{"step": …, "count": …}`; 0 if the latest checkpoint is now another one."""
    return int(record["count"]) if record and record.get("step") == step else 0


def record_attempt(run_dir: RunDir) -> None:
    """Count an attempt from the latest complete checkpoint. Call first: an attempt also counts if its launcher is
    killed, or if its time is up during data preparation."""
    manifest, step = read_json(run_dir.manifest), run_dir.latest_complete()
    count = count_attempts(manifest.get(_KEY), step) + 1
    write_json(run_dir.manifest, {**manifest, _KEY: {"step": step, "count": count}})


def conclude(run_dir: RunDir, attempt: Attempt, code: int) -> int:
    """End an attempt: do not count it after success or wrong input, and remove a run that never started, so that the
    corrected command does not find another plan. Return the exit code: 4 after the last attempt without progress."""
    if code in (0, EXIT_USER):
        manifest = read_json(run_dir.manifest)
        write_json(run_dir.manifest, {**manifest, _KEY: {**manifest[_KEY], "count": manifest[_KEY]["count"] - 1}})
    elif code != EXIT_NO_PROGRESS:
        code = check_progress(run_dir) or code
    started = not run_dir.next_plan.exists()  # it became plan.json
    for file in (run_dir.attempt, run_dir.next_plan):
        file.unlink(missing_ok=True)
    if attempt.resumes or run_dir.numbered("checkpoint") or (started and code != EXIT_USER):
        return code
    # A requeued job has the name again, and continues the count.
    kept = {"exits", *(["manifest.json"] if attempt.named and code == EXIT_STOPPED else [])}
    for path in run_dir.path.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(run_dir.path.iterdir()):
        run_dir.path.rmdir()
    return code


def check_progress(run_dir: RunDir) -> int:
    """Return 0; or print the error and return exit code 4 if the run has used all its attempts without progress."""
    manifest, step = read_json(run_dir.manifest), run_dir.latest_complete()
    count = count_attempts(manifest.get(_KEY), step)
    if count < MAX_ATTEMPTS:
        return 0
    last = str(manifest.get("error") or "all processes were killed, or stopped before a save")
    if diverged := manifest.get("diverged"):
        last = f"diverged at step {diverged['step']}, rows {', '.join(diverged.get('rows') or ['unknown'])}"
    start = f"{run_dir.path}: {count} attempts without progress from {f'checkpoint-{step}' if step else 'the start'}"
    fix = f"Run `make diagnose RUN={run_dir.name}`, fix the cause, then resume with RESUME=1"
    log.error(f"{start}; last error: {last}. {fix}")
    return EXIT_NO_PROGRESS
