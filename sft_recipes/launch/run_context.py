"""What a command that starts ranks works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir


def _no_changes() -> list[str]:
    return []


@dataclass(frozen=True)
class RunContext:
    """A plan, where it runs, and who can stop it.

    Attributes:
        run_dir: run directory, or that of a sanity check or a replay.
        nodes: the node launchers, led by this one; None on one machine.
        suggest_cheaper: returns the cheapest changes that need less memory, as `key=value`.
    """

    run_dir: RunDir
    plan: Plan
    stop_request: StopRequest
    nodes: NodeLaunchers | None = None
    suggest_cheaper: Callable[[], list[str]] = _no_changes

    def within(self, run_dir: RunDir, plan: Plan | None = None) -> RunContext:
        """Return this context with another run directory and, if given, another plan."""
        return replace(self, run_dir=run_dir, plan=plan or self.plan)
