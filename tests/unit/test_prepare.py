"""Data is prepared once, kept by what it was made from, and what length costs is counted."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest

from sft_recipes.config import loader
from sft_recipes.data import prepare
from sft_recipes.data.toy.toy_model import CHAT_TEMPLATE
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError

ROWS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]
HELD_OUT = [{"prompt": f"How much is {n} less {n}?", "completion": "Nothing."} for n in range(4)]


@pytest.fixture
def prepared(tmp_path, model_folder, write_rows):
    """Prepares rows with the small model's tokenizer."""

    def run(rows, *overrides, validation=None):
        words = [f"data.train={write_rows(rows)}", f"model.name_or_path={model_folder}", "model.from_scratch=false"]
        words.append(f"data.validation={write_rows(validation, 'held_out.jsonl') if validation else ''}")
        plan = plans.make(loader.load("tiny", [*words, "trainer.max_length=128", *overrides]), Topology(0, 1))
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


def test_rows_that_are_found_cost_no_heavy_import(tmp_path, write_rows, monkeypatch):
    """Seconds of every start but the first."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    words = [f"data.train={write_rows(ROWS)}", "trainer.max_length=128"]
    (tmp_path / "plan.json").write_text(json.dumps(asdict(plans.make(loader.load("tiny", words), Topology(0, 1)))))
    script = "import sys; from sft_recipes.data import prepare; assert not prepare.main(sys.argv[1])"
    script += "; print('torch' in sys.modules, 'transformers' in sys.modules)"
    command = [sys.executable, "-c", script, str(tmp_path / "plan.json")]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [one.splitlines()[-1] for one in said] == ["True True", "False False"]


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [flipped, lambda file: file.write_bytes(file.read_bytes()[:-100]), lambda file: file.unlink()]
)
@pytest.mark.parametrize(
    "name", ["train/data-*.arrow", "validation/data-*.arrow", "details.json", "prompts.jsonl", "checksums.json"]
)
def test_rows_that_were_damaged_since_are_prepared_again_aloud(prepared, capsys, name, harm):
    first = prepared(ROWS)
    folder = prepare.Path(first.folder)
    (file,) = folder.glob(name)
    before = file.read_bytes()
    harm(file)
    assert prepared(ROWS) == first
    if name.endswith(("arrow", "prompts.jsonl")):  # details hold how long it took
        assert file.read_bytes() == before
    blamed = f"{folder}/.*" if name == "checksums.json" else file  # whose checksum was harmed, or the list itself
    assert re.fullmatch(f"data: {blamed} is not as it was written; it is prepared again\n", capsys.readouterr().err)
    prepared(ROWS)
    assert capsys.readouterr().err == ""


def test_nothing_half_made_is_left_where_preparing_fails(prepared, tmp_path):
    with pytest.raises(UserError, match="rows.jsonl:2: a row with keys text"):
        prepared([ROWS[0], {"text": "x"}])
    assert not list((tmp_path / "store").glob("*partial*"))


def test_a_seeded_split_holds_out_whole_questions_and_loses_none(prepared):
    found = prepared([*ROWS, *ROWS], "data.validation_fraction=0.2", "trainer.packing=false")
    assert found.validation_rows == 24 and found.examples == 96
    again = prepared([*ROWS, *ROWS], "data.validation_fraction=0.2", "trainer.packing=false", "trainer.data_seed=7")
    assert (again.validation_rows, again.fingerprint == found.fingerprint) == (24, False)


def test_supervised_tokens_are_the_answers_and_their_ends(prepared, tokenizer):
    found = prepared(ROWS, validation=HELD_OUT)
    answers = tokenizer([row["completion"] for row in ROWS], add_special_tokens=False)["input_ids"]
    assert found.supervised_tokens == sum(
        len(ids) + 2 for ids in answers
    )  # <|im_end|>, and the line feed that the template writes behind it
    assert found.examples == 60
    assert details(found)["end_of_turn_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_rows_that_lose_their_ends_or_all_their_answer_are_counted(prepared):
    long_answer = {"prompt": "Count.", "completion": "1 2 3 4 5 6 7 8 9 " * 20}
    long_question = {"prompt": "word " * 200, "completion": "4"}
    found = prepared([*ROWS, long_answer, long_question], validation=HELD_OUT)
    counts = details(found)["train"]
    assert (counts["examples"], counts["cut"], counts["dropped"]) == (61, 2, 1)
    whole = details(found)["sources"]["train"][0]["percentiles"]["100"]
    assert counts["lost_tokens"] > whole - 128 > 0 and counts["lost_supervised_tokens"] > 0


def test_more_dropped_rows_than_the_recipe_allows_are_refused(prepared):
    long_question = [{"prompt": f"{n} " + "word " * 200, "completion": "4"} for n in range(10)]
    with pytest.raises(UserError, match=r"leaves 10 of 70 rows without a token .*rows.jsonl:61\), more than .*=0.05"):
        prepared([*ROWS, *long_question], validation=HELD_OUT)
    assert prepared([*ROWS, *long_question], "data.max_dropped_fraction=0.5", validation=HELD_OUT).examples == 60


def test_a_validation_row_that_stands_in_training_is_refused_with_both_places(prepared):
    leaked = [{**ROWS[7], "prompt": ROWS[7]["prompt"].replace(" ", "\n ")}]
    with pytest.raises(
        UserError, match=r"held_out.jsonl:5: this validation row .*rows.jsonl:8\), and so do 0 others of 5"
    ):
        prepared(ROWS, validation=[*HELD_OUT, *leaked])
    tolerated = prepared(ROWS, "data.max_overlap=0.2", validation=[*HELD_OUT, *leaked])
    assert details(tolerated)["leaks"]["rows"] == 1


def test_several_sources_are_one_run_and_each_is_validated_on_its_own(prepared, write_rows):
    other = [{"question": f"Which letter is number {n}?", "answer": chr(97 + n)} for n in range(20)]
    both = f"data.train=[{write_rows(ROWS, 'sums.jsonl')}, {write_rows(other, 'letters.jsonl')}]"
    found = prepared(ROWS, both, "data.validation_fraction=0.1", "trainer.packing=false")
    counted = details(found)["sources"]
    assert [(one["name"], one["examples"]) for one in counted["train"]] == [("sums", 54), ("letters", 18)]
    assert details(found)["validation_rows"] == {"sums": 6, "letters": 2} and found.examples == 72
    with pytest.raises(UserError, match="data.train: .*sums.jsonl is named twice"):
        prepared(ROWS, both.replace("letters", "sums"))
    with pytest.raises(UserError, match=r"command line: data.train is \[\]; wanted names"):
        prepared(ROWS, "data.train=[]")


def test_duplicates_are_counted_and_rows_know_their_places(prepared):
    from datasets import load_from_disk

    found = prepared([*ROWS, ROWS[0]], validation=HELD_OUT)
    assert details(found)["train"]["duplicates"] == 1
    rows = load_from_disk(f"{found.folder}/train")
    places = [place for row in rows for place in row["source"]]
    assert sorted(int(place.rpartition(":")[2]) for place in places) == list(range(1, 62))
    assert [len(row["source"]) for row in rows] == [len(row["seq_lengths"]) for row in rows]


def test_many_rows_are_prepared_by_several_processes_and_are_the_same(prepared, monkeypatch):
    from sft_recipes.data import tokenize_rows

    alone = prepared(ROWS, validation=HELD_OUT)
    monkeypatch.setattr(tokenize_rows, "_ROWS_A_CHUNK", 7)
    monkeypatch.setattr(prepare, "_key", lambda *_: "again")
    together = prepared(ROWS, validation=HELD_OUT)
    assert together.folder != alone.folder and together.fingerprint == alone.fingerprint


def test_the_first_bad_row_is_named_whichever_process_meets_it(prepared, monkeypatch):
    from sft_recipes.data import tokenize_rows

    monkeypatch.setattr(tokenize_rows, "_ROWS_A_CHUNK", 5)
    with pytest.raises(UserError, match=r"rows.jsonl:34: turn 2, the assistant's, is empty"):
        prepared([*ROWS[:33], {"prompt": "a", "completion": " "}, *ROWS[33:50], {"prompt": "b"}], validation=HELD_OUT)


def test_a_base_model_learns_the_marks_of_a_template_that_are_new_to_it(prepared, tmp_path, model_folder, tokenizer):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|mine|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* no special token, so the model would never learn to stop"):
        prepared(ROWS, f"model.chat_template={template}", validation=HELD_OUT)
    free = [f"<|free {n}|>" for n in range(320 - len(tokenizer))]  # the model has embeddings for tokens to come
    marks = f"model.add_tokens={[*free, '<|user|>', '<|assistant|>', '<|mine|>']}"
    found = prepared(ROWS, f"model.chat_template={template}", marks, validation=HELD_OUT)
    assert details(found)["end_of_turn"] == ["<|mine|>"]
    (note,) = found.notes
    assert (
        note.replace(", ".join(free) + ", ", "")
        == "new tokens <|user|>, <|assistant|>, <|mine|>: the model's embeddings grow from 320 rows"
    )
    assert details(found)["largest_token_id"] == 322 and details(found)["largest_known_token_id"] < 320

    from transformers import AutoModelForCausalLM

    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import vocabulary

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    plan = plans.make(loader.load("tiny", [marks]), Topology(0, 1))
    grown = load_tokenizer(str(model_folder), str(template), False, plan.sections.model.add_tokens)
    vocabulary.fit(plan, model, grown, details(found))
    assert model.get_input_embeddings().num_embeddings == 384 == model.config.vocab_size
    assert 322 in vocabulary.stop_by_itself(model, grown, details(found))
    with pytest.raises(UserError, match="token ids up to 500 .* embeddings for 384; take the tokenizer of this"):
        vocabulary.fit(plan, model, grown, {"largest_token_id": 500, "largest_known_token_id": 500})


def test_new_tokens_are_refused_where_embeddings_are_not_trained():
    with pytest.raises(UserError, match="model.add_tokens gives the model new embeddings, which LoRA does not train"):
        loader.load("8b-lora", ["model.add_tokens=['<|mine|>']"])


def test_a_cut_that_takes_an_answer_takes_its_question_and_is_counted(prepared):
    turns = [("user", "Say a."), ("assistant", "a"), ("user", "word " * 12), ("assistant", "word " * 60)]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = prepared([*ROWS, row], "trainer.max_length=64", "trainer.packing=false", validation=HELD_OUT)
    counts = details(found)["train"]
    assert (counts["cut"], counts["unanswered"], counts["dropped"]) == (1, 1, 0)
    from datasets import load_from_disk

    (kept,) = [row for row in load_from_disk(f"{found.folder}/train") if row["source"].endswith(":61")]
    assert kept["labels"][-1] != -100, "the question went with its answer"


def test_rows_can_be_looked_at_where_the_models_weights_are_not(prepared, tmp_path, model_folder, write_rows):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    words = [
        f"data.train={write_rows(ROWS)}",
        "data.validation=",
        "model.from_scratch=false",
        f"model.name_or_path={bare}",
    ]
    plan = plans.make(loader.load("tiny", [*words, "trainer.max_length=128"]), Topology(0, 1))
    assert prepare.prepare(plan, tmp_path / "store", rows_alone=True).examples == 57
    with pytest.raises(UserError, match="bare has no weights"):
        prepare.prepare(plan, tmp_path / "store")


def test_a_template_that_writes_the_date_is_prepared_for_the_plans_day_whenever_that_is(
    tmp_path, model_folder, write_rows
):
    import dataclasses

    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE)
    words = [f"data.train={write_rows(ROWS)}", "data.validation=", f"model.name_or_path={model_folder}"]
    words += ["model.from_scratch=false", "trainer.max_length=128", f"model.chat_template={template}"]
    plan = plans.make(loader.load("tiny", words), Topology(0, 1))
    first, again, tomorrow = (
        prepare.prepare(dataclasses.replace(plan, created=f"2026-11-{day}T23:59:59+00:00"), tmp_path / store)
        for day, store in ((21, "a"), (21, "b"), (22, "a"))
    )
    assert first.fingerprint == again.fingerprint != tomorrow.fingerprint
    assert first.folder != tomorrow.folder


def test_what_the_contract_refuses_is_refused_also_where_the_rows_are_found_again(prepared):
    leaked = [*HELD_OUT, ROWS[0]]
    for _ in range(2):
        with pytest.raises(UserError, match="stands in training too"):
            prepared(ROWS, validation=leaked)
    assert prepared(ROWS, "data.max_overlap=0.2", validation=leaked).examples == 60


def test_counts_are_of_the_rows_that_they_stand_beside(prepared):
    marked = [{"prompt": f"{n} <|im_end|>", "completion": "x"} for n in range(40)]
    found = prepared(marked, "data.validation_fraction=0.25", "batch.min_optimizer_steps=1")
    assert [details(found)[part]["markers_as_text"] for part in ("train", "validation")] == [30, 10]


def test_another_template_beside_the_first_is_another_preparation(prepared, model_folder, tmp_path):
    import shutil

    folder = shutil.copytree(model_folder, tmp_path / "named")
    named = folder / "additional_chat_templates"
    named.mkdir()
    first, second = (
        (named / "tool_use.jinja").write_text(text)
        and prepared(ROWS, f"model.name_or_path={folder}", validation=HELD_OUT)
        for text in ("{{ 1 }}", "{{ strftime_now('%d') }}")
    )
    assert first.folder != second.folder and first.fingerprint == second.fingerprint


def test_a_method_that_trains_no_embeddings_refuses_new_tokens_whoever_prepared_before(
    tmp_path, model_folder, write_rows
):
    """A tokenizer without a token that is free for padding gets one; adapters would leave it to nobody."""
    import shutil

    folder = shutil.copytree(model_folder, tmp_path / "full")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = json.dumps({**config, "pad_token": "<|im_end|>"}).replace("<|endoftext|>", "<|entoftext|>")
    (folder / "tokenizer_config.json").write_text(config)
    text = (
        (folder / "tokenizer.json").read_text().replace("<|pad|>", "<|pat|>").replace("<|endoftext|>", "<|entoftext|>")
    )
    (folder / "tokenizer.json").write_text(text)
    model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**model, "vocab_size": len(json.loads(text)["model"]["vocab"])}))
    words = [
        f"data.train={write_rows(ROWS)}",
        "data.validation=",
        "model.from_scratch=false",
        f"model.name_or_path={folder}",
    ]
    for extra in ([], ["lora.r=2"]):
        plan = plans.make(loader.load("tiny", [*words, *extra, "trainer.max_length=128"]), Topology(0, 1))
        if not extra:
            assert "new tokens <|pad|>" in prepare.prepare(plan, tmp_path / "store").notes[0]
            continue
        with pytest.raises(UserError, match=r"<\|pad\|> is new to the model, and lora trains no embeddings"):
            prepare.prepare(plan, tmp_path / "store")


# --- rows to retain ---------------------------------------------------------------------------------------------------

KNOWN = [{"prompt": f"What is the capital of country {n}?", "completion": f"City {n}."} for n in range(30)]


def test_rows_to_retain_are_prepared_as_validation_rows_are(prepared, write_rows, tokenizer):
    from datasets import load_from_disk

    file = write_rows([*KNOWN, ROWS[0]], "known.jsonl")  # a row that stands in training too is no leak
    found = prepared(ROWS, f"data.retention_eval={file}", "trainer.packing=false", validation=HELD_OUT)
    counted = details(found)
    rows = load_from_disk(f"{found.folder}/retain")
    assert counted["retain_rows"] == len(rows) == 31
    assert [counted["retention_eval"][key] for key in ("name", "read", "examples", "dropped")] == ["known", 31, 31, 0]
    assert rows["source"][:] == [f"{file}:{number}" for number in range(1, 32)]
    learned = [id for id in rows[3]["labels"] if id != -100]
    assert tokenizer.decode(learned) == "City 3.<|im_end|>\n"
    assert counted["retention_eval"]["supervised_tokens"] == sum(id != -100 for row in rows for id in row["labels"])
    assert rows.column_names == load_from_disk(f"{found.folder}/validation").column_names
    packed = prepared(ROWS, f"data.retention_eval={file}", validation=HELD_OUT)
    assert sum(map(len, load_from_disk(f"{packed.folder}/retain")["source"])) == 31 > details(packed)["retain_rows"]


def test_where_nothing_is_to_be_retained_nothing_is_another(prepared, write_rows, monkeypatch):
    keys = []
    key_of = prepare._key
    monkeypatch.setattr(prepare, "_key", lambda *given: keys.append(given) or key_of(*given))
    without = prepared(ROWS, validation=HELD_OUT)
    assert list(keys[0][1]) == ["train", "validation"]
    assert not {"retention_eval", "retain_rows"} & details(without).keys()
    assert not (prepare.Path(without.folder) / "retention_eval").exists()
    known = prepared(ROWS, f"data.retention_eval={write_rows(KNOWN, 'known.jsonl')}", validation=HELD_OUT)
    fewer = prepared(ROWS, f"data.retention_eval={write_rows(KNOWN[1:], 'known.jsonl')}", validation=HELD_OUT)
    assert len({one.folder for one in (without, known, fewer)}) == 3
    assert len({one.fingerprint for one in (without, known, fewer)}) == 3
    same = ("examples", "rows", "supervised_tokens", "tokens", "validation_rows", "notes")
    assert all(getattr(without, name) == getattr(known, name) for name in same)
    assert details(known)["train"] == details(without)["train"]
    assert prepared(ROWS, "data.retention_eval=", validation=HELD_OUT) == without


def test_no_more_rows_to_retain_are_taken_than_are_evaluated_and_the_choice_is_seeded(prepared, write_rows):
    from datasets import load_from_disk

    words = (
        f"data.retention_eval={write_rows(KNOWN, 'known.jsonl')}",
        "trainer.packing=false",
        "data.max_eval_samples=7",
    )
    found = prepared(ROWS, *words)
    places = [load_from_disk(f"{one.folder}/retain")["source"][:] for one in (
        found, prepared(ROWS, *words, "trainer.max_length=120"), prepared(ROWS, *words, "trainer.data_seed=7"),
    )]  # fmt: skip
    assert details(found)["retain_rows"] == len(places[0]) == 7
    assert places[0] == places[1] != places[2]


def test_rows_to_retain_of_which_nothing_is_left_are_refused_in_one_line_and_can_still_be_looked_at(
    prepared, write_rows, tmp_path, model_folder
):
    long_questions = [{"prompt": f"{n} " + "word " * 200, "completion": "4"} for n in range(3)]
    words = f"data.retention_eval={write_rows(long_questions, 'known.jsonl')}"
    for _ in range(2):
        with pytest.raises(
            UserError, match="^data.retention_eval: trainer.max_length=128 leaves none of 3 rows with a token"
        ):
            prepared(ROWS, words, validation=HELD_OUT)
    some = prepared(
        ROWS, f"data.retention_eval={write_rows([*long_questions, *KNOWN], 'known.jsonl')}", validation=HELD_OUT
    )
    assert [details(some)["retention_eval"][key] for key in ("read", "examples", "dropped")] == [33, 30, 3]
    plan = plans.make(
        loader.load("tiny", [words, f"data.train={write_rows(ROWS)}", "trainer.max_length=128",
            f"model.name_or_path={model_folder}", "model.from_scratch=false"]), Topology(0, 1))  # fmt: skip
    write_rows(long_questions, "known.jsonl")
    looked = prepare.prepare(plan, tmp_path / "store", rows_alone=True)
    assert details(looked)["retain_rows"] == 0


def test_tokens_of_rows_to_retain_are_among_those_that_the_model_must_know(prepared, write_rows, tokenizer):
    odd = tokenizer.decode([len(tokenizer) - 1])
    largest = max(tokenizer(odd, add_special_tokens=False)["input_ids"])
    words = f"data.retention_eval={write_rows([{'prompt': 'x', 'completion': odd}], 'known.jsonl')}"
    assert details(prepared(ROWS, validation=HELD_OUT))["largest_known_token_id"] < largest
    assert details(prepared(ROWS, words, validation=HELD_OUT))["largest_known_token_id"] == largest


def test_a_source_that_is_called_as_the_rows_to_retain_are_gets_another_name(prepared, write_rows):
    found = prepared(ROWS, f"data.validation={write_rows(HELD_OUT, 'retain.jsonl')}")
    assert list(details(found)["validation_rows"]) == ["retain_2"]
    both = prepared(ROWS, f"data.retention_eval={write_rows(KNOWN, 'retain.jsonl')}", validation=HELD_OUT)
    assert details(both)["retention_eval"]["name"] == "retention_eval" and list(details(both)["validation_rows"]) == [
        "held_out"
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", r"^data.retention_eval: no file or folder '.*missing.jsonl'"),
        ("rows.txt", r"^data.retention_eval: .*rows.txt is a .txt file; wanted .jsonl"),
        ("empty.jsonl", r"^data.retention_eval: .*empty.jsonl holds no rows"),
        ("bad.jsonl", r"bad.jsonl:2: a row with keys text; wanted"),
    ],
)
def test_bad_rows_to_retain_are_refused_with_their_place(prepared, write_rows, tmp_path, name, message):
    write_rows([], "empty.jsonl")
    write_rows([KNOWN[0], {"text": "x"}], "bad.jsonl")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(UserError, match=message) as raised:
        prepared(ROWS, f"data.retention_eval={tmp_path / name}", validation=HELD_OUT)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "store").glob("*partial*"))


def test_what_is_retained_is_said(prepared, write_rows):
    from sft_recipes.data import validate

    file = write_rows([*KNOWN, {"prompt": "Count.", "completion": "1 2 3 4 5 " * 40}], "known.jsonl")
    plan = plans.make(loader.load("tiny", [f"data.retention_eval={file}", "trainer.max_length=128"]), Topology(0, 1))
    assert f"retain data                  {file} " in render.plan_table(plan, explain=True)
    assert "retention_eval" not in render.plan_table(plans.make(loader.load("tiny"), Topology(0, 1)))
    counted = details(prepared(ROWS, f"data.retention_eval={file}", validation=HELD_OUT))
    first, cut, *_ = prepare.announcement(plan, counted, 1.0).splitlines()
    assert "; 4 validation examples and 31 retain examples; 1.0 s" in first
    assert cut.startswith("data: 1 retain examples were longer than 128 tokens")
    (line,) = [line for line in validate.lines(counted) if line.startswith("retain ")]
    assert line.startswith("retain      known: 31 rows read, 31 kept; ")
    counted = details(prepared(ROWS, validation=HELD_OUT))
    assert "retention_eval" not in prepare.announcement(plan, counted, 1.0) + "".join(validate.lines(counted))
