"""The machine and commit of a results file, and peak allocations on the CPU."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GENERATED = ("results", "plots", "README.md")


def described() -> dict[str, object]:
    """Processor, cores and system."""
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}


def commit() -> str:
    """The checkout's commit, with `-dirty` if there are uncommitted changes; `unknown` outside a checkout."""
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", *(f":(exclude){name}" for name in GENERATED))
    return f"{revision}-dirty" if changed else revision or "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders before those of this process."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def at_least_one(word: str) -> int:
    """Parse a positive number; argparse reports the error.

    Raises:
        ValueError: not a positive integer.
    """
    number = int(word)
    if number < 1:
        raise ValueError
    return number


def results(kind: str, card: str | None) -> Path:
    """The results file of this machine."""
    return HERE / "results" / f"{kind}-{card or f'{os.cpu_count()}-cores'}.json"


def begun(target: Path, again: bool = False, **circumstances: Any) -> dict[str, Any]:
    """The results of this machine under these circumstances; if there are none, or with `again`, an empty file."""
    circumstances["machine"] = described()
    content: dict[str, Any] = json.loads(target.read_text()) if target.is_file() and not again else {}
    if all(content.get(key) == value for key, value in circumstances.items()):
        return content
    return {**circumstances, "rows": {}}


def write(target: Path, content: dict[str, Any]) -> None:
    """Write a results file atomically."""
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(target)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_allocated(tracker: Any, within: str | None = None) -> int:
    """The peak of allocations, in bytes, in a stopped `torch.profiler.profile(profile_memory=True)` of the CPU.

    Args:
        within: count only during the event of this name.
    """
    events = tracker.profiler.kineto_results.events()
    spans = [(event.start_ns(), event.end_ns()) for event in events if event.name() == within]
    held = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        if within is None or any(began <= event.start_ns() <= ended for began, ended in spans):
            most = max(most, held)
    return most
