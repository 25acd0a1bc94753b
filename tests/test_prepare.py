"""Data is prepared once, kept by what it was made from, and what length costs is counted."""

import json

import pytest

from sft_recipes.data import prepare
from sft_recipes.planning import plan as plans
from sft_recipes.planning import recipes
from sft_recipes.planning.plan import Topology
from sft_recipes.planning.schema import RecipeError

ROWS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]


@pytest.fixture
def prepared(tmp_path, model_folder, write_rows):
    """Prepares rows with the small model's tokenizer."""

    def run(rows, *overrides, validation=None):
        words = [f"data.train={write_rows(rows)}", f"model.name_or_path={model_folder}", "model.from_scratch=false"]
        words.append(f"data.validation={write_rows(validation, 'held_out.jsonl') if validation else ''}")
        plan = plans.make(recipes.load("tiny", [*words, "trainer.max_length=128", *overrides]), Topology(0, 1))
        return prepare.prepare(plan, tmp_path / "store")

    return run


def details(found):
    from pathlib import Path

    return json.loads((Path(found.folder) / "details.json").read_text())


def test_the_same_data_is_found_again_and_other_data_is_not(prepared):
    first = prepared(ROWS)
    stamp = (prepare.Path(first.folder) / "prepared.json").stat().st_mtime_ns
    assert prepared(ROWS) == first
    assert (prepare.Path(first.folder) / "prepared.json").stat().st_mtime_ns == stamp
    others = [prepared(ROWS[1:]), prepared(ROWS, "trainer.max_length=64"), prepared(ROWS, "trainer.packing=false")]
    assert len({first.folder, *(other.folder for other in others)}) == 4
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_nothing_half_made_is_left_where_preparing_fails(prepared, tmp_path):
    with pytest.raises(RecipeError, match="rows.jsonl:2: a row with keys text"):
        prepared([ROWS[0], {"text": "x"}])
    assert not list((tmp_path / "store").glob("*partial*"))


def test_a_seeded_split_holds_out_whole_questions_and_loses_none(prepared):
    found = prepared([*ROWS, *ROWS], "data.validation_fraction=0.2", "trainer.packing=false")
    assert found.validation_rows == 24 and found.examples == 96
    again = prepared([*ROWS, *ROWS], "data.validation_fraction=0.2", "trainer.packing=false", "trainer.data_seed=7")
    assert (again.validation_rows, again.fingerprint == found.fingerprint) == (24, False)


def test_supervised_tokens_are_the_answers_and_their_ends(prepared, tokenizer):
    found = prepared(ROWS, validation=ROWS[:4])
    answers = tokenizer([row["completion"] for row in ROWS], add_special_tokens=False)["input_ids"]
    assert found.supervised_tokens == sum(len(ids) + 1 for ids in answers)
    assert found.examples == 60
    assert details(found)["end_of_turn_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_rows_that_lose_their_ends_or_all_their_answer_are_counted(prepared):
    long_answer = {"prompt": "Count.", "completion": "1 2 3 4 5 6 7 8 9 " * 20}
    long_question = {"prompt": "word " * 200, "completion": "4"}
    found = prepared([*ROWS, long_answer, long_question], validation=ROWS[:4])
    counts = details(found)["train"]
    assert (counts["examples"], counts["cut"], counts["dropped"]) == (61, 2, 1)


def test_more_dropped_rows_than_the_recipe_allows_are_refused(prepared):
    long_question = [{"prompt": f"{n} " + "word " * 200, "completion": "4"} for n in range(10)]
    with pytest.raises(RecipeError, match=r"leaves 10 of 70 rows without a token to learn from, more than .*=0.05"):
        prepared([*ROWS, *long_question], validation=ROWS[:4])
    assert prepared([*ROWS, *long_question], "data.dropped_at_most=0.5", validation=ROWS[:4]).examples == 60
