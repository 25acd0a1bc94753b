"""Learning rates of every step in closed form, equal to those of transformers' schedulers. Never imports torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.config.schema import did_you_mean
from sft_recipes.planner import batch
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import ConfigError

COMPARED = ("cosine", "linear", "constant_with_warmup")  # those that the SFT guide compares
FOLLOW_THE_LOSS = ("reduce_lr_on_plateau", "greedy")

_REQUIRED = object()
_SHAPES = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class Schedule:
    """A schedule over a run.

    Attributes:
        name: `lr_scheduler_type`.
        peak: the plan's learning rate.
        warmup_steps: optimizer steps over which the rate rises.
        total_steps: optimizer steps of the run.
        options: `lr_scheduler_kwargs`, as `options_of` returns them.
    """

    name: str
    peak: float
    warmup_steps: int
    total_steps: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the optimizer step after `step` of them, equal to the last digit.

        The operations and their order are those of https://github.com/huggingface/transformers, v5.23.0,
        `src/transformers/optimization.py`, and of torch's `LambdaLR`, which multiplies the peak by their factor.

        Args:
            step: optimizer steps already taken, 0 at the first; the Trainer logs the value for s - 1 at step s.

        Raises:
            ConfigError: unknown schedule, one that follows the loss, or wrong options.
        """
        self.check()
        try:
            return float(self.peak * SCHEDULES[self.name].factor(self, step))
        except (ArithmeticError, ValueError) as error:
            raise ConfigError(
                f"trainer.lr_scheduler_kwargs: {self.name} is undefined at step {step} of {self.total_steps} with "
                f"{dict(self.options)}: {error}. Set other options"
            ) from error

    def rates(self) -> list[float]:
        """Return the learning rate of each optimizer step.

        Raises:
            ConfigError: as `learning_rate`.
        """
        return [self.learning_rate(step) for step in range(self.total_steps)]

    def option(self, key: str) -> Any:
        """Return an option, or its default."""
        return self.options.get(key, SCHEDULES[self.name].options[key])

    def check(self) -> None:
        """Check the name and the options.

        Raises:
            ConfigError: as `learning_rate`.
        """
        known = _options_of_schedule(self.name)
        where = "trainer.lr_scheduler_kwargs"
        for key, value in self.options.items():
            if key not in known:
                raise ConfigError(
                    f"{where}: unknown option of {self.name}: found {key!r}, expected {', '.join(known) or 'none'}"
                    f"{did_you_mean(key, known)}"
                )
            _check_value(f"{where}: {key} of {self.name}", value, known[key], key.endswith("_type"))
        missing = [key for key, default in known.items() if default is _REQUIRED and key not in self.options]
        if "min_lr" in known:
            floors = [key for key in ("min_lr", "min_lr_rate") if self.options.get(key) is not None]
            if len(floors) == 2:
                raise ConfigError(f"{where}: {self.name}: found min_lr and min_lr_rate, expected one. Remove one")
            missing += [] if floors else ["min_lr"]
        if missing:
            example = {"min_lr": f"{self.peak / 10:.1e}"}.get(missing[0], str(max(self.total_steps // 10, 1)))
            raise ConfigError(
                f'{where}: {self.name} needs {" and ".join(missing)}. Set {where}={{"{missing[0]}": {example}}}'
            )
        if "lr_end" in known and not self.option("lr_end") < self.peak:
            raise ConfigError(
                f"{where}: lr_end of {self.name}: found {self.option('lr_end'):g}, expected less than the learning "
                f"rate {self.peak:g}. Set a lower lr_end"
            )


def _options_of_schedule(name: str) -> Mapping[str, Any]:
    if name in FOLLOW_THE_LOSS:
        raise ConfigError(
            f"trainer.lr_scheduler_type: the rates of {name} depend on the loss: found {name!r}, expected one of "
            f"{', '.join(SCHEDULES)}"
        )
    if name not in SCHEDULES:
        known = [*SCHEDULES, *FOLLOW_THE_LOSS]
        raise ConfigError(
            f"trainer.lr_scheduler_type: unknown schedule: found {name!r}, expected one of {', '.join(known)}"
            f"{did_you_mean(name, known)}"
        )
    return SCHEDULES[name].options


def _check_value(where: str, value: Any, default: Any, is_shape: bool) -> None:
    if is_shape and value not in _SHAPES:
        raise ConfigError(f"{where}: found {value!r}, expected one of {', '.join(_SHAPES)}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_shape and not number and not (value is None and default is None):
        raise ConfigError(f"{where}: found {value!r}, expected a number. YAML reads 1.0e-6 as one, 1e-6 as text")


@dataclass(frozen=True)
class _Kind:
    """A schedule of transformers: the factor of the peak at a step, and its options with their defaults."""

    factor: Callable[[Schedule, int], float]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _warmup(schedule: Schedule, step: int) -> float:
    return float(step) / float(max(1, schedule.warmup_steps))


def _progress(schedule: Schedule, step: int) -> float:
    """Fraction of the steps after warm-up."""
    return float(step - schedule.warmup_steps) / float(max(1, schedule.total_steps - schedule.warmup_steps))


def _constant(_schedule: Schedule, _step: int) -> float:
    return 1.0


def _constant_with_warmup(schedule: Schedule, step: int) -> float:
    return _warmup(schedule, step) if step < schedule.warmup_steps else 1.0


def _linear(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup_steps:
        return _warmup(schedule, step)
    steps = float(max(1, schedule.total_steps - schedule.warmup_steps))
    return max(0.0, float(schedule.total_steps - step) / steps)


def _wave(cycles: float, progress: float) -> float:
    """A cosine from 1; half a cycle falls to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * float(cycles) * 2.0 * progress))


def _cosine(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup_steps:
        return _warmup(schedule, step)
    return max(0.0, _wave(schedule.option("num_cycles"), _progress(schedule, step)))


def _cosine_with_restarts(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup_steps:
        return _warmup(schedule, step)
    progress = _progress(schedule, step)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(schedule.option("num_cycles")) * progress) % 1.0))))


def _polynomial(schedule: Schedule, step: int) -> float:
    end, peak = schedule.option("lr_end"), schedule.peak
    if step < schedule.warmup_steps:
        return _warmup(schedule, step)
    if step > schedule.total_steps:
        return float(end / peak)
    remaining = 1 - (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
    return float(((peak - end) * remaining ** schedule.option("power") + end) / peak)


def _inverse_sqrt(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup_steps:
        return _warmup(schedule, step)
    timescale = schedule.option("timescale")
    if timescale is None:
        timescale = schedule.warmup_steps or 10_000
    return 1.0 / math.sqrt((step + (timescale - schedule.warmup_steps)) / timescale)


def _floor(schedule: Schedule) -> float:
    """The lowest rate, as a fraction of the peak."""
    lowest = schedule.option("min_lr")
    return float(schedule.option("min_lr_rate") if lowest is None else lowest / schedule.peak)


def _cosine_with_min_lr(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup_steps:
        return _warmup(schedule, step)
    floor = _floor(schedule)
    return max(0.0, _wave(schedule.option("num_cycles"), _progress(schedule, step)) * (1 - floor) + floor)


def _cosine_warmup_with_min_lr(schedule: Schedule, step: int) -> float:
    """Unlike the others it counts the step that is being taken, and can begin above 0."""
    warmup, total = float(schedule.warmup_steps), float(schedule.total_steps)
    if step < warmup:
        first = schedule.option("warmup_lr_rate")
        if first is None:
            return (step + 1.0) / max(1.0, warmup)
        return float(float(first) + (1.0 - float(first)) * float(step) / (max(1, warmup - 1)))
    progress, floor = (step - warmup + 1.0) / max(1.0, total - warmup), _floor(schedule)
    return max(
        0.0, 0.5 * (1.0 + math.cos(math.pi * schedule.option("num_cycles") * 2.0 * progress)) * (1 - floor) + floor
    )


def _warmup_stable_decay(schedule: Schedule, step: int) -> float:
    floor, decay = schedule.option("min_lr_ratio"), schedule.option("num_decay_steps")
    stable = schedule.option("num_stable_steps")
    if stable is None:
        stable = schedule.total_steps - schedule.warmup_steps - decay
    if step < schedule.warmup_steps:
        progress = _warmup(schedule, step)
        rising = {
            "linear": progress,
            "cosine": 0.5 * (1.0 - math.cos(math.pi * progress)),
            "1-sqrt": 1.0 - math.sqrt(1.0 - progress),
        }
        return float(max(0.0, rising[schedule.option("warmup_type")] * (1.0 - floor) + floor))
    if step < schedule.warmup_steps + stable:
        return 1.0
    if step < schedule.warmup_steps + stable + decay:
        progress = float(step - schedule.warmup_steps - stable) / float(max(1, decay))
        falling = {
            "linear": 1.0 - progress,
            "cosine": _wave(schedule.option("num_cycles"), progress),
            "1-sqrt": 1.0 - math.sqrt(progress),
        }
        return float(max(0.0, falling[schedule.option("decay_type")] * (1.0 - floor) + floor))
    return float(floor)


_MIN_LR = {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None}

# Every schedule of the locked transformers that does not follow the loss; tests/unit/test_lr_schedule.py compares.
SCHEDULES: Mapping[str, _Kind] = {
    "linear": _Kind(_linear),
    "cosine": _Kind(_cosine, {"num_cycles": 0.5}),
    "cosine_with_restarts": _Kind(_cosine_with_restarts, {"num_cycles": 1}),
    "polynomial": _Kind(_polynomial, {"lr_end": 1e-7, "power": 1.0}),
    "constant": _Kind(_constant),
    "constant_with_warmup": _Kind(_constant_with_warmup),
    "inverse_sqrt": _Kind(_inverse_sqrt, {"timescale": None}),
    "cosine_with_min_lr": _Kind(_cosine_with_min_lr, _MIN_LR),
    "cosine_warmup_with_min_lr": _Kind(_cosine_warmup_with_min_lr, {**_MIN_LR, "warmup_lr_rate": None}),
    "warmup_stable_decay": _Kind(
        _warmup_stable_decay,
        {
            "num_decay_steps": _REQUIRED,
            "num_stable_steps": None,
            "warmup_type": "linear",
            "decay_type": "cosine",
            "min_lr_ratio": 0,
            "num_cycles": 0.5,
        },
    ),
}


def curves(plan: Plan, others: Sequence[str] = ()) -> dict[str, list[float]]:
    """Return the rates of the plan's schedule, of those that the SFT guide compares, and of `others`, in that order.

    `trainer.lr_scheduler_kwargs` go to the plan's schedule and to those of the others that take them.

    Raises:
        ConfigError: as `Schedule.learning_rate` and `steps_of`.
    """
    total_steps, warmup_steps = steps_of(plan)
    options, own = options_of(plan), plan.lr_scheduler_type
    names = dict.fromkeys([own, *COMPARED, *others])
    taken = {name: {key: options[key] for key in options if key in _options_of_schedule(name)} for name in names}
    if set(options).difference(*taken.values()):
        taken[own] = options  # the error then names the options of the plan's own schedule
    return {name: Schedule(name, plan.learning_rate, warmup_steps, total_steps, taken[name]).rates() for name in names}


def options_of(plan: Plan) -> dict[str, Any]:
    """Return `trainer.lr_scheduler_kwargs` as the Trainer reads them, which takes a mapping or its JSON text.

    Raises:
        ConfigError: the text is not a JSON object.
    """
    value = plan.sections.trainer.get("lr_scheduler_kwargs") or {}
    try:
        options = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(
            f"{plan.origins.get('trainer.lr_scheduler_kwargs', 'trainer.lr_scheduler_kwargs')}: "
            f'trainer.lr_scheduler_kwargs: found {value!r}, expected JSON such as {{"num_cycles": 0.5}}'
        )
    return dict(options)


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
    estimate = "data.examples=… data.mean_tokens=…" if plan.packing else "data.examples=…"
    raise ConfigError(
        f"{plan.recipe}: the number of optimizer steps is not known before the data is prepared. Set {estimate} for an "
        f"estimate, or trainer.max_steps=…"
    )
