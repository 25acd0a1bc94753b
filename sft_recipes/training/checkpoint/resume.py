"""Find the latest valid checkpoint of a run; all ranks verify it before anything in it is loaded."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list, gather_object

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import TrainingError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.checkpoint_format import CorruptCheckpointError

log = logging.getLogger(__name__)


class NoValidCheckpointError(TrainingError):
    """The run has saved, and no checkpoint is valid; it never restarts from step 0 silently."""


class ResumePoint(NamedTuple):
    """A verified checkpoint and the record in its commit marker."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.record["step"])


def find_latest_valid(plan: Plan, folder: RunDir, accelerator: Any) -> ResumePoint | None:
    """Return the latest valid checkpoint of this run; None if it has not saved yet.

    Collective: call on every rank. A corrupt checkpoint of this run is quarantined, so that retention does not count
    it; any other is skipped in place. What an earlier attempt was writing or removing when it ended is removed.

    Raises:
        NoValidCheckpointError: the run has saved, and no checkpoint is valid.
    """
    has_saved = [any(folder.path.glob("checkpoint-*")) or bool(read_json(folder.manifest).get("saved_step"))]
    broadcast_object_list(has_saved)
    steps = folder.numbered("checkpoint")[::-1]
    point, skipped = find_valid(folder, steps, plan.run_id, accelerator, quarantine=True)
    if point is None and has_saved[0]:
        reason = "; ".join(skipped) or "found none"
        fix = "Restore one, or start another run: NAME=…"
        raise NoValidCheckpointError(f"{folder.path}: no valid checkpoint of this run ({reason}). {fix}")
    if accelerator.is_main_process:
        _remove_incomplete(folder)
    return point


def find_valid(
    folder: RunDir, steps: Sequence[int], run_id: str, accelerator: Any, quarantine: bool = False
) -> tuple[ResumePoint | None, list[str]]:
    """Return the first valid checkpoint of these steps, and `checkpoint-N: reason` of each skipped one.

    Collective: call on every rank; the main process reads the commit markers.

    Args:
        quarantine: rename corrupt checkpoints of this run.
    """
    records: list[Any] = [{step: _read_record(folder, step, run_id) for step in steps}]
    broadcast_object_list(records)  # every rank takes the same branch, whatever it can read itself
    skipped = []
    for step, record in records[0].items():
        path = folder.checkpoint(step)
        is_own = isinstance(record, dict)
        problem = verify_on_all_ranks(path, record, accelerator) if is_own else record
        if problem is None:
            return ResumePoint(path, record), skipped
        skipped.append(f"{path.name}: {problem}")
        log.info("skipping %s", skipped[-1])
        if quarantine and is_own and accelerator.is_main_process and checkpoint_format.UNREADABLE not in problem:
            try:
                log.info("%s quarantined as %s", path.name, checkpoint_format.quarantine(path).name)
            except OSError as error:
                log.warning("%s could not be renamed (%s)", path, error.strerror)
    return None, skipped


def _read_record(folder: RunDir, step: int, run_id: str) -> dict[str, Any] | str:
    try:
        return checkpoint_format.read_commit_marker(folder.checkpoint(step), run_id=run_id, step=step)
    except CorruptCheckpointError as error:
        return str(error)


def verify_on_all_ranks(path: Path, record: dict[str, Any], accelerator: Any) -> str | None:
    """Verify each file on one rank; return the first problem of any rank. Collective: call on every rank."""
    rank = accelerator.process_index
    if checkpoint_format.wait_until_visible(path):
        problem = checkpoint_format.verify_checksums(path, record, rank, accelerator.num_processes)
    else:
        problem = f"not visible on rank {rank}, {checkpoint_format.UNREADABLE}"
    return next((problem for problem in gather_object([problem]) if problem), None)


def _remove_incomplete(folder: RunDir) -> None:
    """Remove what an earlier attempt was writing or removing when it ended."""
    for path in sorted(folder.saving.glob("*")):
        log.info("removing incomplete %s: the earlier attempt ended while writing it", path.name)
    for directory in (folder.saving, folder.removing):
        shutil.rmtree(directory, ignore_errors=True)
