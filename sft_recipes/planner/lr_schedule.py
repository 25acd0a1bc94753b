"""Learning rates of every step in closed form, equal to those of transformers' schedulers. Never imports torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sft_recipes.config.schema import did_you_mean
from sft_recipes.planner import batch
from sft_recipes.runtime.errors import ConfigError

if TYPE_CHECKING:
    from sft_recipes.planner.plan import Plan

COMPARED = ("cosine", "linear", "constant_with_warmup")  # those that the SFT guide compares


@dataclass(frozen=True)
class Schedule:
    """A schedule over a run.

    Attributes:
        name: `lr_scheduler_type`.
        peak: the plan's learning rate.
        warmup_steps: optimizer steps over which the rate rises.
        total_steps: optimizer steps of the run.
        options: `lr_scheduler_kwargs`.
    """

    name: str
    peak: float
    warmup_steps: int
    total_steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the optimizer step after `step` of them, equal to the last digit.

        The operations and their order are those of https://github.com/huggingface/transformers, v5.23.0,
        `src/transformers/optimization.py`, and of torch's `LambdaLR`, which multiplies the peak by their factor.

        Args:
            step: optimizer steps already taken, 0 at the first; the Trainer logs the value for s - 1 at step s.
        """
        if step < self.warmup_steps and self.name != "constant":
            return self.peak * (float(step) / float(max(1, self.warmup_steps)))
        return float(self.peak * SCHEDULES[self.name](self, step, **self.options))

    def rates(self) -> list[float]:
        """Return the learning rate of each optimizer step."""
        return [self.learning_rate(step) for step in range(self.total_steps)]

    @property
    def steps_after_warmup(self) -> float:
        """The optimizer steps after warm-up, at least 1."""
        return float(max(1, self.total_steps - self.warmup_steps))


def _constant(_schedule: Schedule, _step: int) -> float:
    return 1.0


def _linear(schedule: Schedule, step: int) -> float:
    return max(0.0, float(schedule.total_steps - step) / schedule.steps_after_warmup)


def _cosine(schedule: Schedule, step: int, num_cycles: float = 0.5) -> float:
    progress = float(step - schedule.warmup_steps) / schedule.steps_after_warmup
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress)))


def _cosine_with_min_lr(
    schedule: Schedule, step: int, min_lr: float | None = None, min_lr_rate: float = 0.0, num_cycles: float = 0.5
) -> float:
    floor = min_lr_rate if min_lr is None else min_lr / schedule.peak
    return max(0.0, _cosine(schedule, step, num_cycles) * (1 - floor) + floor)


# Factor of the peak after warm-up; further parameters are the options. tests/unit/test_lr_schedule.py compares.
SCHEDULES: Mapping[str, Callable[..., float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "cosine_with_min_lr": _cosine_with_min_lr,
}


def option_names(name: str) -> list[str]:
    """Return the options of a schedule.

    Raises:
        ConfigError: unknown schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(
            f"trainer.lr_scheduler_type: unknown schedule: found {name!r}, expected one of {', '.join(SCHEDULES)}"
            f"{did_you_mean(name, SCHEDULES)}"
        )
    return list(inspect.signature(SCHEDULES[name]).parameters)[2:]


def check(name: str, options: Mapping[str, float]) -> None:
    """Check the name of a schedule and its options.

    Raises:
        ConfigError: unknown schedule or option, or not one lowest rate.
    """
    known = option_names(name)
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(
            f"trainer.lr_scheduler_kwargs: unknown option of {name}: found {unknown[0]!r}, expected "
            f"{', '.join(known) or 'none'}"
        )
    if "min_lr" in known and len({"min_lr", "min_lr_rate"} & options.keys()) != 1:
        raise ConfigError(f"trainer.lr_scheduler_kwargs: found {dict(options)}, expected either min_lr or min_lr_rate")


def curves(plan: Plan, others: Sequence[str] = ()) -> dict[str, list[float]]:
    """Return the rates of the plan's schedule, of those that the SFT guide compares, and of `others`, in that order.

    The plan's options go to the schedules that have them.

    Raises:
        ConfigError: as `check` and `steps_of`.
    """
    total_steps, warmup_steps = steps_of(plan)
    given, rates = plan.sections.trainer.get("lr_scheduler_kwargs", {}), {}
    for name in dict.fromkeys([plan.lr_scheduler_type, *COMPARED, *others]):
        options = {key: given[key] for key in option_names(name) if key in given}
        check(name, options)
        rates[name] = Schedule(name, plan.learning_rate, warmup_steps, total_steps, options).rates()
    return rates


def steps_of(plan: Plan) -> tuple[int, int]:
    """Return the optimizer steps of the run and of its warm-up; estimates if the plan's are.

    Raises:
        ConfigError: the number of steps is not known before the data is prepared.
    """
    if plan.optimizer_steps is not None and plan.warmup_steps is not None:
        return plan.optimizer_steps, plan.warmup_steps
    max_steps: int = plan.sections.trainer["max_steps"]
    if max_steps > 0:
        return max_steps, batch.warmup_steps(max_steps, plan.warmup_ratio)
    raise ConfigError(
        f"{plan.recipe}: the number of optimizer steps is not known before the data is prepared. Set "
        f"data.examples=… data.mean_tokens=… for an estimate, or trainer.max_steps=…"
    )
