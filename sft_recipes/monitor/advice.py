"""The finding of a rule, and its advice: the recipe line to change, with a value computed from the run's plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sft_recipes.config import sizes
from sft_recipes.monitor.metrics_log import Run


@dataclass(frozen=True)
class Finding:
    """One issue of a run.

    Attributes:
        rule: the name of the rule.
        severity: `error` if it ruins the run, `warning` if it wastes time or quality.
        step: the optimizer step at which it begins; None if unknown.
        evidence: the measured values.
        advice: what to change, most effective first.
    """

    rule: str
    severity: str
    step: int | None
    evidence: str
    advice: list[str]


def scale_learning_rate(run: Run, factor: float) -> str:
    """The learning rate times `factor`."""
    peak = run.plan.get("learning_rate")
    if not isinstance(peak, (int, float)):
        return f"`trainer.learning_rate`: multiply by {factor:.2g}"
    return _recipe_line(run, "learning_rate", sizes.scientific(peak * factor), sizes.scientific(peak))


def default_learning_rate(run: Run) -> str:
    """The default learning rate of the size class."""
    default = sizes.size_classes()[str(run.plan["size"])].ranges["learning_rate"].start
    line = _recipe_line(run, "learning_rate", sizes.scientific(default), sizes.scientific(run.plan["learning_rate"]))
    return f"{line}, the default of size class {run.plan['size']}"


def longer_warmup(run: Run) -> list[str]:
    """Twice the warm-up, at most the size class's highest; empty if it is reached already."""
    ratio = run.plan.get("warmup_ratio")
    if not isinstance(ratio, (int, float)):
        return []
    size = sizes.size_classes().get(str(run.plan.get("size")))
    highest = (size.ranges["warmup_ratio"].range or [0, math.inf])[1] if size else math.inf
    longer = min(max(2 * ratio, 0.03), highest)
    return [_recipe_line(run, "warmup_ratio", f"{longer:g}", f"{ratio:g}")] if longer > ratio else []


def fewer_epochs(run: Run, step: int) -> list[str]:
    """The epochs completed at `step`, rounded up to full epochs after the first."""
    max_steps = run.section("trainer").get("max_steps", -1)
    if isinstance(max_steps, int) and max_steps > 0:
        return [f"`trainer.max_steps: {step}` (was {max_steps})"] if 0 < step < max_steps else []
    planned, per_epoch = run.plan.get("num_train_epochs"), run.planned("steps_per_epoch")
    if not isinstance(planned, (int, float)) or not per_epoch or step <= 0:
        return []
    done = step / per_epoch
    epochs = math.ceil(round(done, 2)) if done > 1 else math.ceil(done * 10) / 10
    return [_recipe_line(run, "num_train_epochs", f"{epochs:g}", f"{planned:g}")] if epochs < planned else []


def more_weight_decay(run: Run) -> list[str]:
    """The lower of the SFT guide's 0.05 and 0.1 that is above the present value."""
    decay = run.plan.get("weight_decay")
    higher = next((value for value in (0.05, 0.1) if isinstance(decay, (int, float)) and value > decay), None)
    return [] if higher is None else [_recipe_line(run, "weight_decay", f"{higher:g}", f"{decay:g}")]


def check_rows(run: Run, rows: Sequence[object] = ()) -> str:
    """The rows to check, or the command that prints rows."""
    if not rows:
        return f"check the data for unusual rows: `{inspect_command(run)}`"
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"fix or remove the rows of that step: {', '.join(map(str, rows[:5]))}{more}"


def resume_command(run: Run) -> str:
    """The command that resumes from the latest checkpoint."""
    return f"make train RECIPE={run.plan.get('recipe')} NAME={run.folder.name} RESUME=1"


def inspect_command(run: Run) -> str:
    """The command that prints rows with their loss mask."""
    return f"make inspect RECIPE={run.plan.get('recipe')}"


def _recipe_line(run: Run, key: str, value: str, present: str) -> str:
    """`trainer.KEY: VALUE`, and the `allow_out_of_range` that a value outside the size class's range needs."""
    line = f"`trainer.{key}: {value}` (was {present})"
    size = sizes.size_classes().get(str(run.plan.get("size")))
    if size is None or size.ranges[key].allows(float(value)):
        return line
    expected = size.ranges[key].describe()
    return f"{line}, and `allow_out_of_range: [{key}]` (size class {run.plan['size']}: {expected})"
