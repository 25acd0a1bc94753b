"""Counts attempts of a run without progress, and refuses another one after three."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_recipes.launch.run_selection import RunStart
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json

MAX_ATTEMPTS = 3
_KEY = "attempts_without_progress"


def count_attempts(record: Mapping[str, Any] | None, step: int) -> int:
    """Attempts in a record `{"step": …, "count": …}`; 0 if the latest checkpoint is now another one."""
    return int(record["count"]) if record and record.get("step") == step else 0


def record_attempt(run_dir: RunDir) -> None:
    """Count an attempt from the latest complete checkpoint. Call before the ranks start, so that an attempt also counts
    if its launcher is killed."""
    manifest, step = read_json(run_dir.manifest), run_dir.latest_complete()
    count = count_attempts(manifest.get(_KEY), step) + 1
    write_json(run_dir.manifest, {**manifest, _KEY: {"step": step, "count": count}})


def discard_attempt(run_dir: RunDir) -> None:
    """Do not count the latest attempt: it succeeded, or stopped at a request."""
    manifest = read_json(run_dir.manifest)
    if record := manifest.get(_KEY):
        write_json(run_dir.manifest, {**manifest, _KEY: {**record, "count": record["count"] - 1}})


def check_attempts(start: RunStart) -> str | None:
    """Error if there is no attempt left; None if there is one, or at an explicit `--resume`."""
    return None if start.explicit_resume or not start.resumes else no_progress_error(start.run_dir)


def no_progress_error(run_dir: RunDir) -> str | None:
    """Error if the run has used all its attempts without progress, else None."""
    manifest, step = read_json(run_dir.manifest), run_dir.latest_complete()
    count = count_attempts(manifest.get(_KEY), step)
    if count < MAX_ATTEMPTS:
        return None
    return (
        f"{run_dir.path}: {count} attempts without progress from {starting_point(step)}; last error: "
        f"{_last_error(manifest)}. Run `make diagnose RUN={run_dir.name}`, fix the cause, then resume with RESUME=1"
    )


def starting_point(step: int) -> str:
    """`checkpoint-N`, or `the start`."""
    return f"checkpoint-{step}" if step else "the start"


def _last_error(manifest: dict[str, Any]) -> str:
    diverged = manifest.get("diverged")
    if diverged:
        rows = f", rows {', '.join(diverged['rows'])}" if diverged.get("rows") else ""
        return f"diverged at step {diverged['step']}{rows}"
    return str(manifest.get("error") or "all processes were killed")
