"""Robust figures of noisy series: smoothing, noise, blocks and stretches, by medians that one odd line cannot move."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import median

from sft_recipes.monitor.metrics_log import Points

ROBUST = 1.4826  # median deviations in a standard deviation, where noise is normal


def values(points: Points) -> list[float]:
    """The figures without their steps."""
    return [value for _, value in points]


def smooth(numbers: Sequence[float], width: int) -> list[float]:
    """The median of each `width` neighbours; `width` - 1 fewer than there were."""
    return [median(numbers[start : start + width]) for start in range(len(numbers) - width + 1)]


def blocks(numbers: Sequence[float], count: int) -> list[float]:
    """The medians of `count` equal parts, in their order."""
    bounds = [round(part * len(numbers) / count) for part in range(count + 1)]
    return [median(numbers[start:end]) for start, end in itertools.pairwise(bounds) if end > start]


def noise(numbers: Sequence[float]) -> float:
    """The standard deviation of one line as a share of its level, any trend taken out (by second differences)."""
    logs = [math.log(max(number, 1e-8)) for number in numbers]
    bends = [abs(before - 2 * here + after) for before, here, after in zip(logs, logs[1:], logs[2:], strict=False)]
    return ROBUST * median(bends) / math.sqrt(6) if bends else math.inf


def of_median(spread: float, count: int) -> float:
    """The standard deviation of a median of `count` values that each have `spread`."""
    return 1.2533 * spread / math.sqrt(max(count, 1))


def zigzag(numbers: Sequence[float]) -> float:
    """How far a curve that goes to and fro goes each time; its lowest point, where it may turn for good, left out."""
    lowest, turns = numbers.index(min(numbers)), []
    for place in range(1, len(numbers) - 1):
        came, goes = numbers[place] - numbers[place - 1], numbers[place + 1] - numbers[place]
        if came * goes < 0 and place != lowest:
            turns.append(min(abs(came), abs(goes)))
    return median(turns) if turns else 0.0


def stretches(points: Points, holds: Callable[[float], bool]) -> list[Points]:
    """Neighbouring points of which each one's value `holds`."""
    groups = itertools.groupby(points, key=lambda point: holds(point[1]))
    return [list(group) for held, group in groups if held]


def episodes(steps: Sequence[int], apart: int) -> list[int]:
    """The first steps of what happened at `steps`, those that follow within `apart` steps counted as one."""
    ordered = sorted(set(steps))
    return ordered[:1] + [here for before, here in itertools.pairwise(ordered) if here - before > apart]
