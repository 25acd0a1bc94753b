"""Robust statistics of noisy series: smoothing, noise, blocks, by medians that one outlier cannot move."""

import itertools
import math
from collections.abc import Sequence
from statistics import median

ROBUST = 1.4826  # median deviations in a standard deviation of normal noise


def values(points: Sequence[tuple[int, float]]) -> list[float]:
    """The values without their steps."""
    return [value for _, value in points]


def smooth(numbers: Sequence[float], width: int) -> list[float]:
    """The moving median over `width` neighbors; `width` - 1 fewer values."""
    return [median(numbers[start : start + width]) for start in range(len(numbers) - width + 1)]


def blocks(numbers: Sequence[float], count: int) -> list[float]:
    """The medians of `count` equal parts, in order."""
    bounds = [round(part * len(numbers) / count) for part in range(count + 1)]
    return [median(numbers[start:end]) for start, end in itertools.pairwise(bounds) if end > start]


def noise(numbers: Sequence[float]) -> float:
    """The relative standard deviation of one value without any trend (by second differences)."""
    logs = [math.log(max(number, 1e-8)) for number in numbers]
    bends = [abs(before - 2 * middle + after) for before, middle, after in zip(logs, logs[1:], logs[2:], strict=False)]
    return ROBUST * median(bends) / math.sqrt(6) if bends else math.inf


def noise_of_median(numbers: Sequence[float], count: int) -> float:
    """The relative standard deviation of a median of `count` of the numbers."""
    return 1.2533 * noise(numbers) / math.sqrt(max(count, 1))


def zigzag(numbers: Sequence[float]) -> float:
    """The usual size of a turn in an alternating curve; its lowest point, where it may turn for good, is left out."""
    lowest, turns = numbers.index(min(numbers)), []
    for index in range(1, len(numbers) - 1):
        before, after = numbers[index] - numbers[index - 1], numbers[index + 1] - numbers[index]
        if before * after < 0 and index != lowest:
            turns.append(min(abs(before), abs(after)))
    return median(turns) if turns else 0.0
