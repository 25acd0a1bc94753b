"""Compare two models item by item, from the results and logged samples of the lm-evaluation-harness."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

SIGNIFICANT = 0.05
_RESAMPLES = 9_999
# Several numbers per item, whose sum differs between two models by what they differ in: log-likelihood and length; one
# truth value per instruction. Lists of other metrics (f1, bleu) are inputs of the aggregation, no scores.
_SUMMED = ("word_perplexity", "byte_perplexity", "bits_per_byte", "inst_level_strict_acc", "inst_level_loose_acc")

_Samples = dict[str, list[dict[str, Any]]]  # by task, one object per item and filter


def compare(base: tuple[dict[str, Any], _Samples], trained: tuple[dict[str, Any], _Samples]) -> list[dict[str, Any]]:
    """Return one row per task or group and metric; evaluate.py describes its keys.

    Args:
        base: results and samples of the harness for the base model.
        trained: those for the trained model, on the same items.
    """
    (before, base_samples), (after, trained_samples) = base, trained
    rows = []
    for task, values in after["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue  # "alias", "sample_len"
            reference, stderr = before["results"][task], f"{metric}_stderr,{filter_name}"
            which = task, after["group_subtasks"], metric, filter_name
            first, second = dict(_scores(base_samples, *which)), dict(_scores(trained_samples, *which))
            items = sorted(first.keys() & second.keys())
            p_value = paired_p_value([second[item] - first[item] for item in items]) if items else None
            higher_is_better = after["higher_is_better"].get(task, {}).get(metric) is not False
            difference, name = value - reference[key], metric if filter_name == "none" else key
            loss = -difference if higher_is_better else difference
            worse = p_value is not None and p_value < SIGNIFICANT and loss > 0
            row = {"task": task, "metric": name, "higher_is_better": higher_is_better, "base": reference[key]}
            row |= {"base_stderr": _stderr(reference.get(stderr)), "trained": value, "difference": difference}
            row |= {"trained_stderr": _stderr(values.get(stderr)), "p_value": p_value, "worse": worse}
            samples = len(items) or after["n-samples"].get(task, {}).get("effective")
            rows.append(row | {"samples": samples})
    return rows


def paired_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the hypothesis that each item's difference is as likely positive as negative.

    For scores of 0 and 1 this is McNemar's exact test (the binomial distribution of the items that differ), otherwise a
    sign-flip permutation test with a fixed seed (Fisher 1935; p is at least 1/10,000).

    Args:
        differences: score of the trained model minus that of the base model, for each item.
    """
    changed = torch.tensor([difference for difference in differences if difference], dtype=torch.float64)
    if (changed.abs() == 1).all():
        fewer = min(int((changed > 0).sum()), int((changed < 0).sum()))
        tail = sum(math.comb(len(changed), count) for count in range(fewer + 1))
        return min(1.0, 2 * tail / 2 ** len(changed))
    random = torch.Generator().manual_seed(0)
    observed = changed.sum().abs() * (1 - 1e-9)  # the same sum in another order may round lower
    flips = (torch.randint(2, changed.shape, generator=random).double() * 2 - 1 for _ in range(_RESAMPLES))
    return (1 + sum(int((flip @ changed).abs() >= observed) for flip in flips)) / (1 + _RESAMPLES)


def summarize(rows: Sequence[dict[str, Any]]) -> str:
    """Return one sentence: on which metrics the trained model is significantly worse."""
    tested = sum(row["p_value"] is not None for row in rows)
    worse = [f"{row['task']} {row['metric']} {row['difference']:+.4g}" for row in rows if row["worse"]]
    verdict, where = ("significantly WORSE", len(worse)) if worse else ("not significantly worse", "any")
    text = f"The trained model is {verdict} than the base model on {where} of {tested} tested metrics"
    return f"{text} (paired test per item, p < {SIGNIFICANT}){': ' if worse else ''}{', '.join(worse)}."


def _scores(
    samples: _Samples, task: str, groups: dict[str, list[str]], metric: str, filter_name: str
) -> Iterator[tuple[tuple[str, int], float]]:
    """Yield the score of each item of a task or of all tasks of a group; nothing where the metric has no scores."""
    for subtask in groups.get(task, []):
        yield from _scores(samples, subtask, groups, metric, filter_name)
    for sample in samples.get(task, []):
        value = sum(sample[metric]) if metric in _SUMMED else sample.get(metric)
        if sample["filter"] == filter_name and isinstance(value, (int, float)):
            yield (task, sample["doc_id"]), float(value)


def _stderr(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None  # "N/A"
