"""Warns while a run trains, and stops it where its recipe says so; what is no number stops it by itself (divergence).

Every decision is made from figures that are the same on all ranks, so that all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from sft_recipes.config.schema import CONVERGED_ACCURACY
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.callbacks.metrics import append
from sft_recipes.training.checkpoint import retention

_USUAL_STEPS = 50  # steps that a loss is compared with
_FEWEST_STEPS = 20
_NOISE = 0.3  # nats: a loss that jumps by less is no spike, however steady it was before


class AlertCallback(TrainerCallback):
    """One warning for each time that a figure leaves its bounds (schema.Monitor)."""

    def __init__(self, plan: Plan, folder: RunDir):
        self.plan = plan
        self.folder = folder
        self.limits = plan.sections.monitor
        self.trainer: Any = None
        self.losses: deque[float] = deque(maxlen=_USUAL_STEPS)
        self.norms: deque[float] = deque(maxlen=self.limits.window)
        self.speeds: list[float] = []
        self.first_loss: float | None = None
        self.logged: list[float] = []
        self.outside: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What earlier starts logged is what this one is compared with."""
        for line in state.log_history:
            if "loss" in line and line["step"] > 1:
                self._learn(line["step"], line)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step's loss against those before it, the gradients' norms against the documents' bounds."""
        loss, norm = self.trainer.watch.loss, self.trainer.watch.grad_norm
        spike = loss_spike(self.losses, loss, self.limits.loss_spike)
        self._judge(state, "loss_spike", spike)
        self.losses.append(loss)
        if norm is None:
            return
        self.norms.append(norm)
        self._judge(state, "exploding_gradients", self._all_norms(lambda one: one > self.limits.grad_norm_above))
        self._judge(state, "vanishing_gradients", self._all_norms(lambda one: one < self.limits.grad_norm_below))

    def _all_norms(self, outside: Any) -> str | None:
        if len(self.norms) < self.limits.window or not all(map(outside, self.norms)):
            return None
        middle = statistics.median(self.norms)
        return f"gradient norm {middle:.3g} (median of {len(self.norms)} steps)"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Throughput against what is usual, and a training loss that has not moved much, nor moves after warm-up."""
        if not logs or not math.isfinite(logs.get("loss", math.nan)) or state.global_step <= 1:
            return
        self._learn(state.global_step, logs)
        lines = max(math.ceil(self.limits.window / args.logging_steps), 3)
        self._judge(state, "throughput_drop", throughput_drop(self.speeds, lines, self.limits.throughput_drop))
        enough = max(10, math.ceil(0.25 * state.max_steps / args.logging_steps))
        learned = logs["loss"] < (1 - 2 * self.limits.plateau) * (self.first_loss or math.inf)
        converged = logs.get("mean_token_accuracy", 0.0) > CONVERGED_ACCURACY
        if len(self.logged) >= enough and not learned and not converged:
            self._judge(state, "plateau", plateau(self.logged, self.limits.plateau))

    def _learn(self, step: int, line: dict[str, Any]) -> None:
        """A log line's figures, to compare later ones with."""
        if "tokens_per_second" in line:
            self.speeds.append(line["tokens_per_second"])
        self.first_loss = line["loss"] if self.first_loss is None else self.first_loss
        if step > (self.plan.warmup_steps or 0):
            self.logged.append(line["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the run, as a finished one, where validation has not got better for as long as the recipe bears."""
        if ended_early(self.plan, state) and not control.should_training_stop:
            since = evaluations_since_the_best(retention.validation_losses(state.log_history))
            self._warn(state, "early_stopping", f"eval_loss has not fallen for {since} evaluations; the run ends here")
            control.should_training_stop = True

    def _judge(self, state: Any, rule: str, evidence: str | None) -> None:
        if evidence is None:
            self.outside.discard(rule)
            return
        if rule not in self.outside:
            self._warn(state, rule, evidence)
        self.outside.add(rule)
        if rule in self.limits.stop_on:
            raise self.trainer.watch.stopped_by_guard(self.trainer, f"{rule.replace('_', ' ')}: {evidence}")

    def _warn(self, state: Any, rule: str, evidence: str) -> None:
        if state.is_world_process_zero:
            append(self.folder.warnings, {"step": state.global_step, "rule": rule, "evidence": evidence})
            self.trainer.say(f"step {state.global_step}  {rule.replace('_', ' ')}: {evidence}")


def ended_early(plan: Plan, state: Any) -> bool:
    """Whether validation has not got better for as long as the recipe bears; told by the Trainer's state alone, so that
    a start knows it of a run that was cut off right behind that evaluation."""
    patience = plan.sections.monitor.early_stopping_patience
    return (
        patience is not None and evaluations_since_the_best(retention.validation_losses(state.log_history)) >= patience
    )


def loss_spike(before: Sequence[float], loss: float, most: float) -> str | None:
    """What is wrong with a step's loss after those before it, by a robust z-score; None where nothing is."""
    if len(before) < _FEWEST_STEPS:
        return None
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(one - median) for one in before)
    above = loss - median
    if above <= max(_NOISE, most * deviation):
        return None
    score = above / deviation if deviation else math.inf
    return f"loss {loss:.3f}, {score:.0f} robust deviations above the median {median:.3f} of the {len(before)} before"


def throughput_drop(speeds: Sequence[float], lines: int, share: float) -> str | None:
    """Whether the last so many log lines are all slower than usual by this share."""
    if len(speeds) < 3 * lines:
        return None
    usual, now = statistics.median(speeds[:-lines]), max(speeds[-lines:])
    return f"{now:,.0f} tokens/s, usually {usual:,.0f}" if now < (1 - share) * usual else None


def plateau(losses: Sequence[float], share: float) -> str | None:
    """Whether the mean training loss of the last third fell by less than this share of that of the first lines."""
    part = max(len(losses) // 3, 3)
    first, last = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
    if not first > 0 or (first - last) / first >= share:
        return None
    return f"loss {first:.4f} after warm-up, {last:.4f} now"


def evaluations_since_the_best(losses: dict[int, float]) -> int:
    """How many evaluations in a row have not been the lowest."""
    steps = sorted(losses)
    if not steps:
        return 0
    best = min(steps, key=lambda step: (losses[step] if math.isfinite(losses[step]) else math.inf, step))
    return len(steps) - 1 - steps.index(best)
