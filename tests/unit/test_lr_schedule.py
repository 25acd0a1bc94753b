"""The learning rate of any step is known beforehand, to the last digit, and shown as a table and as a drawing."""

import json
import subprocess
import sys

import pytest
from helpers.workplace import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipes.config import loader
from sft_recipes.monitor import lr_plot as shown
from sft_recipes.planner import lr_schedule
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError
from sft_recipes.training import lr_preview

NAMES = ("cosine", "linear", "constant_with_warmup", "constant")
NEEDED = {
    "cosine_with_min_lr": {"min_lr": 1e-6},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


def plan_of(*overrides):
    return plans.make(loader.load("tiny", overrides), Topology(0, 1))


def closed(name, peak, warmup_steps, total_steps, options):
    return [
        lr_schedule.learning_rate(name, peak, warmup_steps, total_steps, step, options) for step in range(total_steps)
    ]


# --- in closed form ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(NAMES),
    peak=st.one_of(st.sampled_from([2e-3, 5e-5, 2e-5, 1e-5]), st.floats(1e-12, 10.0)),
    steps=st.integers(1, 600).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total + 1))),
    cycles=st.one_of(st.none(), st.just(1), st.floats(0.0, 8.0)),
)
def test_the_closed_form_is_transformers_to_the_last_digit(name, peak, steps, cycles):
    total_steps, warmup_steps = steps
    options = {"num_cycles": cycles} if name == "cosine" and cycles is not None else {}
    found = closed(name, peak, warmup_steps, total_steps, options)
    assert found == lr_preview.rates(name, peak, warmup_steps, total_steps, options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 150, 5000])
@pytest.mark.parametrize("total_steps", [1, 2, 5000])
def test_it_is_so_for_the_shortest_runs_and_for_long_ones(name, warmup_steps, total_steps):
    found = closed(name, 2e-5, warmup_steps, total_steps, {})
    assert found == lr_preview.rates(name, 2e-5, warmup_steps, total_steps, {})


def test_the_first_step_the_peak_and_the_end_are_where_the_documents_have_them():
    rates = closed("cosine", 2e-5, 100, 1000, {})
    assert (rates[0], rates[50], rates[100], rates[550]) == (0.0, 1e-5, 2e-5, pytest.approx(1e-5))
    assert 0 < rates[999] < 1e-10
    assert lr_schedule.learning_rate("cosine", 2e-5, 100, 1000, 1000, {}) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("polynomial", {}),
        ("no_such", {}),
        ("cosine", {"min_lr": 0.0}),
        ("cosine", {"num_cycles": "0.5"}),
        ("linear", {"num_cycles": 0.5}),
        ("constant", {"last_epoch": 3}),
    ],
)
def test_what_the_closed_form_does_not_know_it_does_not_guess(name, options):
    assert lr_schedule.learning_rate(name, 1e-3, 2, 10, 5, options) is None


def test_the_office_answers_without_a_heavy_library():
    """A report, and diagnosing a run, must not wait for torch."""
    code = (
        "import sys; from sft_recipes.planner import lr_schedule; from sft_recipes.monitor import lr_plot;"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- of a plan --------------------------------------------------------------------------------------------------------


def test_options_are_read_as_the_trainer_reads_them(tmp_path):
    from trl import SFTConfig

    for text in ('{"num_cycles": 1.5}', ""):
        plan = plan_of(f"trainer.lr_scheduler_kwargs={text}")
        read = SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, lr_scheduler_kwargs=text or None
        ).lr_scheduler_kwargs
        assert lr_schedule.options_of(plan) == (read or {})
    with pytest.raises(
        UserError, match=r"command line: trainer.lr_scheduler_kwargs is 'cosine'; wanted JSON, as in \{"
    ):
        lr_schedule.options_of(plan_of("trainer.lr_scheduler_kwargs=cosine"))
    with pytest.raises(UserError, match=r"trainer.lr_scheduler_kwargs is '\[1\]'; wanted JSON"):
        lr_schedule.options_of(plan_of("trainer.lr_scheduler_kwargs=[1]"))


def test_the_steps_are_the_plans_or_those_that_the_user_said():
    plan = plan_of()
    assert lr_schedule.steps_of(plan) == (plan.optimizer_steps, plan.warmup_steps)
    assert lr_schedule.steps_of(plan_of("data.train=mine.jsonl", "trainer.max_steps=100")) == (100, 10)
    with pytest.raises(UserError, match="tiny: how many optimizer steps .* say data.examples=… data.mean_tokens=… "):
        lr_schedule.steps_of(plan_of("data.train=mine.jsonl"))


def test_a_plans_own_schedule_comes_first_and_options_go_where_they_are_taken():
    linear = ("trainer.lr_scheduler_type=linear", "allow_out_of_range=[lr_scheduler_type]", "trainer.max_steps=40")
    found = lr_preview.curves(
        plan_of(*linear, 'trainer.lr_scheduler_kwargs={"power": 2.0}'), ["polynomial", "cosine", "polynomial"]
    )
    assert list(found) == ["linear", "cosine", "constant_with_warmup", "polynomial"]
    assert found["polynomial"] == lr_preview.rates("polynomial", 2e-3, 4, 40, {"power": 2.0})
    assert found["polynomial"] != lr_preview.rates("polynomial", 2e-3, 4, 40, {})
    assert found["linear"] == closed("linear", 2e-3, 4, 40, {})
    with pytest.raises(UserError, match="linear does not take 'power'; it takes none"):
        lr_preview.curves(plan_of(*linear, 'trainer.lr_scheduler_kwargs={"power": 2.0}'))


# --- any schedule of transformers -------------------------------------------------------------------------------------


