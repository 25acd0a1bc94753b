"""Detect alerts in series of metrics: the one definition of each live rule, for the running job and for `diagnose`.

A detector is a pure function with the name of its rule: it evaluates the end of a series and returns evidence, or None.
Thresholds are `config.schema.Monitor`. The alert callback adds every step and log line as it arrives; `rules.alerts_of`
adds the lines that a run has logged in the same order, so that one series gives the same alerts in both.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from sft_recipes.config.schema import CONVERGED_ACCURACY
from sft_recipes.monitor import stats
from sft_recipes.monitor.metrics_log import Alert, MetricSeries, Points

LOSS_FLOOR = 0.1  # nats per token: a smaller move is no rise, and below this loss there is nothing left to learn
SPIKE_HISTORY = (20, 50)  # fewest and most losses that a loss is compared with
_SPIKE_FLOOR = 0.3  # nats per token: a smaller jump is no spike
_SPEED_HISTORY = 100  # log lines whose median is the usual throughput
_UNTRAINED_LOSS = 4.0  # nats per token: a model that knows its language is below

Detector = Callable[[MetricSeries], str | None]


class AlertStream:
    """Run detectors over metrics as they arrive, and report each condition once until it has ended."""

    def __init__(self, detectors: Sequence[Detector], series: MetricSeries):
        self.detectors = detectors
        self.series = series
        self._active: set[str] = set()

    def add(self, step: int, metrics: Mapping[str, Any]) -> list[Alert]:
        """Append the metrics of a step, and return the alerts that begin there."""
        self.series.add(step, metrics)
        alerts = [Alert(detect.__name__, step, text) for detect in self.detectors if (text := detect(self.series))]
        started = [alert for alert in alerts if alert.rule not in self._active]
        self._active = {alert.rule for alert in alerts}
        return started


def loss_spike(series: MetricSeries) -> str | None:
    """A loss above the median of those before it, by a robust z-score.

    The running job has the loss of each optimizer step. A log line has the mean of `logging_steps` of them, in which
    only a large spike shows; `diagnose` therefore reads the recorded alerts too.
    """
    points = series.points("loss")
    fewest, most = SPIKE_HISTORY
    before = stats.values(points[-most - 1 : -1])
    if len(before) < fewest or points[-1][1] - min(before) <= _SPIKE_FLOOR:
        return None
    loss, usual = points[-1][1], median(before)
    deviation = stats.ROBUST * median(abs(value - usual) for value in before)
    if loss - usual <= max(_SPIKE_FLOOR, series.monitor.loss_spike * deviation):
        return None
    score = (loss - usual) / deviation if deviation else math.inf
    return f"loss {loss:.3f}, {score:.0f} robust deviations above the median {usual:.3f} of the {len(before)} before"


def exploding_gradients(series: MetricSeries) -> str | None:
    """Gradient norms above `grad_norm_above` for `window` steps.

    A model whose first norms are near the limit has a higher one: they have to grow, or be three times above it. The
    running job has the norm of each optimizer step, a log line that of its last step.
    """
    points, above = series.points("grad_norm"), series.monitor.grad_norm_above
    if len(points) < 3:
        return None
    limit = max(above, min(2 * median(stats.values(points[:3])), 3 * above))
    recent = _sustained(points, series.monitor.window, lambda norm: norm > limit)
    return f"gradient norm {median(recent):.3g} (median of {len(recent)} values), above {limit:g}" if recent else None


def vanishing_gradients(series: MetricSeries) -> str | None:
    """Gradient norms below `grad_norm_below` for `window` steps: no weight changes."""
    limit = series.monitor.grad_norm_below
    recent = _sustained(series.points("grad_norm"), series.monitor.window, lambda norm: norm < limit)
    return f"gradient norm {median(recent):.3g} (median of {len(recent)} values), below {limit:g}" if recent else None


def throughput_drop(series: MetricSeries) -> str | None:
    """Tokens per second below their usual by `throughput_drop`, on every log line of `window` steps."""
    points = series.points("tokens_per_second")
    count = _recent(points, series.monitor.window)
    before = stats.values(points[-count - _SPEED_HISTORY : -count])
    if len(before) < 2 * count:
        return None
    now, usual = max(stats.values(points[-count:])), median(before)
    lost = now < (1 - series.monitor.throughput_drop) * usual
    return f"{now:,.0f} tokens/s, usually {usual:,.0f}" if lost else None


def plateau(series: MetricSeries) -> str | None:
    """A loss that has fallen by less than `plateau` since warm-up, beyond its noise, and had not fallen before.

    Validation losses, where there are four, decide instead of the noise. Not a plateau: a loss below 0.1
    nats per token, tokens that are nearly all predicted, and a model that learned most of its task during warm-up.
    """
    share, points = series.monitor.plateau, series.points("loss")
    after = [point for point in points if point[0] > series.plan.warmup_steps]
    if len(after) < 12 or after[-1][0] - after[0][0] < max(20, series.plan.optimizer_steps / 4):
        return None
    losses, part = stats.values(after), len(after) // 3
    begin, _, end = stats.blocks(losses, 3)
    fall = _fall(begin, end)
    if fall >= share or end < LOSS_FLOOR or is_converged(series, part):
        return None
    validation = stats.values(series.points("eval_loss"))
    if len(validation) >= 4 and validation[0] > 0:
        still = abs(1 - min(validation[1:]) / validation[0]) <= share
    else:
        unsure = 2 * math.sqrt(2) * stats.noise_of_median(losses, part)
        still = max(unsure, fall + unsure / 2) <= share
    early = [loss for step, loss in points if step <= series.plan.warmup_steps / 2]
    first = median(early if len(early) >= 3 else stats.values(points[:3]))
    learned = _fall(first, end) > 2 * share and end < _UNTRAINED_LOSS
    text = f"since warm-up the training loss fell by {fall:.1%}, from {begin:.3g} to {end:.3g}"
    return text if still and not learned else None


def is_converged(series: MetricSeries, lines: int) -> bool:
    """Whether nearly every token of the last log lines is predicted."""
    accuracy = stats.values(series.points("mean_token_accuracy"))[-lines:]
    return bool(accuracy) and median(accuracy) > CONVERGED_ACCURACY


def non_finite(line: Mapping[str, Any]) -> str | None:
    """The first of loss, gradient norm and validation loss that is NaN or Inf, as text.

    The running job stops before such a step is applied (`training.nan_guard`); a log line keeps what it measured.
    """
    values = ((key, line.get(key)) for key in ("loss", "grad_norm", "eval_loss"))
    return next((f"{k} is {v}" for k, v in values if isinstance(v, float) and not math.isfinite(v)), None)


def _fall(begin: float, end: float) -> float:
    """The share of a loss by which it fell."""
    return 1 - end / max(begin, 1e-8)


def _recent(points: Points, window: int) -> int:
    """How many points the last `window` steps have; three where they have fewer."""
    count = 3
    while count < len(points) and points[-count - 1][0] > points[-1][0] - window:
        count += 1
    return count


def _sustained(points: Points, window: int, holds: Callable[[float], bool]) -> list[float]:
    """The values of the last `window` steps, three at least, where the condition holds for all of them; else none."""
    if len(points) < 3 or points[-1][0] - points[0][0] < window - 1 or not holds(points[-1][1]):
        return []
    recent = stats.values(points[-_recent(points, window) :])
    return recent if all(map(holds, recent)) else []
