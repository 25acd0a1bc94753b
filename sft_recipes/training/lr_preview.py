"""Steps transformers' own schedulers through a run that trains nothing, for their learning rates."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.config.schema import did_you_mean
from sft_recipes.planner import lr_schedule
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.training.library_logging import quiet

COMPARED = ("cosine", "linear", "constant_with_warmup")  # those that the documents compare

_FOLLOW_THE_LOSS = ("reduce_lr_on_plateau", "greedy")
_GIVEN_BY_THE_PLAN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
_ONE_OF = {"min_lr", "min_lr_rate"}  # transformers wants one of them where it takes them, and has a default for neither


def curves(plan: Plan, others: Sequence[str] = ()) -> dict[str, list[float]]:
    """The rates of the plan's own schedule, of those that the documents compare, and of `others`, in that order.

    `trainer.lr_scheduler_kwargs` go to the plan's own schedule and to those of the others that take them.

    Raises:
        SetupError: as `rates`, or the number of steps is not known yet.
    """
    quiet()
    total_steps, warmup_steps = lr_schedule.steps_of(plan)
    options, own = lr_schedule.options_of(plan), plan.lr_scheduler_type
    names = dict.fromkeys([own, *COMPARED, *others])
    taken = {name: {key: value for key, value in options.items() if key in _takes(name)} for name in names}
    strange = set(options).difference(*taken.values())
    if strange:
        taken[own] = options  # the error then names what the plan's own schedule takes
    return {name: rates(name, plan.learning_rate, warmup_steps, total_steps, taken[name]) for name in names}


def rates(name: str, peak: float, warmup_steps: int, total_steps: int, options: Mapping[str, Any]) -> list[float]:
    """The learning rate of each of `total_steps` optimizer steps, by transformers' own scheduler.

    Args:
        name: `lr_scheduler_type`, any that is a function of the step.
        peak: the plan's learning rate.
        options: the schedule's own, `trainer.lr_scheduler_kwargs`.

    Raises:
        SetupError: no such schedule, one that follows the loss, or options that it lacks or does not take.
    """
    import torch
    from transformers import get_scheduler

    _check_options(name, peak, total_steps, options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    found = []
    try:
        scheduler = get_scheduler(name, optimizer, warmup_steps, total_steps, dict(options))
        for step in range(total_steps):
            if step:
                optimizer.step()
                scheduler.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise SetupError(
            f"trainer.lr_scheduler_kwargs: {name} over {total_steps} steps, {warmup_steps} of them warm-up, does not "
            f"work with {dict(options)} ({error})"
        ) from error
    return found


def _takes(name: str) -> dict[str, inspect.Parameter]:
    """The options of a schedule.

    Raises:
        SetupError: no such schedule, or one that is no function of the step.
    """
    from transformers import SchedulerType
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    known = [kind.value for kind in SchedulerType]
    if name not in known:
        raise SetupError(
            f"trainer.lr_scheduler_type: no schedule {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}"
        )
    if name in _FOLLOW_THE_LOSS:
        raise SetupError(
            f"trainer.lr_scheduler_type: {name} follows the loss, so its rates are known when the run is over; "
            f"wanted one of {', '.join(kind for kind in known if kind not in _FOLLOW_THE_LOSS)}"
        )
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    return {key: parameter for key, parameter in parameters.items() if key not in _GIVEN_BY_THE_PLAN}


def _check_options(name: str, peak: float, total_steps: int, options: Mapping[str, Any]) -> None:
    takes = _takes(name)
    for key, value in options.items():
        if key not in takes:
            raise SetupError(
                f"trainer.lr_scheduler_kwargs: {name} does not take {key!r}{did_you_mean(key, takes)}; it takes "
                f"{', '.join(takes) or 'none'}"
            )
        if isinstance(value, str) and _is_number(value):
            raise SetupError(
                f"trainer.lr_scheduler_kwargs: {key} is the text {value!r}; wanted a number, which YAML reads where it "
                f"has a dot and a sign, as in 1.0e-6"
            )
    missing = [key for key, parameter in takes.items() if parameter.default is parameter.empty and key not in options]
    if takes.keys() >= _ONE_OF and not _ONE_OF & options.keys():
        missing.append("min_lr")
    if missing:
        example = {"min_lr": f"{peak / 10:.1e}"}.get(missing[0], str(max(total_steps // 10, 1)))
        raise SetupError(
            f"trainer.lr_scheduler_kwargs: {name} needs {' and '.join(missing)}; say "
            f'trainer.lr_scheduler_kwargs={{"{missing[0]}": {example}}}'
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
