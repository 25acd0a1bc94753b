"""Says which machine a results file was measured on, and what its processor's memory was asked for."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def described() -> dict[str, object]:
    """Processor, cores and system."""
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}


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
