"""The report page is self-contained, shows the measured metrics, and escapes all data (monitor.report)."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from helpers.planted_faults import FAULTS, from_scratch, memorizing, nan_loss, unchanged
from helpers.simulated_runs import Simulated

from sft_recipes.monitor.diagnose import diagnose
from sft_recipes.monitor.metrics_log import read
from sft_recipes.monitor.report import page

TITLES = [
    "Loss",
    "Gap between validation and training loss",
    "Learning rate",
    "Gradient norm",
    "Token accuracy",
    "Throughput",
    "Waiting for data",
    "Memory",
    "FLOPs utilization",
]
VOID_ELEMENTS = {"meta", "path", "use", "br", "img"}
IMAGE = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """Parse a page and its embedded plots: elements, attributes, text; every element must be closed in order."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.headings = [], [], [], [], []
        self.plots = {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)
        if tag == "img" and (source := dict(attributes)["src"]).startswith(IMAGE):
            plot = base64.b64decode(source.removeprefix(IMAGE)).decode()
            self.plots[dict(attributes)["alt"]] = plot
            inner = Page(plot[plot.index("<svg") :])
            self.tags += inner.tags
            self.texts += inner.texts

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in VOID_ELEMENTS:
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)
        if self.open and self.open[-1] == "h3":
            self.headings.append(text)

    @property
    def text(self):
        return " ".join(self.texts)


def render(run):
    return page(run, diagnose(run))


def test_page_plots_every_metric(tmp_path):
    shown = Page(render(Simulated("8b", retain=True).write(tmp_path)))
    assert [heading for heading in shown.headings if heading in TITLES] == TITLES
    assert list(shown.plots) == TITLES and shown.attributes.count(("class", "caption")) == len(TITLES)
    for label in ("training", "validation", "retention set", "planned", "logged", "supervised tokens", "HFU"):
        assert label in shown.texts


def test_page_omits_plots_without_data(tmp_path):
    shown = Page(render(from_scratch(Simulated("tiny", gpu=False)).write(tmp_path)))
    assert [heading for heading in shown.headings if heading in TITLES] == TITLES[:-1]
    assert "reserved" not in shown.texts


def test_page_loads_no_resources(tmp_path):
    shown = Page(render(memorizing(Simulated("8b")).write(tmp_path)))
    assert not {"script", "link", "iframe", "object", "image"} & set(shown.tags)
    references = [value for name, value in shown.attributes if name in ("href", "src")]
    assert references and all(value.startswith(IMAGE) for value in references)
    assert "http" not in " ".join(value for _, value in shown.attributes if value)
    for plot in shown.plots.values():
        references = re.findall(r'(?:href="|url\()([^")]+)', plot)
        assert references and all(reference.startswith("#") for reference in references)


def test_page_escapes_data(tmp_path):
    hostile = "<script>alert('1')</script>\x1b[2J\x00"
    run = nan_loss(
        Simulated("8b", samples=[{"step": 0, "prompt": hostile, "reference": hostile, "completion": hostile}])
    )
    run.manifest["diverged"]["rows"] = [f"{hostile}.jsonl:1"]
    source = render(run.write(tmp_path / "a&<b>"))
    shown = Page(source)
    assert "script" not in shown.tags and "b" in shown.tags
    assert shown.text.count("<script>alert('1')</script>\\x1b[2J\\x00") >= 4
    assert "\x1b" not in source and "\x00" not in source


def test_page_has_a_table_of_each_evaluation(tmp_path):
    run = Simulated("8b").write(tmp_path)
    assert not any(text.startswith("Evaluation") for text in Page(render(run)).texts)
    row = {"task": "quiz", "metric": "acc", "samples": 40, "base": 0.75, "base_stderr": 0.05, "trained": 0.5}
    row |= {"trained_stderr": None, "difference": -0.25, "p_value": 0.0041, "worse": True}
    untested = row | {"metric": "bleu", "p_value": None, "worse": False}
    comparison = {"tasks": ["quiz"], "rows": [row, untested], "limit": 40, "summary": "Worse on quiz."}
    comparison |= {"base": {"model": "some/<model>"}, "versions": {"lm_eval": "0.4"}, "backend": "hf", "date": "today"}
    run.folder.evaluation.mkdir()
    (run.folder.evaluation / "quiz.json").write_text(json.dumps(comparison))
    shown = Page(render(run))
    assert "Evaluation: quiz" in shown.texts and "Worse on quiz." in shown.texts
    for cell in ("base: some/<model>", "0.7500 ± 0.0500", "0.5000", "-0.2500 worse", "0.0041", "not tested"):
        assert cell in shown.texts
    assert ("class", "finding error") in shown.attributes and "Only the first 40 items" in shown.text


