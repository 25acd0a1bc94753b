"""Estimate the duration of a save: checkpoint bytes over the disk speed, measured or assumed."""

from __future__ import annotations

import math
from pathlib import Path

from sft_recipes.planner.cost import WRITE_BYTES_PER_SECOND
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.run_dir import read_json, runs_root, write_json
from sft_recipes.runtime.units import format_duration

# Lower bound per node without a measurement: a SATA SSD, a busy shared file system.
SLOW_DISK_BYTES_PER_SECOND = 500_000_000


def _file() -> Path:
    return runs_root() / ".saving.json"


def _measured_speed(plan: Plan) -> float | None:
    """Return the bytes per second that the latest sanity check measured, hashing and fsync included; None without one.

    Saves under 1/1000 of this plan's size measure latency, so they are ignored.
    """
    record = read_json(_file())
    if record.get("seconds") and record["bytes"] * 1000 >= (plan.checkpoint_bytes or 0):
        return float(record["bytes"] / record["seconds"])
    return None


def record_speed(saved_bytes: int, seconds: float) -> None:
    """Store the measurement of a sanity check."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(), {"bytes": saved_bytes, "seconds": round(seconds, 3)})


def save_seconds(plan: Plan) -> float | None:
    """Return the expected seconds per save; None if the checkpoint size is not known."""
    speed = _measured_speed(plan) or WRITE_BYTES_PER_SECOND
    return None if plan.checkpoint_bytes is None else plan.checkpoint_bytes / speed


def max_save_seconds(plan: Plan) -> float:
    """Return the seconds after which a save counts as stalled: a slow disk, or three times the measurement."""
    slow = (plan.checkpoint_bytes or 0) / plan.nodes / SLOW_DISK_BYTES_PER_SECOND
    return max(slow, 3 * (save_seconds(plan) or 0.0)) if _measured_speed(plan) else slow


def grace_seconds(plan: Plan) -> int:
    """Return the seconds between a stop request and SIGKILL."""
    return max(timeouts.MIN_SAVE_GRACE, math.ceil(max_save_seconds(plan)))


def describe(plan: Plan) -> str:
    """Return the line of the printed plan."""
    source = "measured by the latest sanity check" if _measured_speed(plan) else "assumed until a sanity check"
    return f"{format_duration(save_seconds(plan) or 0)}, {source}; SIGKILL {grace_seconds(plan)} s after a stop request"
