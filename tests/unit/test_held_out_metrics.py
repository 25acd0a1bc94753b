import pytest

from sft_recipes.config.schema import Generation
from sft_recipes.data import held_out_metrics
from sft_recipes.runtime.errors import ConfigError

ASKED = [{"role": "user", "content": "?"}]
SCORED = [(ASKED, "42", " 42\n"), (ASKED, "42", "40"), (ASKED, "yes", "yes")]
FILE = """
from sft_recipes.data.held_out_metrics import metric

@metric(applies=lambda messages, reference: reference.isdigit())
def absolute_error(reference, completion):
    return abs(int(reference) - int(completion))
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(held_out_metrics, "REGISTRY", dict(held_out_metrics.REGISTRY))


def test_exact_match_ignores_white_space_at_both_ends():
    metrics = held_out_metrics.load(Generation())
    assert held_out_metrics.evaluate(metrics, SCORED) == {"exact_match": {"mean": 0.666667, "prompts": 3}}
    assert held_out_metrics.evaluate(metrics, []) == {}


def test_user_adds_a_metric_in_a_file_which_says_where_it_applies(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    section = Generation(metrics=["absolute_error", "exact_match"], metrics_file=str(tmp_path / "mine.py"))
    found = held_out_metrics.evaluate(held_out_metrics.load(section), SCORED)
    assert found["absolute_error"] == {"mean": 1.0, "prompts": 2} and found["exact_match"]["prompts"] == 3


@pytest.mark.parametrize(
    ("content", "metrics", "error"),
    [
        (None, ["exact_match"], "mine.py cannot be run (FileNotFoundError"),
        ("def f(:", ["exact_match"], "mine.py cannot be run (SyntaxError"),
        ("raise ImportError('no nltk')", ["exact_match"], "mine.py cannot be run (ImportError: no nltk)"),
        (
            FILE,
            ["exact_mach"],
            "found exact_mach, expected one of exact_match, absolute_error; did you mean exact_match?",
        ),
    ],
)
def test_bad_metrics_are_rejected_before_training(tmp_path, content, metrics, error):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError) as raised:
        held_out_metrics.load(Generation(metrics=metrics, metrics_file=str(tmp_path / "mine.py")))
    assert error in str(raised.value)


@pytest.mark.parametrize(
    ("result", "error"), [("1 / 0", "ZeroDivisionError"), ("float('nan')", "not finite"), ("None", "TypeError")]
)
def test_metric_that_fails_is_named(tmp_path, result, error):
    code = f"from sft_recipes.data.held_out_metrics import metric\n@metric()\ndef bad(reference, completion):\n    return {result}\n"
    (tmp_path / "mine.py").write_text(code)
    metrics = held_out_metrics.load(Generation(metrics=["bad"], metrics_file=str(tmp_path / "mine.py")))
    with pytest.raises(ConfigError, match=f"generation.metrics: bad: .*{error}"):
        held_out_metrics.evaluate(metrics, SCORED)
