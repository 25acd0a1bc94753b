"""Says whether the runs that are carried out here move: the image's health check. Exit code 1 where one hangs."""

from __future__ import annotations

import sys
import time

from sft_recipes.launch import run_lock
from sft_recipes.launch.watchdog import Limits, RankStatus, hang_line, hangs
from sft_recipes.planner import plan as plans
from sft_recipes.planner.save_time import seconds_at_most
from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.run_dir import RunDir, runs_root


def hanging() -> list[str]:
    """What there is to say of each run that a live process holds and whose ranks on this host do not move."""
    said = []
    for name in run_lock.held_by():
        folder = RunDir(runs_root() / name)
        plan = plans.read(folder.plan)
        limits = Limits(plan.sections.monitor.heartbeat_timeout_seconds, seconds_at_most(plan))
        now = time.monotonic()
        ranks = [
            RankStatus(pulse, heartbeat.state(pulse.process), now - pulse.moved, now)
            for pulse in heartbeat.pulses(folder.ranks).values()
            if run_lock.is_rank_of(folder, pulse.process)  # and not one that an earlier start left
        ]
        if ranks and hangs(ranks, limits):
            said.append(f"{name}: {hang_line(ranks, limits)}")
    return said


if __name__ == "__main__":
    lines = hanging()
    print("\n".join(lines) or "healthy")
    sys.exit(bool(lines))