def test_page_names_the_paths_of_sources_with_settings(tmp_path):
    run = Simulated("8b").write(tmp_path)
    data = dataclasses.replace(run.plan.sections.data, train=[{"path": "a.jsonl", "weight": 2.0}, "b.jsonl"])
    run.plan = dataclasses.replace(run.plan, sections=dataclasses.replace(run.plan.sections, data=data))
    assert "a.jsonl, b.jsonl" in Page(render(run)).texts


def test_plots_escape_source_names(tmp_path):
    run = Simulated("8b").write(tmp_path)
    run.add(100, {"eval_<i>$5_$6_loss": 1.0})
    shown = Page(render(run))
    assert "validation: <i>$5_$6" in shown.texts and "i" not in shown.tags


def test_completions_are_grouped_by_prompt_and_step(tmp_path):
    samples = [
        {"step": step, "prompt": prompt, "reference": "42", "completion": f"{prompt} {step}"}
        for step in range(0, 1000, 50)
        for prompt in ("twelve and thirty", "six times seven")
    ]
    shown = Page(render(Simulated("8b", samples=samples).write(tmp_path))).text
    assert shown.count("Prompt") == 2
    for kept in ("six times seven 0", "six times seven 950", "twelve and thirty 900"):
        assert kept in shown
    assert "six times seven 400" not in shown


def test_page_lists_plan_origins_and_environment(tmp_path):
    shown = Page(render(Simulated("8b", overrides=("trainer.learning_rate=1.0e-5",)).write(tmp_path))).text
    assert "learning_rate 1e-05 command line" in shown
    assert "num_train_epochs 3 recipes/sizes.yaml, size class 7-13b" in shown
    assert "attempt 1: versions.torch 2.13.0" in shown and "NVIDIA H100 80GB HBM3" in shown


@pytest.mark.parametrize("fault", ["NaN loss", "tiny data for many epochs", "slow data loader"])
def test_diagnosis_precedes_plots(fault, tmp_path):
    run = FAULTS[fault][0](Simulated("8b")).write(tmp_path)
    (finding,) = diagnose(run)
    shown = Page(page(run, [finding])).text
    assert shown.index(finding.evidence[1:]) < shown.index(" Metrics ")
    assert "No issues found" not in shown


def test_page_of_healthy_run(tmp_path):
    run = unchanged(Simulated("8b")).write(tmp_path)
    shown = Page(render(run)).text
    assert "No issues found" in shown and "13 of 14 rules checked" in shown and "1,000" in shown


def test_page_of_run_with_one_log_line(tmp_path):
    run = Simulated("8b", state="running", until=0.001).write(tmp_path)
    assert len(run.points("loss")) == 1
    assert "Loss" in Page(render(run)).headings


def test_page_of_run_that_diverged_before_first_log_line(tmp_path):
    run = nan_loss(Simulated("8b")).write(tmp_path)
    run.folder.metrics.write_text("")
    run = read(run.folder)
    shown = Page(page(run, diagnose(run)))
    assert "svg" not in shown.tags and "he run was stopped" in shown.text


def test_page_of_many_log_lines_is_small_and_keeps_peaks(tmp_path):
    run = Simulated("8b", steps=20_000, lines=20_000, evaluations=1000)
    run.change("loss", lambda loss, share: 77.0 if share == 0.5 else loss)
    run = run.write(tmp_path)
    assert len(run.points("loss")) == 20_000
    source = render(run)
    assert len(source) < 1_000_000
    curve = max(re.findall(r'<path d="(M[^"]+)"', Page(source).plots["Loss"]), key=len)
    heights = sorted(float(height) for height in re.findall(r"[ML] [\d.]+ ([\d.]+)", curve))
    assert heights[0] < heights[1] - 50, "one peak, far above all other losses"
