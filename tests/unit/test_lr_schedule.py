"""Learning rates in closed form equal those of transformers' schedulers; the table and the plot of them."""

import inspect
import json
import subprocess
import sys

import pytest
from helpers import svg
from helpers.workplace import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipes.config import loader
from sft_recipes.monitor import lr_plot
from sft_recipes.planner import lr_schedule
from sft_recipes.planner import plan as plans
from sft_recipes.planner.lr_schedule import SCHEDULES, Schedule
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError

NAMES = ("cosine", "linear", "constant_with_warmup")
# Options of each schedule: those that it needs, and others than its defaults.
OPTIONS = {
    "linear": [{}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "cosine": [{}, {"num_cycles": 1}, {"num_cycles": 3.7}],
    "cosine_with_min_lr": [{"min_lr": 1e-6}, {"min_lr_rate": 0.1}, {"min_lr_rate": 0, "num_cycles": 1.5}],
}
CASES = [(name, options) for name, cases in OPTIONS.items() for options in cases]


def plan_of(*overrides):
    return plans.resolve(loader.load("tiny", overrides), Topology(0, 1))


def stepped(schedule):
    """The rates of transformers' own scheduler, stepped through a run that trains nothing."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.peak)
    scheduler = get_scheduler(
        schedule.name, optimizer, schedule.warmup_steps, schedule.total_steps, dict(schedule.options)
    )
    rates = []
    for step in range(schedule.total_steps):
        if step:
            optimizer.step()
            scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


# --- in closed form ---------------------------------------------------------------------------------------------------


def test_every_schedule_is_one_of_transformers_with_its_options():
    from transformers import SchedulerType
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    assert OPTIONS.keys() == SCHEDULES.keys()
    for name in SCHEDULES:
        parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
        given_by_the_plan = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
        assert set(lr_schedule.option_names(name)) == parameters.keys() - given_by_the_plan


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    case=st.sampled_from(CASES),
    peak=st.one_of(st.sampled_from([2e-3, 5e-5, 2e-5, 1e-5]), st.floats(1e-6, 10.0)),
    steps=st.integers(1, 600).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total + 1))),
)
def test_rates_equal_those_of_stepped_schedulers(case, peak, steps):
    (name, options), (total_steps, warmup_steps) = case, steps
    schedule = Schedule(name, peak, warmup_steps, total_steps, options)
    assert schedule.rates() == stepped(schedule)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(
    ("total_steps", "warmup_steps"), [(1, 0), (1, 1), (2, 1), (7, 0), (7, 7), (40, 4), (40, 41), (2000, 150)]
)
def test_rates_equal_those_of_stepped_schedulers_at_the_edges(name, options, total_steps, warmup_steps):
    schedule = Schedule(name, 2e-5, warmup_steps, total_steps, options)
    assert schedule.rates() == stepped(schedule)


def test_cosine_rises_to_the_peak_and_falls_to_zero():
    schedule = Schedule("cosine", 2e-5, 100, 1000)
    rates = schedule.rates()
    assert (rates[0], rates[50], rates[100], rates[550]) == (0.0, 1e-5, 2e-5, pytest.approx(1e-5))
    assert 0 < rates[999] < 1e-10
    assert schedule.learning_rate(1000) == 0


def test_schedules_import_no_heavy_library():
    """A report, a diagnosis and the command `schedules` do not wait for torch."""
    code = (
        "import sys; from sft_recipes import cli; cli.main(['schedules', '8b', '--with', 'constant']);"
        "from sft_recipes.monitor import metrics_log;"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[1].split()[-1] == "constant" and lines[-1] == "[]"


# --- of a plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["cosine", "[1]"])
def test_options_that_are_no_mapping_are_rejected(text):
    with pytest.raises(UserError, match="trainer.lr_scheduler_kwargs: found .*, expected a valid dictionary"):
        plan_of(f"trainer.lr_scheduler_kwargs={text}")


def test_steps_are_those_of_the_plan_or_given_by_the_user():
    plan = plan_of()
    assert lr_schedule.steps_of(plan) == (plan.optimizer_steps, plan.warmup_steps)
    assert lr_schedule.steps_of(plan_of("data.train=mine.jsonl", "trainer.max_steps=100")) == (100, 10)
    with pytest.raises(UserError, match=r"tiny: .*\. Set data.examples=… data.mean_tokens=… for an estimate"):
        lr_schedule.steps_of(plan_of("data.train=mine.jsonl"))


def test_curves_begin_with_the_plans_schedule_and_pass_options_to_those_that_take_them():
    plan = plan_of("trainer.max_steps=40", 'trainer.lr_scheduler_kwargs={"num_cycles": 2}')
    curves = lr_schedule.curves(plan, ["constant", "cosine", "constant"])
    assert list(curves) == ["cosine", "linear", "constant_with_warmup", "constant"]
    assert curves["cosine"] == Schedule("cosine", 2e-3, 4, 40, {"num_cycles": 2}).rates()
    assert curves["cosine"] != Schedule("cosine", 2e-3, 4, 40).rates()
    assert curves["linear"] == Schedule("linear", 2e-3, 4, 40).rates()
    with pytest.raises(UserError, match="expected either min_lr or min_lr_rate"):
        lr_schedule.curves(plan, ["cosine_with_min_lr"])
    with pytest.raises(UserError, match="unknown schedule: found 'cosin', expected one of cosine, linear"):
        lr_schedule.curves(plan, ["cosin"])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("polynomial", {}, r"lr_scheduler_type: unknown schedule: found 'polynomial', expected one of cosine, linear"),
        ("reduce_lr_on_plateau", {}, "unknown schedule: found 'reduce_lr_on_plateau', expected one of cosine, linear"),
        ("cosin", {}, r"lr_scheduler_type: unknown schedule: found 'cosin', expected one of .*; did you mean cosine\?"),
        ("cosine", {"num_cycle": 1}, r"found 'num_cycle', expected num_cycles"),
        ("constant", {"num_cycles": 1}, "unknown option of constant: found 'num_cycles', expected none"),
        ("linear", {"last_epoch": 3}, "unknown option of linear: found 'last_epoch', expected none"),
        (
            "cosine_with_min_lr",
            {"min_lr": "1e-6x"},
            r"lr_scheduler_kwargs.min_lr: found '1e-6x', expected a valid number",
        ),
        ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, "expected either min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {}, "expected either min_lr or min_lr_rate"),
        ("cosine", {"num_cycles": [1]}, r"lr_scheduler_kwargs.num_cycles: found \[1\], expected a valid number"),
    ],
)
def test_wrong_schedule_or_option_is_rejected_with_the_plan(name, options, message):
    with pytest.raises(UserError, match=message) as raised:
        plan_of(
            f"trainer.lr_scheduler_type={name}",
            "allow_out_of_range=[lr_scheduler_type]",
            f"trainer.lr_scheduler_kwargs={json.dumps(options)}",
        )
    assert "\n" not in str(raised.value)


# --- table and plot ------------------------------------------------------------------------------------------------------------


def curves(total_steps, warmup_steps):
    return {name: Schedule(name, 2e-5, warmup_steps, total_steps).rates() for name in NAMES}


def test_table_has_the_steps_of_the_sft_guide_and_the_last_one():
    lines = lr_plot.table(curves(1000, 100), 100).splitlines()
    assert lines[0].split() == ["step", *NAMES]
    assert [line.split()[0] for line in lines[1:]] == ["0", "50", "100", "250", "500", "750", "999"]
    assert lines[2].split() == ["50", "1.00e-05", "1.00e-05", "1.00e-05"]
    assert lines[-1].split() == ["999", "6.09e-11", "2.22e-08", "2.00e-05"]


@pytest.mark.parametrize(
    ("total_steps", "warmup_steps", "steps"),
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
def test_table_lists_each_step_once(total_steps, warmup_steps, steps):
    lines = lr_plot.table(curves(total_steps, warmup_steps), warmup_steps).splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == steps


def test_plot_writes_png(tmp_path):
    from matplotlib import image

    lr_plot.plot(curves(300, 30), "8b", tmp_path / "rates.PNG")
    assert (tmp_path / "rates.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(str(tmp_path / "rates.PNG"))
    assert pixels.shape[0] >= 600 and pixels.shape[1] >= 1200
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (abs(255 * pixels[..., :3] - colour).max(axis=-1) < 1).any()


def test_plot_writes_svg_with_text_and_curves(tmp_path):
    lr_plot.plot(curves(13074, 1308), "8b", tmp_path / "rates.svg")
    texts = svg.texts(tmp_path / "rates.svg")
    for text in ("8b: learning rate over 13,074 optimizer steps", "optimizer step", "learning rate", *NAMES):
        assert text in texts
    lines = [points for kind, points in svg.shapes(tmp_path / "rates.svg") if kind == "line2d"]
    assert len(lines) == len(NAMES) and min(lines) >= 2, "a curve per schedule"


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(1, 0), (1, 1), (3, 7)])
def test_plot_of_the_shortest_run(tmp_path, total_steps, warmup_steps, recwarn):
    lr_plot.plot(curves(total_steps, warmup_steps), "tiny", tmp_path / "few.svg")
    assert f"over {total_steps:,} optimizer steps" in (tmp_path / "few.svg").read_text()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rates.jpg", r"--plot: found .*/rates.jpg, expected a .png or .svg file in an existing directory"),
        ("rates", r"--plot: found .*/rates, expected a .png or .svg file"),
        ("no/such/rates.png", r"--plot: found .*/no/such/rates.png, expected .* in an existing directory"),
    ],
)
def test_plot_refuses_other_file_kinds(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        lr_plot.check_path(tmp_path / name)
