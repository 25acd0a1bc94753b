"""Record alerts while a run trains, stop it where the recipe requests that, and stop early (NaN/Inf: `nan_guard`).

Decisions use metrics that are equal on all ranks, so that all ranks decide alike.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any

from sft_recipes.monitor.detectors import AlertStream
from sft_recipes.monitor.metrics_log import Alert, MetricSeries
from sft_recipes.monitor.rules import RULES
from sft_recipes.planner.plan import Plan
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.callbacks.metrics import append
from sft_recipes.training.checkpoint import retention

log = logging.getLogger(__name__)


class AlertCallback(RunCallback):
    """Run the live rules (`monitor.rules`) and early stopping; one warning each time that a condition begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the log lines of earlier attempts. Losses of single steps are not logged; norms are."""
        of_steps, of_log_lines = (
            [rule.detect for rule in RULES if rule.detect and rule.per_step == per_step] for per_step in (True, False)
        )
        self.steps = AlertStream(of_steps, MetricSeries(self.trainer.plan))
        self.log_lines = AlertStream(of_log_lines, MetricSeries(self.trainer.plan))
        for line in state.log_history:
            self.log_lines.series.add(line["step"], line)
            self.steps.series.add(line["step"], {key: line[key] for key in ("grad_norm",) if key in line})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Apply the rules of single optimizer steps."""
        values = {"loss": self.trainer.nan_guard.loss, "grad_norm": self.trainer.nan_guard.grad_norm}
        self._report(state, self.steps.add(state.global_step, values))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Apply the rules of log lines."""
        if logs and math.isfinite(logs.get("loss", 0.0)):
            self._report(state, self.log_lines.add(state.global_step, logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Finish the run where the validation loss has not improved for `early_stopping_patience` evaluations."""
        if is_stopped_early(self.trainer.plan, state) and not control.should_training_stop:
            patience = self.trainer.plan.sections.monitor.early_stopping_patience
            evidence = f"eval_loss has not improved for {patience} evaluations; the run ends"
            self._report(state, [Alert("early_stopping", state.global_step, evidence)])
            control.should_training_stop = True

    def _report(self, state: Any, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            reason = f"{alert.rule.replace('_', ' ')}: {alert.evidence}"
            if state.is_world_process_zero:
                append(self.trainer.folder.warnings, vars(alert))
                log.warning("step %d: %s", alert.step, reason)
            if alert.rule in self.trainer.plan.sections.monitor.stop_on:
                raise self.trainer.nan_guard.diverged(reason, applied=True)


def is_stopped_early(plan: Plan, state: Any) -> bool:
    """Whether early stopping ends the run here.

    Depends on the Trainer's state alone, so that a resume after an interruption right after that evaluation knows too.
    """
    patience = plan.sections.monitor.early_stopping_patience
    return patience is not None and evaluations_since_best(retention.validation_losses(state.log_history)) >= patience


def evaluations_since_best(losses: dict[int, float]) -> int:
    """The number of evaluations since the lowest validation loss.

    Args:
        losses: validation loss by step.
    """
    best = (retention.rank_steps(losses) or sorted(losses))[:1]
    return sum(step > best[0] for step in losses) if best else 0
