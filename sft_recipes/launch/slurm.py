"""Query Slurm: the job of a run, and the nodes of a job. Standard library only: `outcome.py` uses it."""

from __future__ import annotations

import re

from sft_recipes.runtime import timeouts
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.programs import run_program

# States of sinfo(1), without their flags. A node that does not answer yet (`*`) becomes DOWN after SlurmdTimeout.
_LOST = ("down", "fail", "failing", "error", "rebooting", "unknown")


def ask(*command: str) -> str:
    """Return the output of a command of Slurm; empty if there is none, it fails, or the controller does not answer."""
    code, output = run_program(*command, timeout=timeouts.SLURM_COMMAND)
    return "" if code else output


def query_job(job: str | None) -> dict[str, str] | None:
    """Return a job's state from squeue; None if there is no Slurm here or it no longer knows the job."""
    if not job:
        return None
    names = ("id", "name", "state", "reason", "ran", "left", "nodes")
    listed = ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%A|%j|%T|%r|%M|%L|%N")
    rows = [dict(zip(names, line.split("|"), strict=False)) for line in listed.splitlines()]
    state = next((row for row in rows if row["id"] == job), None)  # an array has a row for each task
    return state and {key: value for key, value in state.items() if value not in ("None", "")}


def wait_for_lost_nodes(nodes: str) -> list[str]:
    """Return the lost nodes of a job, waiting up to SlurmdTimeout: a rank may notice a lost node before Slurm does."""

    def states() -> list[tuple[str, str]]:
        lines = ask("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %T").splitlines()
        return sorted({(name, state) for name, state in map(str.split, lines)})  # a node may be in several partitions

    def lost() -> list[str]:
        return [name for name, state in states() if state.rstrip("*~#!%$@^-+") in _LOST]

    limit = re.search(r"SlurmdTimeout\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    seconds = (float(limit[1]) if limit else timeouts.SLURMD) + timeouts.POLL_NODE_STATES
    return wait_until(lost, seconds, timeouts.POLL_NODE_STATES) or [n for n, state in states() if state.endswith("*")]
