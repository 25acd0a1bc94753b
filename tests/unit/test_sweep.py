import math

import pytest

from sft_recipes.config import loader
from sft_recipes.runtime.errors import UserError
from sft_recipes.tools import sweep


def made(recipe="tiny", **changes):
    options = {"name": None, "rates": "1e-4,2e-3", "swept": None, "seeds": 2, "fraction": 0.25, "overrides": []}
    return sweep.make(loader.load(recipe), **{**options, **changes})


def test_default_learning_rates_span_the_range_of_the_size_class():
    assert made("8b", rates=None).values == ["1.0e-5", "2.2e-5", "5.0e-5"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"swept": "trainer.weight_decay=0.01,0.1"}, "found both"),
        ({"rates": None, "swept": "trainer.wieght_decay=0.01,0.1"}, "expected a recipe key"),
        ({"rates": "1e-4"}, "two or more different values"),
        ({"rates": "1e-4,1e-4"}, "two or more different values"),
    ],
)
def test_wrong_sweep_is_rejected(changes, error):
    with pytest.raises(UserError, match=error):
        made(**changes)


def test_runs_differ_in_value_and_seed_only():
    recipe, found = loader.load("tiny"), made(overrides=["trainer.max_length=128"])
    first, second = found.overrides_of(recipe, "1e-4", 0), found.overrides_of(recipe, "2e-3", 1)
    assert set(first) - set(second) == {"trainer.learning_rate=1e-4", "trainer.seed=42", "trainer.data_seed=42"}
    assert "trainer.max_length=128" in first and "trainer.num_train_epochs=0.25" in first
    loaded = loader.load("tiny", found.overrides_of(recipe, "1e-2", 0))
    assert loaded.trainer["learning_rate"] == 1e-2, "outside of the size class's range"
    assert found.run_name("1e-4", 1) == "tiny-sweep-learning_rate-1e-4-seed-2"


def test_winner_needs_a_difference_beyond_the_spread_over_seeds():
    clear = {"1e-4": [3.0, 3.1], "2e-3": [1.0, 1.1]}
    assert sweep.describe_winner(made(), clear).startswith("trainer.learning_rate=2e-3: eval_loss 1.0500, 2.0000 below")
    noisy = {"1e-4": [1.0, 1.6], "2e-3": [1.1, 1.2]}
    assert "no significant difference between 2e-3 and 1e-4" in sweep.describe_winner(made(), noisy)


def test_limit_of_the_difference_is_students():
    """Two values, two seeds: variances 0.02 and 0.08, pooled 0.05; t(2) = 4.303; sqrt(2 x 0.05 / 2) = 0.2236."""
    losses = {"a": [1.0, 1.2], "b": [2.0, 2.4]}
    assert "(significant: more than 0.9622)" in sweep.describe_winner(made(rates="a,b"), losses)


def test_diverged_runs_rank_last_and_one_seed_proves_nothing():
    losses = {"1e-4": [2.0, 2.1], "2e-3": [1.0, math.nan]}
    assert sweep.summarize(losses)[0][0] == "1e-4"
    assert "the others diverged" in sweep.describe_winner(made(), losses)
    assert "diverged" in sweep.report(made(), losses)
    assert sweep.describe_winner(made(), {"a": [math.nan] * 2, "b": [math.nan] * 2}) == "every value diverged"
    assert "SEEDS=2 measures it" in sweep.describe_winner(made(seeds=1), {"1e-4": [2.0], "2e-3": [1.0]})
