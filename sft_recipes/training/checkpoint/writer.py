"""Has all ranks write a folder together, whole or not at all, and outlives a disk that is full.

The libraries below write file after file and wait for each other in between: a rank that raised there would leave the
others waiting for ever. So what a disk refuses is remembered, every rank comes to the end, and all ranks learn of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
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

# What torch and Rust say of a file that cannot be written (inline_container.cc; std::io::Error).
_WRITER_SAYS = (
    "PytorchStreamWriter",
    "inline_container",
    "Parent directory",
    "File cannot be opened",
    "iostream error",
    "(os error ",
)


def refused_by_the_disk(error: Exception) -> bool:
    """Whether an error is that of a file that cannot be written; torch raises a RuntimeError for it, tokenizers a bare
    Exception with the words of Rust's I/O errors."""
    return isinstance(error, (OSError, SafetensorError)) or any(said in str(error) for said in _WRITER_SAYS)


class CheckpointWriter:
    """One rank's part in saving."""

    def __init__(self, plan: Plan, folder: RunDir, accelerator: Any):
        self.plan = plan
        self.folder = folder
        self.accelerator = accelerator
        self.try_again_at: int | None = None
        self.bytes_at_most = plan.checkpoint_bytes or 0
        self.seconds = 0.0
        self._refused: str | None = None

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """What the disk refuses in here fails the save that is under way, and nothing else."""
        try:
            yield
        except Exception as error:
            if not refused_by_the_disk(error):
                raise
            self._refused = self._refused or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def whole(
        self,
        target: Path,
        write: Callable[[], None],
        record: dict[str, Any],
        needed: frozenset[str] = frozenset(),
        bytes_at_most: int = 0,
    ) -> str | None:
        """All ranks write `target`; None where it is there, else why it is not, the same on all ranks.

        Args:
            write: writes this rank's files into `.saving/` under the target's name.
            record: what the seal says besides the files.
            needed: files without which it is not whole.
            bytes_at_most: what has to be free on the disk before the first byte.
        """
        partial, self._refused = self.folder.saving / target.name, None
        rank_heartbeat.moved(int(record["step"]), "saving")
        with self.tolerated():
            if self.accelerator.is_main_process:
                self._make_room(partial, bytes_at_most)
        if refused := self._agreed():
            return refused
        with self.tolerated():
            self._must_be_seen(partial)
        if refused := self._agreed():
            return refused
        with self.tolerated():
            write()
        files: dict[str, Any] = {}
        with self.tolerated():
            mine = [
                n
                for n in checkpoint_format.names(partial)
                if checkpoint_format.writer(n) == self.accelerator.process_index
            ]
            files = checkpoint_format.checksums(partial, mine)
        found = self._gathered(files)
        refused = self._agreed() or _missing(needed, found)  # what a disk said is the better reason
        if refused is None:
            with self.tolerated():
                if self.accelerator.is_main_process:
                    checkpoint_format.seal(partial, {**record, "files": found})
                    checkpoint_format.publish(partial, target, self.folder.removing)
            refused = self._agreed()
        if refused is None:
            with self.tolerated():
                self._must_be_seen(target)
            refused = self._agreed()
        elif self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # what it holds is of no use, and the disk may be full of it
        if self.accelerator.is_main_process:
            for place in (self.folder.saving, self.folder.removing):
                with contextlib.suppress(OSError):  # not there, or not empty
                    place.rmdir()
        return refused

    def checkpoint(self, step: int, write: Callable[[], None], record: dict[str, Any]) -> str | None:
        """A checkpoint of this step; None where it is there, else why it is not, and then `try_again_at` is set."""
        began = time.perf_counter()
        whole = {
            "run_id": self.plan.run_id,
            "plan": dataclasses.asdict(self.plan),  # for a run whose plan.json is lost
            "step": step,
            "world_size": self.plan.world_size,
            "parallelism": self.plan.parallelism,
            **record,
        }
        target = self.folder.checkpoint(step)
        needed = frozenset(checkpoint_format.needed(self.plan, step))
        refused = self.whole(target, write, whole, needed, self.bytes_at_most)
        if refused is not None:
            self.try_again_at = step + max(int(self.plan.sections.trainer["save_steps"]) // 10, 1)
            return refused
        self.try_again_at = None
        if self.accelerator.is_main_process:
            files = checkpoint_format.read(target)["files"]
            self.bytes_at_most = sum(file["bytes"] for file in files.values())
        self.seconds = time.perf_counter() - began
        return None

    def under_deepspeed(self, engine: Any) -> None:
        """DeepSpeed waits for all ranks between its writes, so none of them may raise; its own scripts are left out
        (`zero_to_fp32.py`: the checkpoint has the model's weights already)."""
        if getattr(engine, "_sft_tolerates", False):
            return
        write = engine.checkpoint_engine.save

        def save(*arguments: Any, **named: Any) -> None:
            with self.tolerated():
                write(*arguments, **named)

        engine.checkpoint_engine.save = save
        engine._copy_recovery_script = lambda _path: None
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, save_latest=False)
        engine._sft_tolerates = True

    def _make_room(self, partial: Path, bytes_at_most: int) -> None:
        """An empty folder to write to, on a disk that has room."""
        shutil.rmtree(self.folder.removing, ignore_errors=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < bytes_at_most:
            raise OSError(f"{free / GIB:.1f} GiB are free in {self.folder.path}, {bytes_at_most / GIB:.1f} are needed")

    def _must_be_seen(self, target: Path) -> None:
        """Every rank must be able to write there, and to go on from what was saved."""
        if not checkpoint_format.await_seen(target):
            raise OSError(
                f"rank {self.accelerator.process_index} does not see {target.name} "
                f"{timeouts.CHECKPOINT_VISIBLE:.0f} "
                f"seconds after it was made: is {self.folder.path} on a disk that all nodes share?"
            )

    def _gathered(self, mine: dict[str, Any]) -> dict[str, Any]:
        from accelerate.utils import gather_object

        return {name: of for files in gather_object([mine]) for name, of in files.items()}

    def _agreed(self) -> str | None:
        """What a disk refused any of the ranks; all ranks meet here."""
        from accelerate.utils import gather_object

        said = [one for one in gather_object([self._refused]) if one]
        return said[0] if said else None


def _missing(needed: frozenset[str], found: dict[str, Any]) -> str | None:
    absent = sorted(needed - found.keys())
    if absent:
        return f"{absent[0]} was not written"
    return None if any(name.endswith(".safetensors") for name in found) else "no weights were written"
