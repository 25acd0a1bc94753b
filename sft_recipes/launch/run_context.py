"""What a command that starts ranks works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sft_recipes.launch.placement import Placement
from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir


@dataclass(frozen=True)
class RunContext:
    """A plan, where it runs, and who can stop it.

    Attributes:
        run_dir: run directory, or that of a sanity check or a replay.
        suggest_cheaper: returns the cheapest changes that need less memory, as `key=value`.
        placement: this node's place; None on one machine.
    """

    run_dir: RunDir
    plan: Plan
    stop_request: StopRequest
    suggest_cheaper: Callable[[], list[str]] = list
    placement: Placement | None = None

    @property
    def is_first_node(self) -> bool:
        """Whether this launcher writes the files that all nodes read, and prints the results."""
        return self.placement is None or self.placement.is_first

    def agree(self, code: int = 0) -> int:
        """Return the first exit code other than 0 of any node: all continue, or none. Call on every node."""
        return self.placement.agree(code, self.stop_request) if self.placement else code

    def within(self, run_dir: RunDir, plan: Plan | None = None) -> RunContext:
        """Return this context with another run directory and, if given, another plan."""
        return replace(self, run_dir=run_dir, plan=plan or self.plan)
