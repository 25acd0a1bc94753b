"""Estimate the duration of a save: checkpoint bytes over the disk speed, measured or assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.planner.cost import WRITE_BYTES_PER_SECOND
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.run_dir import read_json, runs_root, write_json
from sft_recipes.runtime.units import format_duration

# Lower bound per node without a measurement: a SATA SSD, a busy shared file system.
SLOW_DISK_BYTES_PER_SECOND = 500_000_000
_TIMES_MEASURED = 3
_TIMES_LARGER = 1000


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second of a save, hashing and fsync included; `measured` is the date, None if assumed."""

    bytes_per_second: float
    measured: str | None


def _file() -> Path:
    return runs_root() / ".saving.json"


def disk_speed(plan: Plan) -> DiskSpeed:
    """Return the disk speed that the latest sanity check measured, else an assumption.

    Saves under 1/1000 of this plan's size measure latency, so they are ignored.
    """
    record = read_json(_file())
    if record.get("seconds") and record["bytes"] * _TIMES_LARGER >= (plan.checkpoint_bytes or 0):
        return DiskSpeed(record["bytes"] / record["seconds"], str(record["measured"]))
    return DiskSpeed(WRITE_BYTES_PER_SECOND, None)


def record_speed(saved_bytes: int, seconds: float, date: str) -> None:
    """Store the measurement of a sanity check."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(), {"bytes": saved_bytes, "seconds": round(seconds, 3), "measured": date})


def save_seconds(plan: Plan) -> float | None:
    """Return the expected seconds per save; None if the checkpoint size is not known."""
    return None if plan.checkpoint_bytes is None else plan.checkpoint_bytes / disk_speed(plan).bytes_per_second


def max_save_seconds(plan: Plan) -> float:
    """Return the seconds after which a save counts as stalled: a slow disk, or three times the measurement."""
    measured = save_seconds(plan) if disk_speed(plan).measured else None
    return max(
        (plan.checkpoint_bytes or 0) / plan.nodes / SLOW_DISK_BYTES_PER_SECOND, _TIMES_MEASURED * (measured or 0.0)
    )


def grace_seconds(plan: Plan) -> int:
    """Return the seconds between a stop request and SIGKILL."""
    return max(timeouts.MIN_SAVE_GRACE, math.ceil(max_save_seconds(plan)))


def describe(plan: Plan) -> str:
    """Return the line of the printed plan."""
    duration, speed = save_seconds(plan), disk_speed(plan)
    if duration is None:
        return "unknown: model.architecture is not set"
    source = f"measured by the sanity check of {speed.measured}" if speed.measured else "assumed until a sanity check"
    return (
        f"{format_duration(duration)} at {speed.bytes_per_second / 1e9:.2g} GB/s, {source}; "
        f"SIGKILL {grace_seconds(plan)} s after a stop request"
    )
