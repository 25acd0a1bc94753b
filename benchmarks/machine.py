"""Says which machine and code a results file was measured on, and what its processor's memory was asked for."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WRITTEN_HERE = ("results", "plots", "README.md")  # by the measurements themselves


def described() -> dict[str, object]:
    """Processor, cores and system."""
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}


def commit() -> str:
    """The checkout's commit, with `-dirty` where code differs from it; `unknown` where this is no checkout."""
    found = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", *(f":(exclude){name}" for name in WRITTEN_HERE))
    return f"{found}-dirty" if changed else found or "unknown"


def _git(*words: str) -> str:
    asked = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def python_path(*folders: Path) -> str:
    """PYTHONPATH of a process that imports from these folders, then from the user's own: its packages may be there."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def at_least_one(word: str) -> int:
    """A command line's number of times.

    Raises:
        ValueError: it is none; argparse says so.
    """
    number = int(word)
    if number < 1:
        raise ValueError
    return number


def results(kind: str, card: str | None) -> Path:
    """The file of what was measured on this machine."""
    return HERE / "results" / f"{kind}-{card or f'{os.cpu_count()}-cores'}.json"


def begun(target: Path, again: bool = False, **circumstances: Any) -> dict[str, Any]:
    """What a results file holds already, where it is of this machine and of these circumstances; else, and where it is
    to be had `again`, a new one's beginning."""
    circumstances["machine"] = described()
    content: dict[str, Any] = json.loads(target.read_text()) if target.is_file() and not again else {}
    if all(content.get(key) == value for key, value in circumstances.items()):
        return content
    return {**circumstances, "rows": {}}


def write(target: Path, content: dict[str, Any]) -> None:
    """Writes a results file, all of it or nothing."""
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(target)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def most_held(tracker: Any, within: str | None = None) -> int:
    """The largest sum of allocations, in bytes, that a stopped `torch.profiler.profile(profile_memory=True)` of the CPU
    saw since it was started: at any time, or `within` the one event of this name."""
    events = tracker.profiler.kineto_results.events()
    spans = [(event.start_ns(), event.end_ns()) for event in events if event.name() == within]
    held = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        if within is None or any(began <= event.start_ns() <= ended for began, ended in spans):
            most = max(most, held)
    return most
