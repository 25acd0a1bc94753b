"""Heartbeat of this rank: one beat for each event of the Trainer, with the step and the activity."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from sft_recipes.runtime.heartbeat import Activity
from sft_recipes.training import rank_heartbeat


def _beat(activity: Activity, steps_taken: int = 0) -> Callable[..., None]:
    """Return an event that beats with the current step; before a step is taken, that is the next one."""

    def event(_callback: Any, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        rank_heartbeat.beat(state.global_step + 1 - steps_taken, activity)

    return event


class HeartbeatCallback(TrainerCallback):
    """Beats on every rank, in the same order; saves and waits for other ranks beat where they happen."""

    on_train_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = _beat("step")
    on_step_end = on_evaluate = on_save = _beat("step", 1)
    on_prediction_step = _beat("evaluating", 1)
    on_train_end = _beat("ending", 1)  # the model is published and completions are generated next
