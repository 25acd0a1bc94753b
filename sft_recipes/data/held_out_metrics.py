"""Metrics of completions of held-out prompts: a registry, to which `generation.metrics_file` of a recipe adds.

from sft_recipes.data.held_out_metrics import metric

@metric(applies=lambda messages, reference: reference.strip().isdigit())
def absolute_error(reference: str, completion: str) -> float:
    ...
"""

import math
import runpy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import Generation, did_you_mean
from sft_recipes.runtime.errors import ConfigError

Messages = list[dict[str, Any]]
Results = dict[str, dict[str, float | int]]  # `mean` and `prompts` of each metric


@dataclass(frozen=True)
class HeldOutMetric:
    """A metric.

    Attributes:
        score: of a completion, from the reference and the completion; the metric is the mean over prompts.
        applies: whether it is defined for a prompt, from its messages and the reference.
    """

    name: str
    score: Callable[[str, str], float]
    applies: Callable[[Messages, str], bool]


REGISTRY: dict[str, HeldOutMetric] = {}


def metric(applies: Callable[[Messages, str], bool] = lambda messages, reference: True) -> Callable[..., Any]:
    """Register a function as a metric of its name."""

    def register(score: Callable[[str, str], float]) -> Callable[[str, str], float]:
        REGISTRY[score.__name__] = HeldOutMetric(score.__name__, score, applies)
        return score

    return register


@metric()
def exact_match(reference: str, completion: str) -> float:
    """Return 1 if they are equal, without white space at both ends."""
    return float(reference.strip() == completion.strip())


def load(section: Generation) -> list[HeldOutMetric]:
    """Return the metrics of a recipe; runs its `metrics_file`.

    Raises:
        ConfigError: the file cannot be run, or a metric is not registered.
    """
    if section.metrics_file:
        path = Path(section.metrics_file).expanduser()
        try:
            runpy.run_path(str(path))
        except Exception as error:  # of any kind: it is the user's code
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"generation.metrics_file: {path} cannot be run ({reason}). Correct it") from error
    if unknown := next((name for name in section.metrics if name not in REGISTRY), None):
        known = f"{', '.join(REGISTRY)}{did_you_mean(unknown, REGISTRY)}"
        raise ConfigError(f"generation.metrics: found {unknown}, expected one of {known}")
    return [REGISTRY[name] for name in section.metrics]


def evaluate(metrics: Sequence[HeldOutMetric], scored: Sequence[tuple[Messages, str, str]]) -> Results:
    """Return the mean and the number of prompts of each metric that applies to one or more.

    Args:
        scored: messages, reference and completion of each prompt.

    Raises:
        ConfigError: a function fails, or returns no finite number.
    """
    results: Results = {}
    for each in metrics:
        try:
            scores = [float(each.score(ref, text)) for messages, ref, text in scored if each.applies(messages, ref)]
            if not all(map(math.isfinite, scores)):
                raise ValueError("found a score that is not finite")
        except Exception as error:  # of any kind: it is the user's code
            raise ConfigError(f"generation.metrics: {each.name}: {type(error).__name__}: {error}") from error
        if scores:
            results[each.name] = {"mean": round(statistics.fmean(scores), 6), "prompts": len(scores)}
    return results
