"""The rules of `diagnose`: one function each, which returns a finding with evidence and advice, and the table of them.

The first paragraph of a rule's docstring is its condition, where `{key}` is the threshold `monitor.key`; the second is
its advice, to which a finding adds the values of this run. tests/unit/test_diagnose.py writes docs/troubleshooting.md
from them. Metrics are noisy: a finding has to exceed the scatter of the run's own log lines.

To add an alert: its threshold in `config.schema.Monitor`, its detector in `detectors` if it runs live, its finding and
its row here.
"""

import bisect
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import get_args

from sft_recipes.config import sizes
from sft_recipes.config.schema import StoppingAlert
from sft_recipes.monitor import detectors, stats
from sft_recipes.monitor.detectors import LOSS_FLOOR, AlertStream, Detector
from sft_recipes.monitor.metrics_log import Alert, MetricSeries, Points, Run
from sft_recipes.runtime.units import GIB

_OUT_OF_RANGE = 3.0  # a learning rate this many times outside the range of its size class is reported


@dataclass(frozen=True)
class Finding:
    """One issue of a run.

    Attributes:
        rule: the name of the rule.
        severity: `error` if it ruins the run, `warning` if it wastes time or quality.
        step: the optimizer step at which it begins; None if unknown.
        evidence: the measured values.
        advice: what to change in this run, most effective first; `diagnose` appends the rule's own advice.
    """

    rule: str
    severity: str
    step: int | None
    evidence: str
    advice: list[str] = field(default_factory=list)


def failure(run: Run) -> Finding | None:
    """The state and the error that the run recorded: out of memory, a rank that died, an exception.

    Read the end of `log.txt`; if memory ran out, the listed changes use less. `make train NAME=… RESUME=1` resumes from
    the latest checkpoint, if there is one.
    """
    if run.folder.state() != "failed":
        return None
    error = str(run.manifest.get("error") or f"exit code {run.manifest.get('exit_code', '?')}")
    advice = [f"uses less memory: `{change}`" for change in run.manifest.get("takes_less") or []]
    return Finding("failure", "error", run.last_step or None, error, advice)


def divergence(run: Run) -> Finding | None:
    """Loss or gradient norm is NaN/Inf (live: `nan_guard` stops the run); or the smoothed training loss ends 15% and
    six standard deviations above its own lowest, or 30% above its first value.

    Divide the learning rate by three; check the rows of that step, which the run names, with `make inspect`.
    """
    advice = _scale_learning_rate(run, 1 / 3)
    if run.folder.state() == "diverged":
        record = run.manifest.get("diverged") or {}
        values = f"loss {record.get('loss', '?')}, gradient norm {record.get('grad_norm', '?')}"
        evidence = f"the run was stopped: {record.get('reason', 'NaN/Inf loss')} ({values})"
        if rows := ", ".join(map(str, record.get("rows", [])[:5])):
            evidence += f"; rows of that step: {rows}"
            advice = [f"fix or remove the rows of that step: {rows}", *advice]
        return Finding("divergence", "error", record.get("step"), evidence, advice)
    for line in run.lines:
        if evidence := detectors.non_finite(line):
            return Finding("divergence", "error", line["step"], evidence, advice)
    points, losses = run.points("loss"), stats.values(run.points("loss"))
    if len(losses) < 6:
        return None
    smoothed, noise = _smoothed_loss(run)
    (_, end), (step, lowest) = smoothed[-1], min(smoothed, key=lambda point: point[1])
    if end - lowest > max(LOSS_FLOOR, lowest * max(0.15, 6 * noise)):  # six, as the lowest of many values is low
        evidence = f"training loss rose from {lowest:.3g} to {end:.3g} and did not return"
        return Finding("divergence", "error", step, evidence, advice)
    if end - losses[0] > max(LOSS_FLOOR, losses[0] * max(0.3, 6 * stats.noise(losses))):
        evidence = f"training loss started at {losses[0]:.3g} and stays at {end:.3g}"
        return Finding("divergence", "error", points[0][0], evidence, advice)
    return None


