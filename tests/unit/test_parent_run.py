"""INIT_FROM and OVERFIT: which runs a run may start from, and what the smoke test expects."""

import dataclasses

import pytest

from sft_recipes.config import loader
from sft_recipes.launch import run_selection
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, write_json
from sft_recipes.training import summary


def plan(*overrides, overfit=False):
    return plans.resolve(loader.load("tiny", overrides, overfit), plans.Topology(0, 1))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    folder = RunDir(tmp_path / "parent")
    for directory in (folder.path, folder.last, folder.final):
        directory.mkdir()
    plans.write(dataclasses.replace(plan(), run_id="p"), folder.plan)
    write_json(folder.manifest, {"state": "finished"})
    write_json(folder.last / "complete.json", {"run_id": "p", "step": 12})
    return folder


def test_init_from_records_the_parent(finished):
    child = run_selection.start_from(plan("trainer.num_train_epochs=5", "data.train=other.jsonl"), "parent")
    assert child.init_from == {"run": "parent", "run_id": "p", "step": 12}
    assert child.parent == finished
    assert "parent, its last step 12" in render.format_plan(child)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("model.chat_template=other.jinja",), "model.chat_template: found 'other.jinja', expected None"),
        (
            ("model.from_scratch=false", "model.name_or_path=other"),
            "model: found 'other', expected 'llama, built from scratch'",
        ),
        (("lora.r=4",), "method: found 'lora', expected 'full'"),
        (("model.architecture={model_type: llama, hidden_size: 64}",), "hidden_size: found 64, expected 128"),
    ],
)
def test_init_from_another_model_or_method_is_rejected(finished, overrides, key):
    with pytest.raises(UserError, match="INIT_FROM: parent has another model or method: ") as error:
        run_selection.start_from(plan(*overrides), "parent")
    assert key in str(error.value)


def test_init_from_a_run_without_last_weights_is_rejected(finished):
    with pytest.raises(UserError, match="INIT_FROM: no run 'missing' in .*expected one of: parent"):
        run_selection.start_from(plan(), "missing")
    write_json(finished.last / "complete.json", {"run_id": "another", "step": 12})
    with pytest.raises(
        UserError, match="INIT_FROM: parent: found state finished, expected a finished run with last/ and final/"
    ):
        run_selection.start_from(plan(), "parent")
    write_json(finished.manifest, {"state": "failed"})
    with pytest.raises(UserError, match="found state failed, expected .* Finish it with NAME=parent"):
        run_selection.start_from(plan(), "parent")


def test_overfit_settings_yield_to_the_command_line():
    chosen = plan("trainer.max_steps=7", overfit=True)
    assert chosen.sections.data.overfit_rows == 8 and chosen.sections.data.validation is None
    assert chosen.optimizer_steps == 7 and chosen.origins["data.overfit_rows"] == "OVERFIT=1"
    assert "first 8 rows, repeated each step; expects a loss below 0.1" in render.format_plan(chosen)
    assert plan(overfit=True).optimizer_steps == 200
    with pytest.raises(UserError, match="data.validation: found other.jsonl, expected none with OVERFIT"):
        plan("data.validation=other.jsonl", overfit=True)


def test_overfit_fails_if_the_loss_stays(tmp_path):
    results = {"last_eval_loss": 0.5, "steps": 200}
    line = summary.describe_overfit_failure(plan(overfit=True), RunDir(tmp_path), results)
    assert "overfit: found loss 0.5000 after 200 steps, expected below 0.1" in line and "max_steps=400" in line
    assert (
        summary.describe_overfit_failure(plan(overfit=True), RunDir(tmp_path), {**results, "last_eval_loss": 0.05})
        is None
    )
    assert summary.describe_overfit_failure(plan(), RunDir(tmp_path), results) is None
