"""Atomic writes by all ranks, which survive a full disk.

The libraries below write file after file, with barriers in between: a rank that raised there would leave the others
waiting indefinitely. So write errors are collected, every rank reaches the end, and all ranks agree on the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.units import GIB
from sft_recipes.training import rank_heartbeat
from sft_recipes.training.checkpoint import checkpoint_format

# In messages of torch and Rust about a file that cannot be written (inline_container.cc; std::io::Error).
_WRITE_ERRORS = (
    "PytorchStreamWriter",
    "inline_container",
    "Parent directory",
    "File cannot be opened",
    "iostream error",
    "(os error ",
)


def is_write_error(error: Exception) -> bool:
    """Whether a file could not be written: torch raises a RuntimeError for it, tokenizers a bare Exception."""
    return isinstance(error, (OSError, SafetensorError)) or any(text in str(error) for text in _WRITE_ERRORS)


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
        """Turn a write error into a failure of the current save; other errors propagate."""
        try:
            yield
        except Exception as error:
            if not is_write_error(error):
                raise
            self._error = self._error or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def check_first_save(self, save: Callable[[Path], None]) -> str | None:
        """Try what the first save needs in addition to the weights; return why it would fail, the same on every rank.

        Collective: call on every rank.

        Args:
            save: writes the other files of a model to a folder; called on the main process.
        """
        self._error = None
        if self.accelerator.is_main_process:
            try:
                self.folder.saving.mkdir(exist_ok=True)
                self._check_space(self.expected_bytes)
                with tempfile.TemporaryDirectory(dir=self.folder.saving, ignore_cleanup_errors=True) as partial:
                    save(Path(partial))
            except Exception as error:  # also of a library that rejects its own values when it saves them
                self._error = " ".join(str(error).split())[:200] or type(error).__name__
            with contextlib.suppress(OSError):
                self.folder.saving.rmdir()
        return self._any_error()

    def write_atomically(
        self,
        target: Path,
        write: Callable[[], None],
        record: dict[str, Any],
        required: frozenset[str] = frozenset(),
        expected_bytes: int = 0,
    ) -> str | None:
        """Write `target` on all ranks; return None on success, else the reason, the same on every rank.

        Collective: call on every rank.

        Args:
            write: writes this rank's files into `.saving/NAME`, NAME being the target's.
            record: content of the commit marker, in addition to the files.
            required: files without which the directory is incomplete.
            expected_bytes: required free space.
        """
        partial, self._error = self.folder.saving / target.name, None
        rank_heartbeat.beat(int(record["step"]), "saving")
        with self.collect_write_errors():
            if self.accelerator.is_main_process:
                self._create_partial(partial, expected_bytes)
        if error := self._any_error():
            return error
        with self.collect_write_errors():
            self._check_visible(partial)
        if error := self._any_error():
            return error
        with self.collect_write_errors():
            write()
        own_files: dict[str, Any] = {}
        with self.collect_write_errors():
            rank = self.accelerator.process_index
            names = checkpoint_format.list_files(partial)
            own = [name for name in names if checkpoint_format.writing_rank(name) == rank]
            own_files = checkpoint_format.compute_checksums(partial, own)
        files = self._gather_files(own_files)
        error = self._any_error() or _find_missing(required, files)  # a write error is the better reason
        if error is None:
            with self.collect_write_errors():
                if self.accelerator.is_main_process:
                    checkpoint_format.write_commit_marker(partial, {**record, "files": files})
                    checkpoint_format.publish(partial, target, self.folder.removing)
            error = self._any_error()
        if error is None:
            with self.collect_write_errors():
                self._check_visible(target)
            error = self._any_error()
        elif self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # an incomplete directory may fill the disk
        if self.accelerator.is_main_process:
            for directory in (self.folder.saving, self.folder.removing):
                with contextlib.suppress(OSError):  # missing, or not empty
                    directory.rmdir()
        return error

    def save_checkpoint(self, step: int, write: Callable[[], None], record: dict[str, Any]) -> str | None:
        """Write a checkpoint; return None on success, else the reason, and set `retry_at_step`.

        Collective: call on every rank.
        """
        started = time.perf_counter()
        complete_record = {
            "run_id": self.plan.run_id,
            "plan": dataclasses.asdict(self.plan),  # for a run that lost its plan.json
            "step": step,
            "world_size": self.plan.world_size,
            "parallelism": self.plan.parallelism,
            **record,
        }
        target = self.folder.checkpoint(step)
        required = frozenset(checkpoint_format.required_files(self.plan, step))
        error = self.write_atomically(target, write, complete_record, required, self.expected_bytes)
        if error is not None:
            self.retry_at_step = step + max(int(self.plan.sections.trainer["save_steps"]) // 10, 1)
            return error
        self.retry_at_step = None
        if self.accelerator.is_main_process:
            files = checkpoint_format.read_commit_marker(target)["files"]
            self.expected_bytes = sum(file["bytes"] for file in files.values())
        self.save_seconds = time.perf_counter() - started
        return None

    def _create_partial(self, partial: Path, expected_bytes: int) -> None:
        """Create an empty directory on a disk with enough space."""
        shutil.rmtree(self.folder.removing, ignore_errors=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        self._check_space(expected_bytes)

    def _check_space(self, expected_bytes: int) -> None:
        free = shutil.disk_usage(self.folder.saving).free
        if free < expected_bytes:
            raise OSError(
                f"not enough disk space in {self.folder.path}: "
                f"found {free / GIB:.1f} GiB, expected {expected_bytes / GIB:.1f} GiB"
            )

    def _check_visible(self, target: Path) -> None:
        """Every rank writes here, and resumes from here."""
        if not checkpoint_format.wait_until_visible(target):
            raise OSError(
                f"{target.name} is not visible on rank {self.accelerator.process_index} after "
                f"{timeouts.CHECKPOINT_VISIBLE:.0f} s; put {self.folder.path} on a disk that all nodes share"
            )

    def _gather_files(self, files: dict[str, Any]) -> dict[str, Any]:
        from accelerate.utils import gather_object

        return {name: file for rank_files in gather_object([files]) for name, file in rank_files.items()}

    def _any_error(self) -> str | None:
        """Return the first write error of any rank. Collective."""
        from accelerate.utils import gather_object

        return next((error for error in gather_object([self._error]) if error), None)


def _find_missing(required: frozenset[str], files: dict[str, Any]) -> str | None:
    missing = sorted(required - files.keys())
    if missing:
        return f"{missing[0]} was not written"
    return None if any(name.endswith(".safetensors") for name in files) else "no weights were written"
