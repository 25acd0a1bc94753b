"""Counts the starts of a run that brought it no further, so that what ends each of them does not go on for ever.

The count is written before the ranks start, so it is there also where nobody was left to say how a start ended.
"""

from __future__ import annotations

from typing import Any

from sft_recipes.launch.run_selection import Start
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json

STARTS_AT_MOST = 3
_KEY = "starts_without_progress"


def count(folder: RunDir) -> None:
    """One more start, from the newest whole checkpoint; a newer one than at the last start begins the count anew."""
    manifest, step = read_json(folder.manifest), folder.latest_complete()
    write_json(folder.manifest, {**manifest, _KEY: {"step": step, "count": _counted(manifest, step) + 1}})


def forgive(folder: RunDir) -> None:
    """The newest start is not counted: it ended as it was asked to."""
    manifest = read_json(folder.manifest)
    if counted := manifest.get(_KEY):
        write_json(folder.manifest, {**manifest, _KEY: {**counted, "count": counted["count"] - 1}})


def refusal(start: Start) -> str | None:
    """Why there is no further start; None where there is one, or where the user insists on it."""
    return None if start.insisted or not start.goes_on else exhausted(start.folder)


def exhausted(folder: RunDir) -> str | None:
    """That as many starts as may be have brought this run no further, and what to do; None where there is one left."""
    manifest, step = read_json(folder.manifest), folder.latest_complete()
    counted = _counted(manifest, step)
    if counted < STARTS_AT_MOST:
        return None
    at = f"checkpoint-{step}" if step else "its beginning"
    return (
        f"{folder.path}: {counted} starts in a row have come no further than {at}; the last one: "
        f"{_how_it_ended(manifest)}; `make diagnose RUN={folder.name}`, mend the cause, then RESUME=1 goes on"
    )


def _counted(manifest: dict[str, Any], step: int) -> int:
    before = manifest.get(_KEY) or {}
    return int(before["count"]) if before.get("step") == step else 0


def _how_it_ended(manifest: dict[str, Any]) -> str:
    diverged = manifest.get("diverged")
    if diverged:
        rows = f", rows {', '.join(diverged['rows'])}" if diverged.get("rows") else ""
        return f"diverged at step {diverged['step']}{rows}"
    return str(manifest.get("error") or "was cut off with all its processes")
