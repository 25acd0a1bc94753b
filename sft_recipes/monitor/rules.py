"""The documents' troubleshooting as a list of rules: what each looks at, what it needs for that, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sft_recipes.monitor import learning_rules, system_rules
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.metrics_log import Run


@dataclass(frozen=True)
class Rule:
    """One sign: what the documents see in it, what is looked at, and what to do.

    Attributes:
        looks_at: one sentence; `{guard}` stands for the threshold `monitor.guard`.
        needs: figures of which one has to be there, on `at_least` lines; otherwise the rule is not judged.
        explains: rules that are not reported beside this one, as they show the same cause and would advise otherwise.
        look: the finding, or None where all is well.
    """

    name: str
    title: str
    looks_at: str
    remedy: str
    needs: tuple[str, ...]
    at_least: int
    look: Callable[[Run], Finding | None]
    explains: tuple[str, ...] = ()

    def judges(self, run: Run) -> bool:
        """Whether the run has the figures that this rule looks at."""
        return any(len(run.points(key)) >= self.at_least for key in self.needs) or not self.needs


# In the order in which findings are told: what ended the run, then what its figures cannot be trusted for, then signs.
RULES = (
    Rule(
        "fault",
        "The run ended in a fault",
        "The state that the run recorded, and what it said of its end: out of memory, a rank that died, an error.",
        "What it said last, in `log.txt` and on the terminal; where memory ran out, the changes that take less. The "
        "same command goes on from the newest checkpoint.",
        (),
        0,
        system_rules.fault,
    ),
    Rule(
        "divergence",
        "The loss is not a number, or rises for good",
        "Loss or gradient norm is no number; or the smoothed training loss ends 15% and six standard deviations above "
        "its own lowest, or 30% above where it began.",
        "Learning rate three times lower; look at the rows of that step, which the run names.",
        (),
        0,
        learning_rules.divergence,
        ("instability", "vanishing_gradients", "overfitting", "plateau", "forgetting"),
    ),
    Rule(
        "schedule",
        "The learning rate is not the plan's",
        "The learning rate of every log line against the plan's schedule, to a millionth.",
        "Find what sets it besides the plan; `make schedules` prints the plan's curve.",
        ("scheduled_rate",),
        1,
        learning_rules.schedule,
        ("plateau",),
    ),
    Rule(
        "vanishing_gradients",
        "Gradients vanish",
        "The gradient norm stays below {grad_norm_below} for three log lines and {window} steps.",
        "See that the loss looks at something (`make inspect`), that weights are trained, and the precision.",
        ("grad_norm",),
        3,
        learning_rules.vanishing_gradients,
        ("plateau",),
    ),
    Rule(
        "instability",
        "The loss spikes, or gradients explode",
        "Three log lines or warnings more than {loss_spike} robust standard deviations above the loss before them (one "
        "or two are not a sign); a gradient norm above {grad_norm_above} for three lines and {window} steps, or on "
        "every tenth line, and well above the first ones; a smoothed loss that rises and comes back; a learning rate "
        "three times the highest of its size row, while most is still to learn.",
        "Learning rate twice as low, or where its row starts; a longer warm-up; look at the rows.",
        ("loss",),
        6,
        learning_rules.instability,
        ("plateau",),
    ),
    Rule(
        "overfitting",
        "Validation loss rises while training loss falls",
        "Validation loss ends 2% and more than its noise above its best, training loss goes on falling, and the gap "
        "between them is above {overfitting_gap} and grows (yellow where validation has only stopped falling). A gap "
        "that does not grow is no sign.",
        "In this order: learning rate two to three times lower, fewer epochs, weight decay 0.05 to 0.1, more data. "
        "`final/` is the best step already.",
        ("eval_loss",),
        3,
        learning_rules.overfitting,
    ),
    Rule(
        "forgetting",
        "What the model knew before gets worse",
        "The loss on `data.retention_eval` rose by 5% and 0.05 since before the first step.",
        "Learning rate twice as low, fewer epochs, rows of that kind among the training data, LoRA.",
        ("eval_retention_loss",),
        2,
        learning_rules.forgetting,
    ),
    Rule(
        "plateau",
        "The loss does not fall",
        "The training loss fell by less than {plateau} of itself since warm-up, validation no more, and little before; "
        "or the learning rate is a third or less of the lowest of its size row, while most is still to learn. A loss "
        "near zero is not meant.",
        "Learning rate twice as high, or where its row starts.",
        ("loss",),
        12,
        learning_rules.plateau,
    ),
    Rule(
        "memory_creep",
        "Memory grows",
        "GPU memory (else the host's) grows by more than {memory_growth} of itself, steadily; a step up at an "
        "evaluation is no sign.",
        "Find what keeps tensors between steps; a start from the newest checkpoint begins with little.",
        ("memory_allocated_bytes", "host_memory_bytes"),
        14,
        system_rules.memory_creep,
    ),
    Rule(
        "input_bound",
        "Steps wait for data",
        "Half of the steps wait for data for more than {data_wait} of their time.",
        "More loader processes (`trainer.dataloader_num_workers`), rows on a local disk.",
        ("data_wait_fraction",),
        5,
        system_rules.input_bound,
        ("throughput_drop",),
    ),
    Rule(
        "slow_rank",
        "One rank holds up the others",
        "One rank works more than {rank_lag} longer on a step than the others, on most lines the same one.",
        "Look at that rank's GPU and node, or leave it out.",
        ("rank_lag",),
        5,
        system_rules.slow_rank,
        ("throughput_drop",),
    ),
    Rule(
        "throughput_drop",
        "The run becomes slower",
        "Tokens a second fall by more than {throughput_drop} of their usual for five lines and {window} steps, and "
        "stay there.",
        "See what else runs on the machine and whether the GPU lowers its clocks; go on elsewhere.",
        ("tokens_per_second",),
        15,
        system_rules.throughput_drop,
    ),
)