def kinds():
    from transformers import SchedulerType

    return [kind.value for kind in SchedulerType]


def test_every_schedule_of_transformers_has_rates_or_is_refused_because_it_follows_the_loss():
    refused = []
    for name in kinds():
        try:
            rates = lr_preview.rates(name, 1e-3, 2, 12, NEEDED.get(name, {}))
            assert len(rates) == 12 and max(rates) <= 1e-3 * 1.0001
        except UserError as error:
            assert "follows the loss, so its rates are known when the run is over; wanted one of linear" in str(error)
            refused.append(name)
    assert len(kinds()) >= 12 and refused == ["reduce_lr_on_plateau", "greedy"]


@pytest.mark.parametrize("name", NEEDED)
def test_an_option_that_is_missing_is_asked_for_in_words_that_then_do(name):
    with pytest.raises(UserError, match=f"trainer.lr_scheduler_kwargs: {name} needs ") as raised:
        lr_preview.rates(name, 2e-5, 2, 50, {})
    said = json.loads(str(raised.value).partition("kwargs={")[2].join(["{", ""]))
    assert len(lr_preview.rates(name, 2e-5, 2, 50, said)) == 50


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, r"trainer.lr_scheduler_type: no schedule 'cosin'; did you mean cosine\?; there are: linear, cosine"),
        ("cosine", {"num_cycle": 1}, r"cosine does not take 'num_cycle'; did you mean num_cycles\?; it takes num_cycles"),
        ("constant", {"num_cycles": 1}, "constant does not take 'num_cycles'; it takes none"),
        ("linear", {"last_epoch": 3}, "linear does not take 'last_epoch'; it takes none"),
        ("cosine_with_min_lr", {"min_lr": "1e-6"}, "min_lr is the text '1e-6'; wanted a number, which YAML"),
        ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, r"does not work with .* \(Only one of min_lr or"),
        ("polynomial", {"lr_end": 1.0}, r"does not work with .* \(lr_end \(1.0\) must be smaller than initial lr"),
        ("cosine", {"num_cycles": [1]}, "does not work with"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "x"}, "does not work with .*Unknown decay type: x"),
    ],
)  # fmt: skip
def test_what_transformers_would_stumble_over_is_refused_in_one_line(name, options, message):
    with pytest.raises(UserError, match=message) as raised:
        lr_preview.rates(name, 1e-3, 2, 10, options)
    assert "\n" not in str(raised.value)


# --- shown ------------------------------------------------------------------------------------------------------------


def curves(total_steps, warmup_steps):
    return {name: closed(name, 2e-5, warmup_steps, total_steps, {}) for name in NAMES[:3]}


def test_the_table_has_the_documents_steps_and_the_runs_own_last_one():
    lines = shown.table(curves(1000, 100), 100).splitlines()
    assert lines[0].split("  ")[0] == "steps taken" and lines[0].split()[2:] == list(NAMES[:3])
    assert [line.split()[0] for line in lines[1:]] == ["0", "50", "100", "250", "500", "750", "999"]
    assert lines[2].split() == ["50", "1.00e-05", "1.00e-05", "1.00e-05"]
    assert lines[-1].split() == ["999", "6.09e-11", "2.22e-08", "2.00e-05"]


@pytest.mark.parametrize(
    ("total_steps", "warmup_steps", "told"),
    [
        (1, 0, [0]),
        (1, 1, [0]),
        (2, 0, [0, 1]),
        (5, 1, [0, 1, 2, 3, 4]),
        (8, 20, [0, 2, 4, 6, 7]),
        (40, 0, [0, 10, 20, 30, 39]),
        (40, 10, [0, 5, 10, 20, 30, 39]),
    ],
)
def test_few_steps_are_told_once_each(total_steps, warmup_steps, told):
    lines = shown.table(curves(total_steps, warmup_steps), warmup_steps).splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == told


def test_a_png_is_drawn(tmp_path):
    from matplotlib import image

    shown.plot(curves(300, 30), 30, 2e-5, "8b", tmp_path / "rates.PNG")
    assert (tmp_path / "rates.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(str(tmp_path / "rates.PNG"))
    assert pixels.shape[0] >= 600 and pixels.shape[1] >= 1200
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (abs(255 * pixels[..., :3] - colour).max(axis=-1) < 1).any()


def test_an_svg_says_in_text_what_it_shows_and_is_the_same_each_time(tmp_path):
    for name in ("one.svg", "two.svg"):
        shown.plot(curves(13074, 1308), 1308, 2e-5, "8b", tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    for text in (
        "8b: learning rate over 13,074 optimizer steps, peak 2e-05",
        "optimizer steps taken",
        "learning rate",
        "warm-up: 1,308",
        *NAMES[:3],
    ):
        assert f">{text}</text>" in drawn, text
    assert drawn == (tmp_path / "two.svg").read_text()


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(1, 0), (1, 1), (3, 7)])
def test_the_shortest_run_is_drawn_too(tmp_path, total_steps, warmup_steps, recwarn):
    shown.plot(curves(total_steps, warmup_steps), warmup_steps, 2e-5, "tiny", tmp_path / "few.svg")
    assert f"over {total_steps:,} optimizer steps" in (tmp_path / "few.svg").read_text()
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rates.jpg", r"--plot: .*rates.jpg is a .jpg file; wanted .png or .svg"),
        ("rates", r"--plot: .*rates is a nameless file; wanted .png or .svg"),
        ("no/such/rates.png", r"--plot: there is no folder .*no/such to write rates.png to"),
    ],
)
def test_another_kind_of_file_is_refused_and_nothing_is_written(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        shown.plot(curves(5, 1), 1, 2e-5, "tiny", tmp_path / name)
    assert list(tmp_path.iterdir()) == []
