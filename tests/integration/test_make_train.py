"""The complete `make train`: the run that MAIN_JOB names, an earlier one of the same commit, or a new one."""

import json
import os
from pathlib import Path

import pytest
from helpers.workplace import REPOSITORY, Workplace, manifest, metrics

from sft_recipes.data.toy import toy_dataset
from sft_recipes.training.manifest import read_code_version


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    if os.environ.get("MAIN_JOB"):
        return Path(os.environ["MAIN_JOB"])
    return find_run_of_this_commit() or Workplace(tmp_path_factory.mktemp("main")).trained("tiny")


def find_run_of_this_commit():
    """Return the latest finished run of the unchanged recipe at this commit, if the working tree is clean."""
    now = read_code_version()
    if now["dirty"] is not False:
        return None
    runs = sorted((REPOSITORY / "runs").glob("tiny-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for run in (path.parent for path in reversed(runs)):
        record, plan = manifest(run), json.loads((run / "plan.json").read_text())
        overridden = "command line" in plan["origins"].values()
        if record["state"] == "finished" and not overridden and all(start["code"] == now for start in record["starts"]):
            return run
    return None


def test_exact_match_rises_from_zero_to_nine_in_ten(main_job):
    record = manifest(main_job)
    assert record["state"] == "finished"
    found = record["held_out_metrics"]["exact_match"]
    assert found["before"] < 0.05 and found["after"] >= 0.9 and found["prompts"] > 300
    summary = metrics(main_job)[-1]
    assert (summary["final/exact_match_before"], summary["final/exact_match"]) == (found["before"], found["after"])


def test_every_task_is_learned(main_job):
    after = json.loads((main_job / "generations.json").read_text())["after"]
    assert len(after["prompts"]) == 400
    correct = {}
    for prompt, text in zip(after["prompts"], after["texts"], strict=True):
        correct.setdefault(task(prompt["messages"][-1]["content"]), []).append(text.strip() == prompt["answer"])
    assert len(correct) == len(toy_dataset.TASKS) + 1
    assert {name: sum(hits) / len(hits) for name, hits in correct.items() if sum(hits) < 0.7 * len(hits)} == {}


def task(question):
    phrasings = toy_dataset.TASKS | {"remember": toy_dataset.REMEMBER}
    return next(
        name for name, forms in phrasings.items() if any(question.startswith(form.split("{")[0]) for form in forms)
    )


def test_eval_loss_falls_to_a_third(main_job):
    record = manifest(main_job)
    assert record["best_eval_loss"] < record["first_eval_loss"] / 3
    assert record["dropped_rows_per_epoch"] < json.loads((main_job / "plan.json").read_text())["effective_batch_size"]


def test_no_held_out_prompt_is_in_the_training_file():
    train, validation = (toy_dataset.rows(count, held_out) for count, held_out in ((12_000, False), (400, True)))
    prompts = {turn["content"] for row in train for turn in row["messages"] if turn["role"] == "user"}
    assert [row for row in validation if row["messages"][-2]["content"] in prompts] == []
    turns = [len(row["messages"]) for row in train]
    assert sum(count > 3 for count in turns) > 2_000, "too few multi-turn conversations"
    assert any(row["messages"][0]["role"] == "system" for row in train)


def test_toy_dataset_is_reproducible(tmp_path):
    toy_dataset.write(tmp_path / "a")
    toy_dataset.write(tmp_path / "b")
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len((tmp_path / "a" / "train.jsonl").read_text().splitlines()) == toy_dataset.TRAIN_ROWS


@pytest.mark.skipif(not os.environ.get("GSM8K"), reason="GSM8K names no folder with gsm8k_train.jsonl (7,473 rows)")
def test_gsm8k_trains_with_the_same_command(workplace):
    data = Path(os.environ["GSM8K"])
    run = workplace.trained(
        "tiny", f"data.train={data / 'gsm8k_train.jsonl'}", f"data.validation={data / 'gsm8k_validation.jsonl'}",
        "trainer.max_steps=120", "trainer.eval_steps=40", "trainer.save_steps=40",
    )  # fmt: skip
    details = json.loads((Path(json.loads((run / "prepared.json").read_text())["folder"]) / "details.json").read_text())
    assert details["train"]["examples"] == 7473 and details["train"]["dropped"] == 0
    assert manifest(run)["best_eval_loss"] < manifest(run)["first_eval_loss"]
    assert REPOSITORY not in run.parents
