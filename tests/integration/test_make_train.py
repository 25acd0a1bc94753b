"""The main job: `make train`, whole.

Looked at is the run that MAIN_JOB names, or one that `make train` has made of this very code; else one is made here.
"""

import json
import os
from pathlib import Path

import pytest
from helpers.workplace import REPOSITORY, Workplace, manifest

from sft_recipes.data.toy import toy_dataset
from sft_recipes.training.manifest import code


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    if os.environ.get("MAIN_JOB"):
        return Path(os.environ["MAIN_JOB"])
    return made_by_this_code() or Workplace(tmp_path_factory.mktemp("main")).trained("tiny")


def made_by_this_code():
    """The newest run that was asked for nothing but the recipe, in a working tree that is as it was then."""
    now = code()
    if now["dirty"] is not False:
        return None
    runs = sorted((REPOSITORY / "runs").glob("tiny-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for run in (path.parent for path in reversed(runs)):
        found, plan = manifest(run), json.loads((run / "plan.json").read_text())
        asked = "command line" in plan["origins"].values()
        if found["state"] == "finished" and not asked and all(one["code"] == now for one in found["starts"]):
            return run
    return None


def test_answers_to_held_out_prompts_rise_from_nothing_to_nine_in_ten(main_job):
    found = manifest(main_job)
    assert found["state"] == "finished"
    assert found["exact_match_before"] < 0.05
    assert found["exact_match_after"] >= 0.9


def test_every_kind_of_task_is_learned(main_job):
    answered = json.loads((main_job / "generations.json").read_text())["after"]
    assert len(answered["prompts"]) == 400
    right = {}
    for prompt, said in zip(answered["prompts"], answered["said"], strict=True):
        right.setdefault(task(prompt["messages"][-1]["content"]), []).append(said.strip() == prompt["answer"])
    assert len(right) == len(toy_dataset.TASKS) + 1
    assert {name: sum(hits) / len(hits) for name, hits in right.items() if sum(hits) < 0.7 * len(hits)} == {}


def task(question):
    phrasings = {name: kinds[0] for name, kinds in toy_dataset.TASKS.items()} | {"remember": toy_dataset.REMEMBER}
    return next(
        name for name, forms in phrasings.items() if any(question.startswith(form.split("{")[0]) for form in forms)
    )


def test_validation_loss_falls_to_the_best(main_job):
    found = manifest(main_job)
    assert found["best_eval_loss"] < found["first_eval_loss"] / 3
    assert found["dropped_rows_per_epoch"] < json.loads((main_job / "plan.json").read_text())["effective_batch_size"]


def test_no_held_out_prompt_stands_in_the_training_file():
    train, validation = (toy_dataset.rows(count, held_out) for count, held_out in ((12_000, False), (400, True)))
    asked = {turn["content"] for row in train for turn in row["messages"] if turn["role"] == "user"}
    assert [row for row in validation if row["messages"][-2]["content"] in asked] == []
    kinds = [len(row["messages"]) for row in train]
    assert sum(count > 3 for count in kinds) > 2_000, "too few conversations of several turns"
    assert any(row["messages"][0]["role"] == "system" for row in train)


def test_the_embedded_data_is_the_same_every_time(tmp_path):
    toy_dataset.write(tmp_path / "a")
    toy_dataset.write(tmp_path / "b")
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len((tmp_path / "a" / "train.jsonl").read_text().splitlines()) == toy_dataset.TRAIN_ROWS


@pytest.mark.skipif(not os.environ.get("GSM8K"), reason="GSM8K names no folder with gsm8k_train.jsonl (7,473 rows)")
def test_grade_school_maths_trains_whole_through_the_same_command(workplace):
    data = Path(os.environ["GSM8K"])
    run = workplace.trained(
        "tiny", f"data.train={data / 'gsm8k_train.jsonl'}", f"data.validation={data / 'gsm8k_validation.jsonl'}",
        "trainer.max_steps=120", "trainer.eval_steps=40", "trainer.save_steps=40",
    )  # fmt: skip
    details = json.loads((Path(json.loads((run / "prepared.json").read_text())["folder"]) / "details.json").read_text())
    assert details["train"]["examples"] == 7473 and details["train"]["dropped"] == 0
    assert manifest(run)["best_eval_loss"] < manifest(run)["first_eval_loss"]
    assert REPOSITORY not in run.parents