def schedule(run: Run) -> Finding | None:
    """The learning rate of every log line against the plan's schedule, to a relative 1e-6.

    Find what else sets it; `make schedules RUN=…` prints the plan's curve.
    """
    logged = zip(run.points("learning_rate"), run.points("scheduled_learning_rate"), strict=True)
    for (step, rate), (_, planned) in logged:
        # A cosine's end is a difference of nearly equal numbers: the second term.
        if abs(rate - planned) > 1e-6 * abs(planned) + 1e-9 * run.plan.learning_rate:
            evidence = f"the learning rate at step {step} is {rate:.4g}, expected {planned:.4g}"
            return Finding("schedule", "error", step, evidence)
    return None


def vanishing_gradients(run: Run) -> Finding | None:
    """The gradient norm stays below {grad_norm_below} for {window} steps, at least three values.

    Check with `make inspect` that assistant tokens are in the loss, in `log.txt` that parameters are trained, and with
    `precision: fp32` whether it is rounding.
    """
    return _first_alert(run, detectors.vanishing_gradients, "error")


def exploding_gradients(run: Run) -> Finding | None:
    """The gradient norm stays above {grad_norm_above} for {window} steps, at least three values; the limit is up to
    three times higher if the first norms are near it.

    Halve the learning rate, or use the default of the size class; a longer warm-up; check the rows.
    """
    return _first_alert(run, detectors.exploding_gradients, "error", _lower_rate(run))


def loss_spike(run: Run) -> Finding | None:
    """The loss is 0.3 and {loss_spike} robust standard deviations above the median of up to 50 before it. Live: each
    such step is an alert. `diagnose`: three separate alerts are a finding; fewer are only counted.

    Halve the learning rate, or use the default of the size class; a longer warm-up; check the rows.
    """
    alerts = alerts_of(run, detectors.loss_spike)
    steps, interval = sorted({alert.step for alert in alerts}), run.plan.sections.trainer["logging_steps"]
    spikes = steps[:1] + [
        step for before, step in itertools.pairwise(steps) if step - before > max(run.monitor.window, interval)
    ]
    if len(spikes) < max(3, run.last_step / 3000):
        return None
    shown = ", ".join(map(str, spikes[:5])) + (", …" if len(spikes) > 5 else "")
    evidence = f"{len(spikes)} loss spikes (steps {shown}); the first: {alerts[0].evidence}"
    return Finding("loss_spike", "error", spikes[0], evidence, _lower_rate(run))


def instability(run: Run) -> Finding | None:
    """A smoothed training loss that rises beyond its noise and returns.

    Halve the learning rate, or use the default of the size class; a longer warm-up; check the rows.
    """
    smoothed, noise = _smoothed_loss(run)
    share = max(0.15, 8 * noise)  # the highest of many windows against the lowest of many
    lows = itertools.accumulate(stats.values(smoothed), min)
    for (first_step, _), (_, loss), lowest in zip(run.points("loss"), smoothed, lows, strict=False):
        if loss - lowest > max(LOSS_FLOOR, lowest * share):
            evidence = f"the training loss rose at step {first_step} and returned later"
            return Finding("instability", "error", first_step, evidence, _lower_rate(run))
    return None


def learning_rate(run: Run) -> Finding | None:
    """The learning rate is at least three times the highest of its size class, or at most a third of the lowest, while
    the model is not converged: Adam and clipping can hide that from every curve.

    Use the default of the size class.
    """
    rate, (lowest, highest) = run.plan.learning_rate, _learning_rates(run)
    factor = max(rate / highest, lowest / rate)
    if factor < _OUT_OF_RANGE or detectors.is_converged(run, 3):
        return None
    side = "times the highest" if rate > highest else "times below the lowest"
    severity = "warning" if factor < 3 * _OUT_OF_RANGE else "error"
    evidence = f"the learning rate is {factor:.0f} {side} of size class {run.plan.size}"
    return Finding("learning_rate", severity, 1, evidence, _default_learning_rate(run))


