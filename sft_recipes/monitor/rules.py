"""The table of rules: what each measures, which metrics and thresholds it needs, whether it runs live, and its advice.

To add an alert: its detector in `detectors`, its finding in `learning_rules` or `system_rules`, its threshold in
`config.schema.Monitor`, and its row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sft_recipes.monitor import detectors, learning_rules, system_rules
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.detectors import Detector
from sft_recipes.monitor.metrics_log import Run


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: as in findings, in `warnings.jsonl` and in `monitor.stop_on`.
        measures: one sentence; `{key}` is the threshold `monitor.key`.
        advice: what to do, in short; a finding has the values.
        metrics: one of these must have `min_points` values, or `diagnose` skips the rule.
        find: the finding of a run that has been read, or None.
        explains: rules whose findings are dropped where this one has one: same cause, other advice.
        detect: the detector of a rule that also runs live, or None.
        per_step: whether it runs live after every optimizer step; else at every log line.
    """

    name: str
    title: str
    measures: str
    advice: str
    metrics: tuple[str, ...]
    min_points: int
    find: Callable[[Run], Finding | None]
    explains: tuple[str, ...] = ()
    detect: Detector | None = None
    per_step: bool = False

    def has_data(self, run: Run) -> bool:
        """Whether the run has enough values of the rule's metrics."""
        return any(len(run.points(key)) >= self.min_points for key in self.metrics) or not self.metrics


# In the order of findings: what ended the run, what makes its metrics unreliable, then the rest.
RULES = (
    Rule(
        "failure",
        "The run ended with an error",
        "The state and the error that the run recorded: out of memory, a rank that died, an exception.",
        "Read the end of `log.txt`; if memory ran out, the listed changes use less. The same command resumes from the "
        "latest checkpoint, if there is one.",
        (),
        0,
        system_rules.failure,
    ),
    Rule(
        "divergence",
        "The loss is NaN/Inf, or rises permanently",
        "Loss or gradient norm is NaN/Inf (live: `nan_guard` stops the run); or the smoothed training loss ends 15% "
        "and six standard deviations above its own lowest, or 30% above its first value.",
        "Divide the learning rate by three; check the rows of that step, which the run names.",
        (),
        0,
        learning_rules.divergence,
        (
            "loss_spike",
            "exploding_gradients",
            "instability",
            "vanishing_gradients",
            "overfitting",
            "plateau",
            "forgetting",
        ),
    ),
    Rule(
        "schedule",
        "The learning rate is not the plan's",
        "The learning rate of every log line against the plan's schedule, to a relative 1e-6.",
        "Find what else sets it; `make schedules` prints the plan's curve.",
        ("scheduled_learning_rate",),
        1,
        learning_rules.schedule,
        ("plateau",),
    ),
    Rule(
        "vanishing_gradients",
        "Vanishing gradients",
        "The gradient norm stays below {grad_norm_below} for {window} steps, at least three values.",
        "Check the loss mask (`make inspect`), that parameters are trained, and the precision.",
        ("grad_norm",),
        3,
        learning_rules.vanishing_gradients,
        ("plateau",),
        detectors.vanishing_gradients,
        per_step=True,
    ),
    Rule(
        "exploding_gradients",
        "Exploding gradients",
        "The gradient norm stays above {grad_norm_above} for {window} steps, at least three values, or is above it on "
        "every tenth of the last hundred; the limit is up to three times higher if the first norms are near it.",
        "Halve the learning rate, or use the default of the size class; a longer warm-up; check the rows.",
        ("grad_norm",),
        3,
        learning_rules.exploding_gradients,
        ("loss_spike", "instability", "plateau"),
        detectors.exploding_gradients,
        per_step=True,
    ),
    Rule(
        "loss_spike",
        "Loss spikes",
        "The loss is 0.3 and {loss_spike} robust standard deviations above the median of up to 50 before it. Live: "
        "each such step is an alert. `diagnose`: three separate alerts are a finding; fewer are only listed.",
        "Halve the learning rate, or use the default of the size class; a longer warm-up; check the rows.",
        ("loss",),
        detectors.SPIKE_HISTORY[0] + 1,
        learning_rules.loss_spike,
        ("instability", "plateau"),
        detectors.loss_spike,
        per_step=True,
    ),
    Rule(
        "instability",
        "Unstable training",
        "A smoothed training loss that rises and returns; or a learning rate three times the highest of its size "
        "class, while the model is not converged.",
        "Halve the learning rate, or use the default of the size class; a longer warm-up; check the rows.",
        ("loss",),
        6,
        learning_rules.instability,
        ("plateau",),
    ),
    Rule(
        "overfitting",
        "Overfitting",
        "Validation loss ends 2% and more than its noise above its best, training loss keeps falling, and the gap "
        "between them is above {overfitting_gap} and grows (a warning if validation has only stopped falling). A gap "
        "that does not grow is no finding. Live: `overfitting_signal` in the log is the gap alone.",
        "In this order: learning rate two to three times lower, fewer epochs, weight decay 0.05 to 0.1, more data. "
        "`final/` is the best step already.",
        ("eval_loss",),
        3,
        learning_rules.overfitting,
    ),
    Rule(
        "forgetting",
        "Forgetting",
        "The loss on `data.retention_eval` rose by 5% and 0.05 compared with before the first step.",
        "Halve the learning rate, fewer epochs, similar rows in the training data, LoRA.",
        ("eval_retention_loss",),
        2,
        learning_rules.forgetting,
    ),
    Rule(
        "plateau",
        "The loss does not fall",
        "The training loss fell by less than {plateau} of itself since warm-up, validation no more, and little before; "
        "or the learning rate is a third or less of the lowest of its size class, while the model is not converged. A "
        "loss near zero is no plateau.",
        "Double the learning rate, or use the default of the size class.",
        ("loss",),
        12,
        learning_rules.plateau,
        detect=detectors.plateau,
    ),
    Rule(
        "memory_growth",
        "Memory grows",
        "GPU memory (else host memory) grows steadily by more than {memory_growth} of itself; a jump at an evaluation "
        "is no finding.",
        "Find what keeps tensors between steps; a restart from the latest checkpoint frees memory.",
        ("memory_allocated_bytes", "host_memory_bytes"),
        14,
        system_rules.memory_growth,
    ),
    Rule(
        "input_bound",
        "Steps wait for data",
        "Half of the steps wait for data for more than {data_wait} of their time.",
        "More data loader workers (`trainer.dataloader_num_workers`), rows on a local disk.",
        ("data_wait_fraction",),
        5,
        system_rules.input_bound,
        ("throughput_drop",),
    ),
    Rule(
        "slow_rank",
        "One rank is slow",
        "One rank takes more than {rank_lag} longer per step than the others, on most lines the same rank.",
        "Check that rank's GPU and node, or exclude it.",
        ("rank_lag",),
        5,
        system_rules.slow_rank,
        ("throughput_drop",),
    ),
    Rule(
        "throughput_drop",
        "Throughput drops",
        "Tokens per second are {throughput_drop} below the median of the lines before, on every log line of {window} "
        "steps, at least three.",
        "Check what else runs on the node and whether the GPU throttles; resume on another node.",
        ("tokens_per_second",),
        9,
        system_rules.throughput_drop,
        detect=detectors.throughput_drop,
    ),
)
