"""What a rule tells: a finding, and the recipe's line to change with the value that this run's plan makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.config import sizes
from sft_recipes.monitor.metrics_log import Run


@dataclass(frozen=True)
class Finding:
    """A sign that a rule found: since which step, the figures that show it, and what to do, the first thing first.

    `severity` is red for what ruins a run, yellow for what wastes it.
    """

    rule: str
    severity: str
    step: int | None
    evidence: str
    advice: list[str]


def rate(run: Run, factor: float) -> str:
    """The learning rate `factor` times as high."""
    peak = run.plan.get("learning_rate")
    if not isinstance(peak, (int, float)):
        return f"`trainer.learning_rate`: {factor:.2g} times what it is"
    return _line(run, "learning_rate", sizes.scientific(peak * factor), sizes.scientific(peak))


def rate_of_the_row(run: Run) -> str:
    """The learning rate that the size row starts from."""
    start = sizes.size_classes()[str(run.plan["size"])].cells["learning_rate"].start
    line = _line(run, "learning_rate", sizes.scientific(start), sizes.scientific(run.plan["learning_rate"]))
    return f"{line}, where row {run.plan['size']} starts"


def longer_warmup(run: Run) -> list[str]:
    """Twice the warm-up, as far as the size row's range goes; nothing where it is there already."""
    now = run.plan.get("warmup_ratio")
    if not isinstance(now, (int, float)):
        return []
    row = sizes.size_classes().get(str(run.plan.get("size")))
    most = (row.cells["warmup_ratio"].range or [0, math.inf])[1] if row else math.inf
    wanted = min(max(2 * now, 0.03), most)
    return [_line(run, "warmup_ratio", f"{wanted:g}", f"{now:g}")] if wanted > now else []


def fewer_epochs(run: Run, step: int) -> list[str]:
    """As many epochs as the run had done at `step`; whole ones where it had done one."""
    most = run.section("trainer").get("max_steps", -1)
    if isinstance(most, int) and most > 0:
        return [f"`trainer.max_steps: {step}` (was {most})"] if 0 < step < most else []
    now, per_epoch = run.plan.get("num_train_epochs"), run.planned("steps_per_epoch")
    if not isinstance(now, (int, float)) or not per_epoch or step <= 0:
        return []
    done = step / per_epoch
    wanted = math.ceil(round(done, 2)) if done > 1 else math.ceil(done * 10) / 10
    return [_line(run, "num_train_epochs", f"{wanted:g}", f"{now:g}")] if wanted < now else []


def more_weight_decay(run: Run) -> list[str]:
    """The documents' 0.05 to 0.1: the first of them that is more than now."""
    now = run.plan.get("weight_decay")
    wanted = next((value for value in (0.05, 0.1) if isinstance(now, (int, float)) and value > now), None)
    return [] if wanted is None else [_line(run, "weight_decay", f"{wanted:g}", f"{now:g}")]


def rows(run: Run, found: Sequence[Any] = ()) -> str:
    """Which rows to look at, or how to look at rows where none are named."""
    if not found:
        return f"look at the rows, an odd one may be the cause: `{inspect(run)}`"
    listed = ", ".join(str(place) for place in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"look at the rows of that step, and mend them or take them out: {listed}{more}"


def go_on(run: Run) -> str:
    """The command that goes on from the newest checkpoint."""
    return f"make train RECIPE={run.plan.get('recipe')} NAME={run.folder.name} RESUME=1"


def inspect(run: Run) -> str:
    """The command that shows what the loss sees."""
    return f"make inspect RECIPE={run.plan.get('recipe')}"


def _line(run: Run, key: str, wanted: str, now: str) -> str:
    """`trainer.KEY: VALUE`, and `allow_out_of_range` where the size row would refuse that value."""
    line = f"`trainer.{key}: {wanted}` (was {now})"
    row = sizes.size_classes().get(str(run.plan.get("size")))
    if row is None or row.cells[key].allows(float(wanted)):
        return line
    return f"{line}, and `allow_out_of_range: [{key}]` since row {run.plan['size']} wants {row.cells[key].wanted()}"
