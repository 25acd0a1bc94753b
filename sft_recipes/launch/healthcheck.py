"""Health check of the image: exit code 1 if a run on this host is stalled."""

from __future__ import annotations

import sys
import time

from sft_recipes.launch import run_lock
from sft_recipes.launch.watchdog import Limits, RankStatus, all_stalled, stall_message
from sft_recipes.planner import plan as plans
from sft_recipes.planner.save_time import max_save_seconds
from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.run_dir import RunDir, runs_root


def find_stalled_runs() -> list[str]:
    """Return an error for each run that a live process holds and whose ranks on this host are stalled."""
    errors = []
    for name in run_lock.locked_runs():
        run_dir = RunDir(runs_root() / name)
        plan = plans.read(run_dir.plan)
        limits = Limits(plan.sections.monitor.heartbeat_timeout_seconds, max_save_seconds(plan))
        now = time.monotonic()
        ranks = [
            RankStatus(beat, heartbeat.process_state(beat.pid), now - beat.beat_at, now)
            for beat in heartbeat.read_heartbeats(run_dir.ranks).values()
            if run_lock.is_rank_of(run_dir, beat.pid)  # not a file of an earlier attempt
        ]
        if ranks and all_stalled(ranks, limits):
            errors.append(f"{name}: {stall_message(ranks, limits)}")
    return errors


if __name__ == "__main__":
    lines = find_stalled_runs()
    print("\n".join(lines) or "healthy")
    sys.exit(bool(lines))
