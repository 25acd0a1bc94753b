"""Find the latest valid checkpoint of a run; all ranks verify it before anything in it is loaded."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import TrainingError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.checkpoint_format import CorruptCheckpointError

log = logging.getLogger(__name__)


class NoValidCheckpointError(TrainingError):
    """The run has saved, and no checkpoint is valid; it never restarts from step 0 silently."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint and the record in its commit marker."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.record["step"])


def find_latest_valid(plan: Plan, folder: RunDir, accelerator: Any) -> ResumePoint | None:
    """Return the latest valid checkpoint of this run; None if it has not saved yet.

    Collective: call on every rank. A corrupt checkpoint of this run is quarantined, any other is skipped in place.

    Raises:
        NoValidCheckpointError: the run has saved, and no checkpoint is valid.
    """
    from accelerate.utils import broadcast_object_list

    steps: list[Any] = [list(reversed(folder.numbered("checkpoint")))]
    broadcast_object_list(steps)
    skipped: list[str] = []
    for step in steps[0]:
        verified = verify_checkpoint(folder, step, plan.run_id, accelerator)
        if isinstance(verified, ResumePoint):
            return verified
        skipped.append(f"{folder.checkpoint(step).name}: {verified}")
        log.info("skipping %s", skipped[-1])
        if accelerator.is_main_process and checkpoint_format.UNREADABLE not in verified:
            _quarantine(folder, step, plan.run_id)
    lost: list[Any] = [_find_traces(folder) if accelerator.is_main_process else None]
    broadcast_object_list(lost)
    if skipped or lost[0]:
        reason = "; ".join(skipped) or lost[0]
        raise NoValidCheckpointError(
            f"{folder.path}: no valid checkpoint of this run ({reason}). Restore one, or start another run: NAME=…"
        )
    return None


def _find_traces(folder: RunDir) -> str | None:
    """Return how a run without a checkpoint shows that it had one; None if it does not."""
    saved_step = read_json(folder.manifest).get("saved_step")
    quarantined = sorted(path.name for path in folder.path.glob("checkpoint-*.corrupt-*"))
    if saved_step:
        return f"step {saved_step} was saved, found no checkpoint"
    return f"found only {quarantined[-1]}" if quarantined else None


def remove_incomplete(folder: RunDir) -> None:
    """Remove what an earlier attempt was writing or removing when it ended; on rank 0, before it saves."""
    for path in sorted(folder.saving.glob("*")):
        log.info("removing incomplete %s: the earlier attempt ended while writing it", path.name)
    for directory in (folder.saving, folder.removing):
        try:
            if directory.exists():
                shutil.rmtree(directory)
        except OSError as error:
            log.warning("%s could not be removed (%s)", directory, error.strerror)


def verify_checkpoint(folder: RunDir, step: int, run_id: str, accelerator: Any) -> ResumePoint | str:
    """Verify a checkpoint on all ranks; return it, or the reason why a run cannot resume from it.

    Collective: call on every rank.
    """
    from accelerate.utils import broadcast_object_list

    records: list[Any] = [_read_record(folder, step, run_id) if accelerator.is_main_process else None]
    broadcast_object_list(records)  # every rank takes the same branch, whatever it can read itself
    record: dict[str, Any] | str = records[0]
    if isinstance(record, str):
        return record
    problem = verify_on_all_ranks(folder.checkpoint(step), record, accelerator)
    return problem or ResumePoint(folder.checkpoint(step), record)


def _read_record(folder: RunDir, step: int, run_id: str) -> dict[str, Any] | str:
    try:
        return checkpoint_format.read_own_record(folder, step, run_id)
    except CorruptCheckpointError as error:
        return str(error)


def verify_on_all_ranks(path: Path, record: dict[str, Any], accelerator: Any) -> str | None:
    """Verify each file on one rank; return the first problem of any rank. Collective: call on every rank."""
    from accelerate.utils import gather_object

    rank = accelerator.process_index
    if checkpoint_format.wait_until_visible(path):
        names = checkpoint_format.assign_files(record, rank, accelerator.num_processes)
        problem = checkpoint_format.verify_checksums(path, record, names)
    else:
        problem = f"not visible on rank {rank}, {checkpoint_format.UNREADABLE}"
    return next((problem for problem in gather_object([problem]) if problem), None)


def _quarantine(folder: RunDir, step: int, run_id: str) -> None:
    """Quarantine a corrupt checkpoint of this run, so that retention does not count it."""
    checkpoint = folder.checkpoint(step)
    if isinstance(_read_record(folder, step, run_id), str):
        return
    try:
        log.info("%s quarantined as %s", checkpoint.name, checkpoint_format.quarantine(checkpoint).name)
    except OSError as error:
        log.warning("%s could not be renamed (%s)", checkpoint, error.strerror)
