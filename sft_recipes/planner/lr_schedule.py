"""Works out the learning rate that a plan's schedule has at a step, in closed form, as transformers does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sft_recipes.planner import batch
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import ConfigError

# The schedules that are known here, each with the options that it honours.
_OPTIONS: dict[str, set[str]] = {
    "cosine": {"num_cycles"},
    "linear": set(),
    "constant_with_warmup": set(),
    "constant": set(),
}


def learning_rate(
    name: str, peak: float, warmup_steps: int, total_steps: int, step: int, options: Mapping[str, Any]
) -> float | None:
    """The learning rate of the optimizer step that follows `step` of them, equal to transformers' to the last digit.

    The operations and their order are those of https://github.com/huggingface/transformers, v5.23.0,
    `src/transformers/optimization.py` (`_get_cosine_schedule_with_warmup_lr_lambda` and its neighbours), and of torch's
    `LambdaLR`, which multiplies the peak by their factor.

    Args:
        name: `lr_scheduler_type`.
        peak: the plan's learning rate.
        step: optimizer steps already taken, 0 at the first; what the Trainer logs at step s is the value for s - 1.
        options: the schedule's own, as `options_of` gives them.

    Returns:
        None for a schedule that is not known here, or options that it does not honour.
    """
    cycles = options.get("num_cycles", 0.5)
    if name not in _OPTIONS or set(options) - _OPTIONS[name] or not isinstance(cycles, (int, float)):
        return None
    return peak * _factor(name, warmup_steps, total_steps, step, cycles)


def _factor(name: str, warmup_steps: int, total_steps: int, step: int, cycles: float) -> float:
    """The share of the peak at a step; `cycles` are waves of the cosine, half of one falls from the peak to 0."""
    if name == "constant":
        return 1.0
    if step < warmup_steps:
        return float(step) / float(max(1, warmup_steps))
    if name == "constant_with_warmup":
        return 1.0
    decay_steps = float(max(1, total_steps - warmup_steps))
    if name == "linear":
        return max(0.0, float(total_steps - step) / decay_steps)
    progress = float(step - warmup_steps) / decay_steps
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * float(cycles) * 2.0 * progress)))


def options_of(plan: Plan) -> dict[str, Any]:
    """`trainer.lr_scheduler_kwargs` as the Trainer reads them, which takes a mapping or its JSON text.

    Raises:
        ConfigError: text that is no JSON object.
    """
    written = plan.sections.trainer.get("lr_scheduler_kwargs") or {}
    try:
        options = json.loads(written) if isinstance(written, str) else written
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(
            f"{plan.origins.get('trainer.lr_scheduler_kwargs', 'trainer.lr_scheduler_kwargs')}: "
            f'trainer.lr_scheduler_kwargs is {written!r}; wanted JSON, as in {{"num_cycles": 0.5}}'
        )
    return dict(options)


def steps_of(plan: Plan) -> tuple[int, int]:
    """Optimizer steps of the whole run and of its warm-up; estimates where the plan's are.

    Raises:
        ConfigError: nothing says how many there are before the data is prepared.
    """
    if plan.optimizer_steps is not None and plan.warmup_steps is not None:
        return plan.optimizer_steps, plan.warmup_steps
    max_steps: int = plan.sections.trainer["max_steps"]
    if max_steps > 0:
        return max_steps, batch.warmup_steps(max_steps, plan.warmup_ratio)
    needed = "data.examples=… data.mean_tokens=…" if plan.packing else "data.examples=…"
    raise ConfigError(
        f"{plan.recipe}: how many optimizer steps the run takes is known when its data is prepared; say {needed} for "
        f"an estimate, or trainer.max_steps=…"
    )