def overfitting(run: Run) -> Finding | None:
    """Validation loss ends 2% and more than its noise above its best, training loss keeps falling, and the gap between
    them is above {overfitting_gap} and grows. A gap that does not grow is no finding. Live: `overfitting_signal` in the
    log is the gap alone.

    In this order: learning rate two to three times lower, fewer epochs, weight decay 0.05 to 0.1, more data, and more
    varied (`data.train` takes a list). `final/` is the best step already.
    """
    evaluations, points = run.points("eval_loss"), run.points("loss")
    losses, trained = stats.values(evaluations), stats.values(points)
    if len(losses) < 3 or len(trained) < 3:
        return None
    best = losses.index(min(losses))
    rise = sum(losses[-2:]) / 2 - losses[best]  # half of it, if only one evaluation follows
    if rise <= max(0.02, 0.02 * losses[best], 4 * stats.zigzag(losses)):
        return None
    lines = min(max(len(trained) // len(losses), 3), 20)  # training lines between two evaluations
    ends = [max(bisect.bisect_right(points, (step, math.inf)), 1) for step, _ in evaluations]
    training = [median(trained[max(0, end - lines) : end]) for end in ends]
    gap, gap_before = losses[-1] - training[-1], losses[best] - training[best]
    noise = 2 * stats.noise_of_median(trained, lines) * training[best]
    grown = gap - gap_before > run.monitor.overfitting_gap / 2 + noise  # half: the rise is independent evidence
    falling = training[best] - training[-1] > max(0.02 * training[best], noise)
    if gap <= run.monitor.overfitting_gap or not grown or not falling:
        return None
    step = evaluations[best][0]
    evidence = (
        f"validation loss rose from {losses[best]:.3g} (step {step}, the best) to {losses[-1]:.3g}, training loss fell "
        f"from {training[best]:.3g} to {training[-1]:.3g}, the gap grew to {gap:.2g}"
    )
    advice = [
        *_scale_learning_rate(run, 1 / 2),
        *_fewer_epochs(run, step),
        *_change(run, "weight_decay", lambda decay: next((higher for higher in (0.05, 0.1) if higher > decay), decay)),
    ]
    return Finding("overfitting", "error", step, evidence, advice)


def forgetting(run: Run) -> Finding | None:
    """The loss on `data.retention_eval` rose by 5% and 0.05 compared with before the first step.

    Halve the learning rate; fewer epochs; add 5% to 10% rows like those of `data.retention_eval` to `data.train`; LoRA,
    which learns less and forgets less (`size: lora-…`, `lora: {r: 16, alpha: 32}`).
    """
    points = run.points("eval_retention_loss")
    (_, before), (last_step, last) = points[0], points[-1]
    limit = before + max(0.05, 0.05 * before)
    if min(stats.values(points[1:][-2:])) <= limit:
        return None
    since = next(step for step, loss in points if loss > limit)
    advice = [*_scale_learning_rate(run, 1 / 2), *_fewer_epochs(run, since)]
    evidence = f"the loss on the retention set was {before:.3g} before training, {last:.3g} at step {last_step}"
    return Finding("forgetting", "error", since, evidence, advice)


def plateau(run: Run) -> Finding | None:
    """The training loss fell by less than {plateau} of itself since warm-up, validation no more, and little before. A
    loss near zero is no plateau.

    Double the learning rate, or use the default of the size class; check with `make inspect` that the data can be
    learned.
    """
    advice = _scale_learning_rate(run, 2)
    if evidence := detectors.plateau(run):
        first = next(step for step, _ in run.points("loss") if step > run.plan.warmup_steps)
        return Finding("plateau", "error", first, evidence, advice)
    recorded = next((alert for alert in run.alerts if alert.rule == "plateau"), None)  # it fell later
    return Finding("plateau", "warning", recorded.step, recorded.evidence, advice) if recorded else None


def memory_growth(run: Run) -> Finding | None:
    """GPU memory (else host memory) grows steadily by more than {memory_growth} of itself; a jump at an evaluation is
    no finding.

    Find what keeps tensors or rows between steps, such as a list to which losses are appended; a restart from the
    latest checkpoint frees memory.
    """
    kind = "GPU" if len(run.points("memory_allocated_bytes")) >= 12 else "host"
    points = run.points("memory_allocated_bytes" if kind == "GPU" else "host_memory_bytes")
    points = points[len(points) // 10 :]  # caches fill during the first lines
    parts = stats.blocks(stats.values(points), 6)
    growth, rises = parts[-1] - parts[0], [after - before for before, after in itertools.pairwise(parts)]
    # One or two jumps are an allocator that settles at an evaluation.
    steady = sum(rise > 0.05 * growth for rise in rises) >= 4 and max(rises) <= growth / 2
    if growth <= run.monitor.memory_growth * parts[0] or not steady or parts[-1] - parts[3] < 0.25 * growth:
        return None
    evidence = f"{kind} memory grows steadily, from {parts[0] / GIB:.2f} to {parts[-1] / GIB:.2f} GiB"
    return Finding("memory_growth", "error", points[0][0], evidence)


def input_bound(run: Run) -> Finding | None:
    """Half of the steps wait for data for more than {data_wait} of their time.

    More data loader workers, rows on a local disk instead of a network file system (`HF_HOME`).
    """
    points = run.points("data_wait_fraction")
    points = points[min(2, len(points) // 4) :]  # caches fill during the first lines
    if (share := median(stats.values(points))) <= run.monitor.data_wait:
        return None
    workers = run.plan.data_workers
    advice = [f"trainer.dataloader_num_workers={2 * workers or 4}, was {workers}"]
    evidence = f"half of the steps wait for data for {share:.0%} of their time or more"
    return Finding("input_bound", "warning", points[0][0], evidence, advice)


def throughput_drop(run: Run) -> Finding | None:
    """Tokens per second are {throughput_drop} below the median of the lines before, on every log line of {window}
    steps, at least three.

    Check what else runs on the node, and whether the GPU throttles (`nvidia-smi -q -d PERFORMANCE,CLOCK`); resume on
    another node.
    """
    return _first_alert(run, detectors.throughput_drop, "warning")


def alerts_of(run: Run, detect: Detector) -> list[Alert]:
    """The alerts of a detector: those recorded while the run trained, and those on its log lines, by step."""
    recorded = [alert for alert in run.alerts if alert.rule == detect.__name__]
    stream = AlertStream([detect], MetricSeries(run.plan))
    replayed = [alert for line in run.lines for alert in stream.add(line["step"], line)]
    return sorted([*recorded, *replayed], key=lambda alert: alert.step)


def _first_alert(run: Run, detect: Detector, severity: str, advice: Sequence[str] = ()) -> Finding | None:
    alerts = alerts_of(run, detect)
    return Finding(detect.__name__, severity, alerts[0].step, alerts[0].evidence, [*advice]) if alerts else None


def _smoothed_loss(run: Run) -> tuple[Points, float]:
    """The moving median of the loss over a tenth of the run, 3 to 50 lines, each with the last step that it covers; and
    its relative noise."""
    points, losses = run.points("loss"), stats.values(run.points("loss"))
    width = min(max(len(points) // 10, 5 if len(points) >= 10 else 3), 50)
    steps = [step for step, _ in points[width - 1 :]]
    return list(zip(steps, stats.smooth(losses, width), strict=True)), stats.noise_of_median(losses, width)


def _learning_rates(run: Run) -> list[float]:
    """The lowest and the highest learning rate of the size class."""
    return sizes.size_classes()[run.plan.size].ranges["learning_rate"].range


def _change(run: Run, key: str, new: Callable[[float], float], note: str = "") -> list[str]:
    """`trainer.KEY=VALUE`, with the `allow_out_of_range` that it needs; nothing if the value stays the same."""
    present = getattr(run.plan, key)
    if (value := new(present)) == present:
        return []
    old = sizes.scientific(present) if key == "learning_rate" else f"{present:g}"
    return [f"{sizes.override_line(run.plan.size, key, value)}, was {old}{note}"]


def _scale_learning_rate(run: Run, factor: float) -> list[str]:
    return _change(run, "learning_rate", lambda rate: rate * factor)


def _default_learning_rate(run: Run) -> list[str]:
    default = sizes.size_classes()[run.plan.size].ranges["learning_rate"].start
    return _change(run, "learning_rate", lambda _: default, f" (the default of size class {run.plan.size})")


def _fewer_epochs(run: Run, step: int) -> list[str]:
    """The epochs completed at `step`, rounded up."""
    if not run.plan.steps_per_epoch or run.plan.sections.trainer["max_steps"] > 0:
        return []
    done = max(math.ceil(step / run.plan.steps_per_epoch - 0.01), 1)
    return _change(run, "num_train_epochs", lambda planned: min(planned, done))


def _lower_rate(run: Run) -> list[str]:
    """The default learning rate if the present one is above its size class, else half of it."""
    too_high = run.plan.learning_rate > _learning_rates(run)[1]
    return _default_learning_rate(run) if too_high else _scale_learning_rate(run, 1 / 2)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        find: the finding of a run that has been read, or None; the function has the rule's name.
        metrics: one of these must have `min_points` values, or `diagnose` skips the rule.
        explains: rules whose findings are dropped where this one has one: same cause, other advice.
        detect: the detector of a rule that also runs live, or None.
    """

    find: Callable[[Run], Finding | None]
    title: str
    metrics: Sequence[str] = ()
    min_points: int = 0
    explains: Sequence[str] = ()
    detect: Detector | None = None

    @property
    def name(self) -> str:
        """As in findings, in `warnings.jsonl` and in `monitor.stop_on`."""
        return self.find.__name__

    @property
    def advice(self) -> str:
        """The second paragraph of the rule's docstring, on one line."""
        return " ".join(inspect.getdoc(self.find).partition("\n\n")[2].split())

    @property
    def per_step(self) -> bool:
        """Whether it runs live after every optimizer step; else at every log line."""
        return self.name in get_args(StoppingAlert)

    def has_data(self, run: Run) -> bool:
        """Whether the run has enough values of the rule's metrics."""
        return any(len(run.points(key)) >= self.min_points for key in self.metrics) or not self.metrics


_UNSTABLE = ("loss_spike", "instability", "plateau", "learning_rate")
_DIVERGED = (*_UNSTABLE, "exploding_gradients", "vanishing_gradients", "overfitting", "forgetting")
# In the order of findings: what ended the run, what makes its metrics unreliable, then the rest.
RULES = (
    Rule(failure, "The run ended with an error"),
    Rule(divergence, "The loss is NaN/Inf, or rises permanently", explains=_DIVERGED),
    Rule(schedule, "The learning rate is not the plan's", ["scheduled_learning_rate"], 1, ["plateau"]),
    Rule(vanishing_gradients, "Vanishing gradients", ["grad_norm"], 3, ["plateau"], detectors.vanishing_gradients),
    Rule(exploding_gradients, "Exploding gradients", ["grad_norm"], 3, _UNSTABLE, detectors.exploding_gradients),
    Rule(loss_spike, "Loss spikes", ["loss"], 21, _UNSTABLE[1:], detectors.loss_spike),
    Rule(learning_rate, "The learning rate is far from its size class", ["loss"], 6, ["instability", "plateau"]),
    Rule(instability, "Unstable training", ["loss"], 20, ["plateau"]),
    Rule(overfitting, "Overfitting", ["eval_loss"], 3),
    Rule(forgetting, "Forgetting", ["eval_retention_loss"], 2),
    Rule(plateau, "The loss does not fall", ["loss"], 12, detect=detectors.plateau),
    Rule(memory_growth, "Memory grows", ["memory_allocated_bytes", "host_memory_bytes"], 14),
    Rule(input_bound, "Steps wait for data", ["data_wait_fraction"], 5, ["throughput_drop"]),
    Rule(throughput_drop, "Throughput drops", ["tokens_per_second"], 9, detect=detectors.throughput_drop),
)
