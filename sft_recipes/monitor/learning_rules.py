"""Rules about what a run learns: losses, gradients and the learning rate.

Metrics are noisy: a finding has to exceed the scatter of the run's own log lines.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from statistics import median

from sft_recipes.config import sizes
from sft_recipes.config.schema import source_paths
from sft_recipes.monitor import advice, detectors, stats
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.detectors import LOSS_FLOOR, Alert, Detector
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.stats import Points

OUT_OF_RANGE = 3.0  # a learning rate this many times outside the range of its size class is reported


def alerts_of(run: Run, detect: Detector, key: str) -> list[Alert]:
    """The alerts of a detector: those recorded while the run trained, and those on its log lines, by step."""
    recorded = [alert for alert in run.alerts if alert.rule == detect.__name__]
    return sorted([*recorded, *detectors.replay(run, detect, key)], key=lambda alert: alert.step)


def divergence(run: Run) -> Finding | None:
    """Loss or gradient norm is NaN/Inf, or the loss rose and did not return."""
    rows: list[str] = []
    if run.state == "diverged":
        record = run.manifest.get("diverged") or {}
        values = f"loss {record.get('loss', '?')}, gradient norm {record.get('grad_norm', '?')}"
        step, rows = record.get("step"), record.get("rows") or []
        evidence = f"the run was stopped: {record.get('reason', 'NaN/Inf loss')} ({values})"
        evidence += f"; rows of that step: {', '.join(map(str, rows[:5]))}" if rows else ""
    else:
        step, evidence = _first_non_finite(run) or _risen(run)
        if step is None:
            return None
    steps = [advice.scale_learning_rate(run, 1 / 3), advice.check_rows(run, rows)]
    return Finding("divergence", "error", step, evidence, steps[::-1] if rows else steps)


def _first_non_finite(run: Run) -> tuple[int, str] | None:
    lines = ((line["step"], detectors.non_finite(line)) for line in run.training + run.validation)
    return next(((step, evidence) for step, evidence in lines if evidence), None)


def _risen(run: Run) -> tuple[int | None, str]:
    """The step since which the loss has stayed above its own lowest, or above its first value."""
    points = run.points("loss")
    losses = stats.values(points)
    if len(losses) < 6:
        return None, ""
    width = _smoothing_width(losses)
    smoothed = stats.smooth(losses, width)
    end, lowest = smoothed[-1], min(smoothed)
    # Six standard deviations, as the lowest of many values is low.
    rise = max(0.15, 6 * stats.of_median(stats.noise(losses), width))
    if end - lowest > max(LOSS_FLOOR, lowest * rise):
        step = points[smoothed.index(lowest) + width - 1][0]
        return step, f"training loss rose from {lowest:.3g} to {end:.3g} and did not return"
    first = losses[0]
    if end - first > max(LOSS_FLOOR, first * max(0.3, 6 * stats.noise(losses))):
        return points[0][0], f"training loss started at {first:.3g} and stays at {end:.3g}"
    return None, ""


def _smoothing_width(losses: Sequence[float]) -> int:
    """Lines to smooth over: a tenth of the run, 3 to 50."""
    return min(max(len(losses) // 10, 5 if len(losses) >= 10 else 3), 50)


def loss_spike(run: Run) -> Finding | None:
    """Several separate loss spikes; one or two recover without harm and stay alerts."""
    alerts = alerts_of(run, detectors.loss_spike, "loss")
    spikes = stats.episodes([alert.step for alert in alerts], max(run.monitor.window, run.log_interval))
    if len(spikes) < max(3, run.last_step / 3000):
        return None
    shown = ", ".join(map(str, spikes[:5])) + (", …" if len(spikes) > 5 else "")
    evidence = f"{len(spikes)} loss spikes (steps {shown}); the first: {alerts[0].evidence}"
    return Finding("loss_spike", "error", spikes[0], evidence, _lower_rate_and_check(run))


def exploding_gradients(run: Run) -> Finding | None:
    """Gradient norms that stay high, or are high on every tenth line."""
    alerts = alerts_of(run, detectors.exploding_gradients, "grad_norm")
    if not alerts:
        return None
    return Finding(
        "exploding_gradients", "error", alerts[0].step, alerts[0].evidence, _lower_rate_and_check(run)
    )  # fmt: skip


def _lower_rate_and_check(run: Run) -> list[str]:
    lower = advice.default_learning_rate(run) if _range_ratio(run) > 1 else advice.scale_learning_rate(run, 1 / 2)
    return [lower, *advice.longer_warmup(run), advice.check_rows(run)]


def instability(run: Run) -> Finding | None:
    """A training loss that rises and returns, or a learning rate far above its size class."""
    evidence = []
    hump = _hump(run)
    if hump is not None:
        evidence.append(f"the training loss rose at step {hump} and returned later")
    ratio = _range_ratio(run)
    if ratio >= OUT_OF_RANGE:
        evidence.append(f"the learning rate is {ratio:.0f} times the highest of size class {run.plan['size']}")
    if not evidence:
        return None
    severity = "warning" if hump is None and ratio < 3 * OUT_OF_RANGE else "error"
    first = 1 if ratio >= OUT_OF_RANGE else hump
    return Finding("instability", severity, first, "; ".join(evidence), _lower_rate_and_check(run))


def _range_ratio(run: Run) -> float:
    """The learning rate relative to its size class's range: above 1 over the highest, below 1 under the lowest.

    1 within the range, and where nearly every token is predicted already.
    """
    size, rate = sizes.size_classes().get(str(run.plan.get("size"))), run.plan.get("learning_rate")
    if size is None or not isinstance(rate, (int, float)) or detectors.is_converged(run, 3):
        return 1.0
    lowest, highest = size.ranges["learning_rate"].range or (rate, rate)
    return max(rate / highest, 1.0) if rate >= lowest else rate / lowest


def _hump(run: Run) -> int | None:
    """The first step at which the smoothed loss is above its lowest so far, beyond its noise."""
    points = run.points("loss")
    losses = stats.values(points)
    if len(losses) < 20:
        return None
    width = _smoothing_width(losses)
    smoothed = stats.smooth(losses, width)
    # Eight standard deviations: the highest of many windows against the lowest of many.
    rise = max(0.15, 8 * stats.of_median(stats.noise(losses), width))
    for index, (loss, lowest) in enumerate(zip(smoothed, itertools.accumulate(smoothed, min), strict=True)):
        if loss - lowest > max(LOSS_FLOOR, lowest * rise):
            return points[index][0]
    return None


def vanishing_gradients(run: Run) -> Finding | None:
    """Gradients so small that no weight changes."""
    alerts = alerts_of(run, detectors.vanishing_gradients, "grad_norm")
    if not alerts:
        return None
    return Finding(
        "vanishing_gradients",
        "error",
        alerts[0].step,
        alerts[0].evidence,
        [
            f"check the loss mask: assistant tokens must be in the loss: `{advice.inspect_command(run)}`",
            f"check that parameters are trained: trained_parameters is {run.plan.get('trained_parameters')}",
            "check the precision: run with `precision: fp32` to distinguish rounding from a detached graph",
        ],
    )


def overfitting(run: Run) -> Finding | None:
    """Validation loss rises while training loss falls; a warning where it has only stopped falling."""
    evaluations = run.points("eval_loss")
    losses = stats.values(evaluations)
    if len(losses) < 3 or len(run.points("loss")) < 3:
        return None
    best = losses.index(min(losses))
    rise, required = _rise_from(losses, best)
    since, severity = (best, "error") if rise > required else (len(losses) // 2, "warning")
    if severity == "warning" and not _stopped_falling(losses, since):
        return None
    training = _training_loss_at(run, evaluations)
    gap, gap_before = losses[-1] - training[-1], losses[since] - training[since]
    noise = stats.of_median(stats.noise(stats.values(run.points("loss"))), _lines_per_evaluation(run)) * training[since]
    noise *= 2 if severity == "error" else 4  # a rise is independent evidence
    grown = gap - gap_before > run.monitor.overfitting_gap / (2 if severity == "error" else 1) + noise
    falling = training[since] - training[-1] > max(0.02 * training[since], noise)
    if not detectors.exceeds_overfitting_gap(gap, run.monitor) or not grown or not falling:
        return None
    step, change = evaluations[best][0], "rose" if severity == "error" else "went"
    kept = "final/" if run.state == "finished" else f"best-{step}/"
    return Finding(
        "overfitting",
        severity,
        step,
        f"validation loss {change} from {losses[since]:.3g} (step {evaluations[since][0]}) to {losses[-1]:.3g}, "
        f"training loss fell from {training[since]:.3g} to {training[-1]:.3g}, the gap grew to {gap:.2g}; "
        f"{kept} is the best step, {step}",
        [
            f"{advice.scale_learning_rate(run, 1 / 2)}; up to three times lower",
            *advice.fewer_epochs(run, step),
            *advice.more_weight_decay(run),
            "more data, and more varied: data.train takes a list of sources",
        ],
    )


def _rise_from(losses: Sequence[float], best: int) -> tuple[float, float]:
    """How far validation loss is above its best at the end, and the rise required: more if one evaluation follows."""
    after = losses[best + 1 :]
    share = 0.05 if len(after) < 2 else 0.02
    end = sum(after[-2:]) / 2 if len(after) >= 2 else losses[-1]
    return end - losses[best], max(share, share * losses[best], 4 * stats.zigzag(losses))


def _stopped_falling(losses: Sequence[float], middle: int) -> bool:
    if len(losses) < 6:
        return False
    return losses[middle] - min(losses[middle:]) <= max(0.01 * losses[middle], 2 * stats.zigzag(losses))


def _lines_per_evaluation(run: Run) -> int:
    """Training lines between two evaluations, 3 to 20."""
    evaluations = run.points("eval_loss")
    return min(max(len(run.points("loss")) // max(len(evaluations), 1), 3), 20)


def _training_loss_at(run: Run, evaluations: Points) -> list[float]:
    """The training loss at each evaluation: the median of the lines before it."""
    points, count = run.points("loss"), _lines_per_evaluation(run)
    losses, steps = stats.values(points), [step for step, _ in points]
    ends = [max(bisect.bisect_right(steps, step), 1) for step, _ in evaluations]
    return [median(losses[max(0, end - count) : end]) for end in ends]


def plateau(run: Run) -> Finding | None:
    """A run that does not learn although its loss is high: no loss falls, or the learning rate is far too low."""
    after = [point for point in run.points("loss") if point[0] > run.warmup_steps]
    recorded = [alert for alert in run.alerts if alert.rule == "plateau"]
    ratio, check = _range_ratio(run), f"or check that the data can be learned: `{advice.inspect_command(run)}`"
    if ratio <= 1 / OUT_OF_RANGE and len(after) >= 3 and after[-1][1] >= LOSS_FLOOR:
        evidence = (
            f"{detectors.fall_since_warmup(run)}; the learning rate is {1 / ratio:.0f} times below the lowest of "
        )
        evidence += f"size class {run.plan['size']}"
        severity = "warning" if ratio > 1 / (3 * OUT_OF_RANGE) else "error"
        return Finding("plateau", severity, after[0][0], evidence, [advice.default_learning_rate(run), check])
    steps = [advice.scale_learning_rate(run, 2), check]
    if evidence := detectors.plateau(run) or "":
        return Finding("plateau", "error", after[0][0], evidence, steps)
    if recorded:  # it fell later
        return Finding("plateau", "warning", recorded[0].step, recorded[0].evidence, steps)
    return None


def forgetting(run: Run) -> Finding | None:
    """The loss on the retention set is higher than before the first step."""
    points = run.points("eval_retention_loss")
    before, last = points[0][1], min(stats.values(points[-2:] if len(points) > 2 else points[-1:]))
    if last - before <= max(0.05, 0.05 * before):
        return None
    evaluations = run.points("eval_loss")
    best = min(evaluations, key=lambda point: point[1])[0] if evaluations else points[-1][0]
    at_best = dict(points).get(best, points[-1][1])
    since = next(step for step, loss in points if loss - before > max(0.05, 0.05 * before))
    return Finding(
        "forgetting",
        "error",
        since,
        f"the loss on the retention set was {before:.3g} before training, {at_best:.3g} at the best step {best}, "
        f"{points[-1][1]:.3g} at step {points[-1][0]}",
        [advice.scale_learning_rate(run, 1 / 2), *advice.fewer_epochs(run, since), *_rehearse_or_use_lora(run)],
    )


def _rehearse_or_use_lora(run: Run) -> list[str]:
    data, size = run.section("data"), str(run.plan.get("size"))
    sources = [*source_paths(data.get("train") or "YOUR_ROWS"), str(data.get("retention_eval") or "RETENTION_ROWS")]
    steps = [f"`data.train: [{', '.join(sources)}]`, with rows that are not in data.retention_eval"]
    if run.plan.get("method") == "full":
        lora = f"lora-{size}" if f"lora-{size}" in sizes.size_classes() else "lora-…"
        steps.append(f"LoRA, which learns less and forgets less: `size: {lora}` and `lora: {{r: 16, alpha: 32}}`")
    return steps


def schedule(run: Run) -> Finding | None:
    """The logged learning rate differs from the plan's schedule."""
    logged, peak = run.points("learning_rate"), run.planned("learning_rate")
    for step, rate in logged:
        planned = run.scheduled_learning_rate(step)
        # A cosine's end is a difference of nearly equal numbers: the second term.
        if planned is not None and abs(rate - planned) > 1e-6 * abs(planned) + 1e-9 * peak:
            highest = max(stats.values(logged))
            return Finding(
                "schedule",
                "error",
                step,
                f"the learning rate at step {step} is {rate:.4g}, expected {planned:.4g}; highest logged "
                f"{highest:.4g}, planned peak {peak:.4g} after {run.planned('warmup_steps')} of "
                f"{run.planned('optimizer_steps')} steps",
                [
                    "find what else sets it: a callback, a custom optimizer or scheduler",
                    f"the plan's curve: `make schedules RECIPE={run.plan.get('recipe')}`",
                ],
            )
    return None
