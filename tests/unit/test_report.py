"""The page of a run stands alone, shows what there is, and lets nothing of the data through (monitor.report)."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from helpers.planted_faults import DISEASES, as_it_is, from_scratch, memorising, not_a_number
from helpers.simulated_runs import Simulated

from sft_recipes.monitor import plots
from sft_recipes.monitor.diagnose import diagnose
from sft_recipes.monitor.metrics_log import read
from sft_recipes.monitor.report import page

CURVES = [
    "Loss",
    "Gap between validation and training loss",
    "Learning rate",
    "Gradient norm",
    "Token accuracy",
    "Throughput",
    "Waiting for data",
    "Memory",
    "Use of the GPUs' arithmetic",
]
NEVER_CLOSED = {"meta", "path", "use", "br"}


class Page(HTMLParser):
    """What stands in a page: its elements, its text, and whether each element is closed where it should be."""

    def __init__(self, written: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.headings = [], [], [], [], []
        self.feed(written)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in NEVER_CLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in NEVER_CLOSED:
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)
        if self.open and self.open[-1] == "h3":
            self.headings.append(text)

    @property
    def text(self):
        return " ".join(self.texts)


def written(run):
    return page(run, diagnose(run))


def test_the_page_has_a_plot_of_everything_that_was_measured(tmp_path):
    shown = Page(written(Simulated("8b", retain=True).write(tmp_path)))
    assert [heading for heading in shown.headings if heading in CURVES] == CURVES
    assert shown.tags.count("svg") == shown.tags.count("figcaption") == len(CURVES)
    for label in ("training", "validation", "retained rows", "planned", "logged", "supervised tokens", "HFU"):
        assert label in shown.texts


def test_what_was_not_measured_has_no_plot(tmp_path):
    shown = Page(written(from_scratch(Simulated("tiny", gpu=False, ranks=False)).write(tmp_path)))
    assert [heading for heading in shown.headings if heading in CURVES] == CURVES[:-1]
    assert "reserved" not in shown.texts


def test_the_page_loads_nothing(tmp_path):
    shown = Page(written(memorising(Simulated("8b")).write(tmp_path)))
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(shown.tags)
    references = [
        value for name, value in shown.attributes if name.endswith(("href", "src")) or "url(" in (value or "")
    ]
    assert references and all(value.startswith("#") or re.search(r"url\(#", value) for value in references)
    assert "http" not in " ".join(value for _, value in shown.attributes if value)


def test_no_two_drawings_share_an_id_that_something_refers_to(tmp_path):
    shown = Page(written(Simulated("8b").write(tmp_path)))
    ids = [value for name, value in shown.attributes if name == "id"]
    used = {value.removeprefix("#") for name, value in shown.attributes if name == "href"}
    assert used and used <= set(ids)
    assert len(ids) == len(set(ids))


def test_data_is_text_and_never_markup(tmp_path):
    hostile = "<script>alert('1')</script>\x1b[2J\x00"
    run = not_a_number(
        Simulated("8b", samples=[{"step": 0, "prompt": hostile, "reference": hostile, "completion": hostile}])
    )
    run.manifest["diverged"]["rows"] = [f"{hostile}.jsonl:1"]
    made = written(run.write(tmp_path / "a&<b>"))
    shown = Page(made)
    assert "script" not in shown.tags and "b" in shown.tags
    assert shown.text.count("<script>alert('1')</script>\\x1b[2J\\x00") >= 4
    assert "\x1b" not in made and "\x00" not in made


def test_names_of_sources_are_text_in_the_drawings_too(tmp_path):
    run = Simulated("8b").write(tmp_path)
    for line in run.validation:
        line["eval_<i>$5_$6_loss"] = 1.0
    shown = Page(written(run))
    assert "validation: <i>$5_$6" in shown.texts and "i" not in shown.tags


def test_answers_are_shown_by_prompt_and_step(tmp_path):
    samples = [
        {"step": step, "prompt": prompt, "reference": "42", "completion": f"{prompt} {step}"}
        for step in range(0, 1000, 50)
        for prompt in ("twelve and thirty", "six times seven")
    ]
    shown = Page(written(Simulated("8b", samples=samples).write(tmp_path))).text
    assert shown.count("Prompt") == 2
    for kept in ("six times seven 0", "six times seven 950", "twelve and thirty 900"):
        assert kept in shown
    assert "six times seven 400" not in shown


def test_the_plan_says_where_each_value_came_from(tmp_path):
    shown = Page(written(Simulated("8b", overrides=("trainer.learning_rate=1.0e-5",)).write(tmp_path))).text
    assert "learning_rate 1e-05 command line" in shown
    assert "num_train_epochs 3 recipes/sizes.yaml, row 7-13b" in shown
    assert "start 1: versions.torch 2.13.0" in shown and "NVIDIA H100 80GB HBM3" in shown


@pytest.mark.parametrize("disease", ["a NaN row", "tiny data for many epochs", "a slow loader"])
def test_the_diagnosis_stands_before_the_curves(disease, tmp_path):
    run = DISEASES[disease][0](Simulated("8b")).write(tmp_path)
    (finding,) = diagnose(run)
    shown = Page(page(run, [finding])).text
    assert shown.index(finding.evidence[1:]) < shown.index("optimizer steps", shown.index("Curves"))
    assert "All quiet" not in shown


def test_a_healthy_run_is_said_to_be_quiet(tmp_path):
    run = as_it_is(Simulated("8b", ranks=False)).write(tmp_path)
    shown = Page(written(run)).text
    assert "All quiet" in shown and "10 of 12 signs could be looked for" in shown and "1,000" in shown


def test_a_run_with_a_single_line_has_a_page(tmp_path):
    run = Simulated("8b", state="running", until=0.001).write(tmp_path)
    assert len(run.training) == 1
    Page(written(run))


def test_a_run_that_diverged_before_its_first_line_has_a_page(tmp_path):
    run = not_a_number(Simulated("8b")).write(tmp_path)
    run.folder.metrics.write_text("")
    run = read(run.folder)
    shown = Page(page(run, diagnose(run)))
    assert "svg" not in shown.tags and "stopped itself" in shown.text


def test_a_hundred_thousand_lines_stay_a_small_page_and_keep_their_peaks(tmp_path):
    run = Simulated("8b", steps=100_000, lines=100_000, evaluations=1000)
    run.change("loss", lambda loss, share: 77.0 if share == 0.5 else loss)
    made = run.write(tmp_path)
    assert len(made.training) == 100_000
    assert len(written(made)) < 3_000_000
    kept = plots.thinned(made.points("loss"))
    assert len(kept) <= plots.MOST_POINTS and (50_000, 77.0) in kept
