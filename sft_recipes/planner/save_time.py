"""Says how long a save takes: its bytes over what the runs' disk was measured to write, else over an assumption."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.planner.cost import WRITE_BYTES_PER_SECOND
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.run_dir import read_json, runs_root, write_json

# What a disk of runs takes from a node at the least, where nothing was measured: a SATA SSD, a busy shared file system.
SLOW_DISK_BYTES_PER_SECOND = 500_000_000
_TIMES_MEASURED = 3
_TIMES_LARGER = 1000


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second from a step's end to a sealed checkpoint, hashing and syncing included; `measured` is the date."""

    bytes_per_second: float
    measured: str | None


def _file() -> Path:
    return runs_root() / ".saving.json"


def disk_speed(plan: Plan) -> DiskSpeed:
    """What the newest sanity run measured on the disk of the runs; an assumption where there was none, or its save was
    so small beside this plan's that it tells how long a save takes to begin."""
    found = read_json(_file())
    if found.get("seconds") and found["bytes"] * _TIMES_LARGER >= (plan.checkpoint_bytes or 0):
        return DiskSpeed(found["bytes"] / found["seconds"], str(found["measured"]))
    return DiskSpeed(WRITE_BYTES_PER_SECOND, None)


def record_speed(saved_bytes: int, seconds: float, date: str) -> None:
    """Keeps what a sanity run measured."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(), {"bytes": saved_bytes, "seconds": round(seconds, 3), "measured": date})


def save_seconds(plan: Plan) -> float | None:
    """How long a save of this plan takes; None where its bytes are not known."""
    return None if plan.checkpoint_bytes is None else plan.checkpoint_bytes / disk_speed(plan).bytes_per_second


def max_save_seconds(plan: Plan) -> float:
    """What a save may take before it is taken for a hang: by a slow disk, or three times what was measured."""
    measured = save_seconds(plan) if disk_speed(plan).measured else None
    return max(
        (plan.checkpoint_bytes or 0) / plan.nodes / SLOW_DISK_BYTES_PER_SECOND, _TIMES_MEASURED * (measured or 0.0)
    )


def grace_seconds(plan: Plan) -> int:
    """What is given to ranks that were asked to stop, before they are killed."""
    return max(timeouts.MIN_SAVE_GRACE, math.ceil(max_save_seconds(plan)))


def describe(plan: Plan) -> str:
    """A line of the plan."""
    took, found = save_seconds(plan), disk_speed(plan)
    if took is None:
        return "not known: model.architecture is not given"
    source = (
        f"measured by the sanity run of {found.measured}"
        if found.measured
        else "assumed until a sanity run measures it"
    )
    shown = f"{took / 60:.0f} minutes" if took >= 120 else f"{took:.1f} s"
    return (
        f"{shown} at {found.bytes_per_second / 1e9:.2g} GB/s, {source}; a stop takes that long, the launcher waits "
        f"{grace_seconds(plan)} s"
    )
