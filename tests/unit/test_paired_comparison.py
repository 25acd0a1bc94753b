"""The paired test against known values, and what is said about a trained model that is worse (tools.paired_comparison)."""

from __future__ import annotations

import itertools
import random

import pytest

from sft_recipes.tools.evaluate import to_text
from sft_recipes.tools.paired_comparison import compare, paired_p_value, summarize


# R: binom.test(1, 9), binom.test(5, 20), binom.test(3, 6)
@pytest.mark.parametrize(
    ("gains", "losses", "expected"), [(1, 8, 0.0390625), (15, 5, 0.04138947), (3, 3, 1.0), (0, 0, 1.0), (0, 1, 1.0)]
)
def test_scores_of_zero_and_one_give_mcnemars_exact_p_value(gains, losses, expected):
    differences = [1] * gains + [-1] * losses + [0] * 50
    assert paired_p_value(differences) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("shift", [0.0, 0.4, 1.0])
def test_other_scores_give_the_p_value_of_all_sign_flips(shift):
    generator = random.Random(7)
    differences = [generator.gauss(shift, 1) for _ in range(12)]
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    exact = sum(total >= observed - 1e-9 for total in sums) / len(sums)
    assert paired_p_value(differences) == pytest.approx(exact, abs=0.015)


def harness(scores, *, metric="acc", value=None, direction=True, filter_name="none", task="quiz"):
    """Return results and samples as the harness writes them, for one task."""
    value = sum(scores) / len(scores) if value is None else value
    results = {
        "results": {
            task: {
                "alias": task,
                "sample_len": len(scores),
                f"{metric},{filter_name}": value,
                f"{metric}_stderr,{filter_name}": "N/A",
            }
        },
        "group_subtasks": {},
        "higher_is_better": {task: {metric: direction}},
        "n-samples": {task: {"original": 99, "effective": len(scores)}},
    }
    samples = [{"doc_id": item, "filter": filter_name, metric: score} for item, score in enumerate(scores)]
    return results, {task: samples}


def test_a_significantly_lower_accuracy_is_worse():
    (row,) = compare(harness([1.0] * 12 + [0.0] * 8), harness([0.0] * 12 + [0.0] * 8))
    assert row == {
        "task": "quiz",
        "metric": "acc",
        "higher_is_better": True,
        "base": 0.6,
        "base_stderr": None,
        "trained": 0.0,
        "trained_stderr": None,
        "difference": -0.6,
        "p_value": 2 / 2**12,
        "samples": 20,
        "worse": True,
    }
    assert summarize([row]) == (
        "The trained model is significantly WORSE than the base model on 1 of 1 tested metrics (paired test per item, "
        "p < 0.05): quiz acc -0.6."
    )


def test_a_difference_that_chance_explains_is_not_worse():
    (row,) = compare(harness([1.0, 1.0, 0.0, 0.0]), harness([0.0, 0.0, 0.0, 0.0]))
    assert row["difference"] == -0.5 and row["p_value"] == 0.5 and not row["worse"]
    assert summarize([row]).startswith("The trained model is not significantly worse than the base model on any of 1 ")


def test_a_significant_gain_is_not_worse():
    (row,) = compare(harness([False] * 10), harness([True] * 10))
    assert row["p_value"] < 0.01 and not row["worse"]


@pytest.mark.parametrize(("trained", "worse"), [(9.0, False), (30.0, True)])
def test_a_perplexity_is_worse_when_higher(trained, worse):
    """Its scores are pairs of log-likelihood and number of words."""
    options = {"metric": "word_perplexity", "direction": False}
    sign = -1 if worse else 1
    before = harness([[-20.0 - item, 10] for item in range(20)], value=15.0, **options)
    after = harness([[-20.0 - item + sign * (1 + item / 10), 10] for item in range(20)], value=trained, **options)
    (row,) = compare(before, after)
    assert row["p_value"] < 0.01 and row["worse"] is worse


def test_a_metric_without_scores_per_item_is_not_tested():
    pairs = [["a reference", "an answer"]] * 5
    (row,) = compare(harness(pairs, metric="bleu", value=30.0), harness(pairs, metric="bleu", value=3.0))
    assert row["p_value"] is None and not row["worse"] and row["samples"] == 5
    assert "not tested" in to_text({"rows": [row], "summary": summarize([row])}).splitlines()[1]


def test_each_filter_is_compared_with_its_own_scores():
    def both(strict, flexible):
        first, second = (
            harness(scores, metric="exact_match", filter_name=name)
            for scores, name in ((strict, "strict-match"), (flexible, "flexible-extract"))
        )
        first[0]["results"]["quiz"] |= second[0]["results"]["quiz"]
        return first[0], {"quiz": first[1]["quiz"] + second[1]["quiz"]}

    rows = compare(both([1] * 10, [1] * 10), both([0] * 10, [1] * 10))
    assert {row["metric"]: row["worse"] for row in rows} == {
        "exact_match,strict-match": True,
        "exact_match,flexible-extract": False,
    }


def test_a_group_is_tested_on_the_items_of_its_tasks():
    def group(first, second):
        parts = [harness(first, task="one"), harness(second, task="two")]
        results = parts[0][0]
        results["results"] |= parts[1][0]["results"] | {"both": {"acc,none": sum(first + second) / 8}}
        results["group_subtasks"] = {"both": ["one", "two"]}
        return results, parts[0][1] | parts[1][1]

    rows = {row["task"]: row for row in compare(group([1] * 4, [1] * 4), group([0] * 4, [0] * 4))}
    assert rows["one"]["p_value"] == 0.125 and not rows["one"]["worse"]
    assert rows["both"]["p_value"] == 2 / 2**8 and rows["both"]["samples"] == 8 and rows["both"]["worse"]
