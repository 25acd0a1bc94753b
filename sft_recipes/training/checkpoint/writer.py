"""Atomic writes by all ranks, which survive a full disk.

The libraries below write file after file, with barriers in between: a rank that raised there would leave the others
waiting indefinitely. So errors are collected, every rank reaches the end, and all ranks agree on the result.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.units import GIB
from sft_recipes.training import out_of_memory, rank_heartbeat
from sft_recipes.training.checkpoint import checkpoint_format


class CheckpointWriter:
    """One rank's part in a collective, atomic write.

    Attributes:
        retry_at_step: the step at which a failed save is tried again; None after a successful one.
        expected_bytes: free space required before a save: the plan's estimate, then the size of the last checkpoint.
        save_seconds: duration of the last save.
    """

    def __init__(self, plan: Plan, folder: RunDir, accelerator: Any):
        self.plan = plan
        self.folder = folder
        self.accelerator = accelerator
        self.retry_at_step: int | None = None
        self.expected_bytes = plan.checkpoint_bytes or 0
        self.save_seconds = 0.0
        self._error: str | None = None

    @contextlib.contextmanager
    def collect_write_errors(self) -> Iterator[None]:
        """Turn an error, except out of memory, into a failure of the current save: libraries have no class of their own
        for a file that cannot be written."""
        try:
            yield
        except Exception as error:
            if out_of_memory.is_out_of_memory(error):
                raise
            self._error = self._error or " ".join(str(error).split())[:200] or type(error).__name__

    def write_atomically(
        self, target: Path, write: Callable[[], None], record: dict[str, Any], checkpoint_bytes: int | None = None
    ) -> str | None:
        """Write `target` on all ranks; return None on success, else the reason, the same on every rank.

        Collective: call on every rank.

        Args:
            write: writes this rank's files into `.saving/NAME`, NAME being the target's.
            record: content of the commit marker, in addition to the files.
            checkpoint_bytes: required free space of a checkpoint, which must have all its files.
        """
        partial, self._error = self.folder.saving / target.name, None
        files: dict[str, Any] = {}
        rank_heartbeat.beat(int(record["step"]), "saving")

        def hash_files() -> None:
            names, rank = checkpoint_format.list_files(partial), self.accelerator.process_index
            own = (name for name in names if checkpoint_format.writing_rank(name) == rank)
            files.update(checkpoint_format.compute_checksums(partial, own))

        def commit() -> None:
            for rank_files in gather_object([files]):
                files.update(rank_files)
            if checkpoint_bytes is not None:
                self.expected_bytes = sum(file["bytes"] for file in files.values())
                if missing := checkpoint_format.find_missing(self.plan, files):
                    raise OSError(missing)
            if self.accelerator.is_main_process:
                checkpoint_format.write_commit_marker(partial, {**record, "files": files})
                checkpoint_format.publish(partial, target, self.folder.removing)

        for phase in (
            lambda: self.accelerator.is_main_process and self._create_partial(partial, checkpoint_bytes or 0),
            lambda: self._check_visible(partial),
            write,
            hash_files,
            commit,
        ):
            with self.collect_write_errors():
                phase()
            if error := self._any_error():
                break
        if self.accelerator.is_main_process:  # an incomplete directory may fill the disk
            shutil.rmtree(self.folder.saving, ignore_errors=True)
        return error

    def save_checkpoint(self, step: int, write: Callable[[], None], record: dict[str, Any]) -> str | None:
        """Write a checkpoint; return None on success, else the reason, and set `retry_at_step`.

        Collective: call on every rank.
        """
        started, plan = time.perf_counter(), self.plan
        record = {**record, "run_id": plan.run_id, "step": step, "world_size": plan.world_size}
        # The plan is for a run that lost its plan.json.
        record |= {"parallelism": plan.parallelism, "plan": dataclasses.asdict(plan)}
        error = self.write_atomically(self.folder.checkpoint(step), write, record, self.expected_bytes)
        self.retry_at_step = step + max(int(plan.sections.trainer["save_steps"]) // 10, 1) if error else None
        self.save_seconds = time.perf_counter() - started
        return error

    def _create_partial(self, partial: Path, expected_bytes: int) -> None:
        """Create an empty directory on a disk with enough space."""
        for directory in (self.folder.saving, self.folder.removing):
            shutil.rmtree(directory, ignore_errors=True)
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < expected_bytes:
            raise OSError(f"not enough disk space: found {free / GIB:.1f} GiB, expected {expected_bytes / GIB:.1f} GiB")

    def _check_visible(self, partial: Path) -> None:
        """Every rank writes here, and resumes from this disk."""
        if not checkpoint_format.wait_until_visible(partial):
            rank = self.accelerator.process_index
            raise OSError(f"{partial} is not visible on rank {rank}: use a disk that all nodes share")

    def _any_error(self) -> str | None:
        """Return the first error of any rank. Collective."""
        return next((error for error in gather_object([self._error]) if error), None)
