"""Preparation: cache, splits, statistics, limits, retention eval set."""

import json
import logging
import re
from pathlib import Path

import pytest
from datasets import load_from_disk

from sft_recipes.config import loader
from sft_recipes.data import prepare
from sft_recipes.data.tokenize import AS_TEXT
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
        keys = [f"data.train={write_rows(rows)}", f"model.name_or_path={model_folder}", "model.from_scratch=false"]
        keys.append(f"data.validation={write_rows(validation, 'held_out.jsonl') if validation else ''}")
        plan = plans.resolve(loader.load("tiny", [*keys, "trainer.max_length=128", *overrides]), Topology(0, 1))
        return prepare.prepare(plan, tmp_path / "store")

    return run


@pytest.fixture
def logged():
    """The messages of this package's logger."""
    messages = []

    class Collect(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Collect()
    logging.getLogger("sft_recipes").addHandler(handler)
    yield messages
    logging.getLogger("sft_recipes").removeHandler(handler)


def details(prepared_data):
    return json.loads((Path(prepared_data.folder) / "details.json").read_text())


def test_prepare_caches_by_content(prepared):
    first = prepared(ROWS)
    stamp = (Path(first.folder) / "details.json").stat().st_mtime_ns
    assert prepared(ROWS) == first
    assert (Path(first.folder) / "details.json").stat().st_mtime_ns == stamp
    others = [prepared(ROWS[1:]), prepared(ROWS, "trainer.max_length=64"), prepared(ROWS, "trainer.packing=false")]
    assert len({first.folder, *(other.folder for other in others)}) == 4
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_prepare_reuses_toy_rows_through_a_symlink(tmp_path, model_folder):
    (tmp_path / "link").symlink_to(tmp_path / "store")
    keys = (
        "data.train=toy:validation",
        "data.validation=",
        f"model.name_or_path={model_folder}",
        "trainer.max_length=128",
    )
    plan = plans.resolve(loader.load("tiny", [*keys, "model.from_scratch=false"]), Topology(0, 1))
    assert prepare.prepare(plan, tmp_path / "store") == prepare.prepare(plan, tmp_path / "link")


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "corrupt"),
    [
        ("train/data-*.arrow", flip_bit),
        ("train/data-*.arrow", truncate),
        ("validation/data-*.arrow", Path.unlink),
        ("details.json", flip_bit),
        ("prompts.jsonl", truncate),
        ("checksums.json", flip_bit),
        ("checksums.json", Path.unlink),
    ],
)
def test_prepare_replaces_corrupt_data(prepared, logged, name, corrupt):
    first = prepared(ROWS)
    folder = Path(first.folder)
    (file,) = folder.glob(name)
    before = file.read_bytes()
    corrupt(file)
    assert prepared(ROWS) == first
    if name.endswith(("arrow", "prompts.jsonl")):  # details.json has the duration
        assert file.read_bytes() == before
    named = f"{folder}/.*" if name == "checksums.json" else file
    (message,) = logged
    assert re.fullmatch(f"data: {named}: checksum mismatch. Preparing the data again", message)
    prepared(ROWS)
    assert len(logged) == 1


def test_prepare_failure_leaves_no_partial_folder(prepared, tmp_path):
    with pytest.raises(UserError, match="rows.jsonl:2: row keys: found text"):
        prepared([ROWS[0], {"text": "x"}])
    assert not list((tmp_path / "store").glob("*partial*"))


def test_split_is_seeded_and_keeps_prompts_together(prepared):
    result = prepared([*ROWS, *ROWS], "data.validation_fraction=0.2", "trainer.packing=false")
    assert result.validation_rows == 24 and result.examples == 96
    again = prepared([*ROWS, *ROWS], "data.validation_fraction=0.2", "trainer.packing=false", "trainer.data_seed=7")
    assert (again.validation_rows, again.fingerprint == result.fingerprint) == (24, False)


def test_supervised_tokens_are_answers_with_end_of_turn(prepared, tokenizer):
    result = prepared(ROWS, validation=HELD_OUT)
    answers = tokenizer([row["completion"] for row in ROWS], add_special_tokens=False)["input_ids"]
    assert result.supervised_tokens == sum(
        len(ids) + 2 for ids in answers
    )  # <|im_end|> and the line feed that the template writes after it
    assert result.examples == 60
    assert details(result)["end_of_turn_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_truncated_and_dropped_rows_are_counted(prepared):
    long_answer = {"prompt": "Count.", "completion": "1 2 3 4 5 6 7 8 9 " * 20}
    long_question = {"prompt": "word " * 200, "completion": "4"}
    result = prepared([*ROWS, long_answer, long_question], validation=HELD_OUT)
    counts = details(result)["train"]
    assert (counts["examples"], counts["truncated"], counts["dropped"]) == (61, 2, 1)
    longest = details(result)["sources"]["train"][0]["length_percentiles"]["100"]
    assert counts["lost_tokens"] > longest - 128 > 0 and counts["lost_supervised_tokens"] > 0


def test_prepare_rejects_too_many_dropped_rows(prepared):
    long_question = [{"prompt": f"{n} " + "word " * 200, "completion": "4"} for n in range(10)]
    with pytest.raises(
        UserError,
        match=r"data.train: dropped rows .*found 10 of 70 \(first: .*rows.jsonl:61\), expected at most .*=0.05",
    ):
        prepared([*ROWS, *long_question], validation=HELD_OUT)
    assert prepared([*ROWS, *long_question], "data.max_dropped_fraction=0.5", validation=HELD_OUT).examples == 60


def test_prepare_rejects_train_eval_overlap(prepared):
    shared = [{**ROWS[7], "prompt": ROWS[7]["prompt"].replace(" ", "\n ")}]
    with pytest.raises(
        UserError,
        match=r"held_out.jsonl:5: train/eval overlap: found 1 of 5 validation rows .*rows.jsonl:8\)\. .*max_overlap=0.2",
    ):
        prepared(ROWS, validation=[*HELD_OUT, *shared])
    tolerated = prepared(ROWS, "data.max_overlap=0.2", validation=[*HELD_OUT, *shared])
    assert details(tolerated)["overlap"]["rows"] == 1


def test_prepare_several_sources(prepared, write_rows):
    other = [{"question": f"Which letter is number {n}?", "answer": chr(97 + n)} for n in range(20)]
    both = f"data.train=[{write_rows(ROWS, 'sums.jsonl')}, {write_rows(other, 'letters.jsonl')}]"
    result = prepared(ROWS, both, "data.validation_fraction=0.1", "trainer.packing=false")
    stats = details(result)["sources"]
    assert [(source["name"], source["examples"]) for source in stats["train"]] == [("sums", 54), ("letters", 18)]
    assert details(result)["validation_rows"] == {"sums": 6, "letters": 2} and result.examples == 72
    with pytest.raises(UserError, match="command line: data.train: found no source"):
        prepared(ROWS, "data.train=[]")


def test_duplicates_are_counted_and_rows_have_their_location(prepared):
    from datasets import load_from_disk

    result = prepared([*ROWS, ROWS[0]], validation=HELD_OUT)
    assert details(result)["train"]["duplicates"] == 1
    rows = load_from_disk(f"{result.folder}/train")
    locations = [location for row in rows for location in row["source"]]
    assert sorted(int(location.rpartition(":")[2]) for location in locations) == list(range(1, 62))
    assert [len(row["source"]) for row in rows] == [len(row["seq_lengths"]) for row in rows]


def test_new_tokens_resize_embeddings(prepared, tmp_path, model_folder, tokenizer):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|mine|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* expected a special token"):
        prepared(ROWS, f"model.chat_template={template}", validation=HELD_OUT)
    free = [f"<|free {n}|>" for n in range(320 - len(tokenizer))]  # the model has embeddings for unused ids
    new_tokens = f"model.add_tokens={[*free, '<|user|>', '<|assistant|>', '<|mine|>']}"
    result = prepared(ROWS, f"model.chat_template={template}", new_tokens, validation=HELD_OUT)
    assert details(result)["end_of_turn"] == ["<|mine|>"]
    (note,) = result.notes
    assert (
        note.replace(", ".join(free) + ", ", "")
        == "new tokens <|user|>, <|assistant|>, <|mine|>: the model's embeddings are resized from 320 rows"
    )
    assert details(result)["largest_token_id"] == 322 and details(result)["largest_known_token_id"] < 320

    from transformers import AutoModelForCausalLM

    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import model as training_model

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    plan = plans.resolve(loader.load("tiny", [new_tokens]), Topology(0, 1))
    grown = load_tokenizer(str(model_folder), str(template), False, plan.sections.model.add_tokens)
    training_model.resize_embeddings(plan, model, grown, details(result))
    assert model.get_input_embeddings().num_embeddings == 384 == model.config.vocab_size
    assert 322 in training_model.set_stop_tokens(model, grown, details(result))
    with pytest.raises(UserError, match="found token id 500, expected below 384"):
        training_model.resize_embeddings(plan, model, grown, {"largest_token_id": 500, "largest_known_token_id": 500})


def test_loader_rejects_add_tokens_with_lora():
    with pytest.raises(UserError, match="model.add_tokens: adds embeddings, which LoRA does not train"):
        loader.load("8b-lora", ["model.add_tokens=['<|mine|>']"])


def test_truncation_drops_question_with_its_answer(prepared):
    turns = [("user", "Say a."), ("assistant", "a"), ("user", "word " * 12), ("assistant", "word " * 60)]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    result = prepared([*ROWS, row], "trainer.max_length=64", "trainer.packing=false", validation=HELD_OUT)
    counts = details(result)["train"]
    assert (counts["truncated"], counts["lost_answers"], counts["dropped"]) == (1, 1, 0)
    from datasets import load_from_disk

    (truncated,) = [row for row in load_from_disk(f"{result.folder}/train") if row["source"].endswith(":61")]
    assert truncated["labels"][-1] != -100


def test_prepare_rows_only_needs_no_weights(prepared, tmp_path, model_folder, write_rows):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    overrides = [
        f"data.train={write_rows(ROWS)}",
        "data.validation=",
        "model.from_scratch=false",
        f"model.name_or_path={bare}",
    ]
    plan = plans.resolve(loader.load("tiny", [*overrides, "trainer.max_length=128"]), Topology(0, 1))
    assert prepare.prepare(plan, tmp_path / "store", rows_only=True).examples == 57
    with pytest.raises(UserError, match="bare has no weights"):
        prepare.prepare(plan, tmp_path / "store")


def test_dated_template_uses_date_of_plan(tmp_path, model_folder, write_rows):
    import dataclasses

    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE)
    overrides = [f"data.train={write_rows(ROWS)}", "data.validation=", f"model.name_or_path={model_folder}"]
    overrides += ["model.from_scratch=false", "trainer.max_length=128", f"model.chat_template={template}"]
    plan = plans.resolve(loader.load("tiny", overrides), Topology(0, 1))
    first, again, tomorrow = (
        prepare.prepare(dataclasses.replace(plan, created=f"2026-11-{day}T23:59:59+00:00"), tmp_path / store)
        for day, store in ((21, "a"), (21, "b"), (22, "a"))
    )
    assert first.fingerprint == again.fingerprint != tomorrow.fingerprint
    assert first.folder != tomorrow.folder


def test_prepare_checks_limits_of_cached_rows(prepared):
    overlapping = [*HELD_OUT, ROWS[0]]
    for _ in range(2):
        with pytest.raises(UserError, match="train/eval overlap"):
            prepared(ROWS, validation=overlapping)
    assert prepared(ROWS, "data.max_overlap=0.2", validation=overlapping).examples == 60


def test_statistics_are_per_split(prepared):
    with_token = [{"prompt": f"{n} <|im_end|>", "completion": "x"} for n in range(40)]
    found = details(prepared(with_token, "data.validation_fraction=0.25", "batch.min_optimizer_steps=1"))
    assert [found[part]["examples"] for part in ("train", "validation")] == [30, 10]
    assert found["reading"]["train"]["rows"]["conventions"][AS_TEXT][0] == 40


def test_cache_key_includes_additional_templates(prepared, model_folder, tmp_path):
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


def test_lora_rejects_new_padding_token_of_cached_rows(tmp_path, model_folder, write_rows):
    """A tokenizer without a free padding token gets a new one, whose embedding LoRA would not train."""
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
    overrides = [
        f"data.train={write_rows(ROWS)}",
        "data.validation=",
        "model.from_scratch=false",
        f"model.name_or_path={folder}",
    ]
    for extra in ([], ["lora.r=2"]):
        plan = plans.resolve(loader.load("tiny", [*overrides, *extra, "trainer.max_length=128"]), Topology(0, 1))
        if not extra:
            assert "new tokens <|pad|>" in prepare.prepare(plan, tmp_path / "store").notes[0]
            continue
        with pytest.raises(UserError, match=r"found new tokens <\|pad\|>, but lora does not train embeddings"):
            prepare.prepare(plan, tmp_path / "store")


# --- retention eval set ---------------------------------------------------------------------------------------------------

KNOWN = [{"prompt": f"What is the capital of country {n}?", "completion": f"City {n}."} for n in range(30)]


def test_retention_eval_is_prepared_like_validation(prepared, write_rows, tokenizer):
    from datasets import load_from_disk

    file = write_rows([*KNOWN, ROWS[0]], "known.jsonl")  # overlap with training is allowed
    result = prepared(ROWS, f"data.retention_eval={file}", "trainer.packing=false", validation=HELD_OUT)
    counted = details(result)
    rows = load_from_disk(f"{result.folder}/retention_eval")
    assert counted["retention_eval_rows"] == len(rows) == 31
    assert [counted["sources"]["retention_eval"][0][key] for key in ("name", "rows_read", "examples", "dropped")] == [
        "known",
        31,
        31,
        0,
    ]
    assert rows["source"][:] == [f"{file}:{number}" for number in range(1, 32)]
    in_loss = [id for id in rows[3]["labels"] if id != -100]
    assert tokenizer.decode(in_loss) == "City 3.<|im_end|>\n"
    assert counted["retention_eval"]["supervised_tokens"] == sum(id != -100 for row in rows for id in row["labels"])
    assert rows.column_names == load_from_disk(f"{result.folder}/validation").column_names
    packed = prepared(ROWS, f"data.retention_eval={file}", validation=HELD_OUT)
    assert (
        sum(map(len, load_from_disk(f"{packed.folder}/retention_eval")["source"]))
        == 31
        > details(packed)["retention_eval_rows"]
    )


def test_retention_eval_changes_no_other_rows(prepared, write_rows):
    without = prepared(ROWS, validation=HELD_OUT)
    assert "retention_eval" not in details(without) and not details(without)["retention_eval_rows"]
    assert not (Path(without.folder) / "retention_eval").exists()
    known = prepared(ROWS, f"data.retention_eval={write_rows(KNOWN, 'known.jsonl')}", validation=HELD_OUT)
    fewer = prepared(ROWS, f"data.retention_eval={write_rows(KNOWN[1:], 'known.jsonl')}", validation=HELD_OUT)
    assert len({result.folder for result in (without, known, fewer)}) == 3
    assert len({result.fingerprint for result in (without, known, fewer)}) == 3
    same = ("examples", "rows", "supervised_tokens", "tokens", "validation_rows", "notes")
    assert all(getattr(without, name) == getattr(known, name) for name in same)
    assert details(known)["train"] == details(without)["train"]
    assert prepared(ROWS, "data.retention_eval=", validation=HELD_OUT) == without


def test_retention_eval_is_limited_by_seed(prepared, write_rows):
    from datasets import load_from_disk

    overrides = (
        f"data.retention_eval={write_rows(KNOWN, 'known.jsonl')}",
        "trainer.packing=false",
        "data.max_eval_samples=7",
    )
    result = prepared(ROWS, *overrides)
    locations = [load_from_disk(f"{prepared_data.folder}/retention_eval")["source"][:] for prepared_data in (
        result, prepared(ROWS, *overrides, "trainer.max_length=120"), prepared(ROWS, *overrides, "trainer.data_seed=7"),
    )]  # fmt: skip
    assert details(result)["retention_eval_rows"] == len(locations[0]) == 7
    assert locations[0] == locations[1] != locations[2]


def test_prepare_rejects_empty_retention_eval(prepared, write_rows, tmp_path, model_folder):
    long_questions = [{"prompt": f"{n} " + "word " * 200, "completion": "4"} for n in range(3)]
    overrides = f"data.retention_eval={write_rows(long_questions, 'known.jsonl')}"
    for _ in range(2):
        with pytest.raises(
            UserError, match="^data.retention_eval: dropped rows .*found 3 of 3 .*Increase trainer.max_length=128"
        ):
            prepared(ROWS, overrides, validation=HELD_OUT)
    known = f"data.retention_eval={write_rows([*long_questions, *KNOWN], 'known.jsonl')}"
    some = prepared(ROWS, known, "data.max_dropped_fraction=0.1", validation=HELD_OUT)
    assert [details(some)["retention_eval"][key] for key in ("rows_read", "examples", "dropped")] == [33, 30, 3]
    plan = plans.resolve(
        loader.load("tiny", [overrides, f"data.train={write_rows(ROWS)}", "trainer.max_length=128",
            f"model.name_or_path={model_folder}", "model.from_scratch=false"]), Topology(0, 1))  # fmt: skip
    write_rows(long_questions, "known.jsonl")
    shown = prepare.prepare(plan, tmp_path / "store", rows_only=True)
    assert details(shown)["retention_eval_rows"] == 0


def test_largest_token_id_includes_retention_eval(prepared, write_rows, tokenizer):
    odd = tokenizer.decode([len(tokenizer) - 1])
    largest = max(tokenizer(odd, add_special_tokens=False)["input_ids"])
    overrides = f"data.retention_eval={write_rows([{'prompt': 'x', 'completion': odd}], 'known.jsonl')}"
    assert details(prepared(ROWS, validation=HELD_OUT))["largest_known_token_id"] < largest
    assert details(prepared(ROWS, overrides, validation=HELD_OUT))["largest_known_token_id"] == largest


def test_validation_source_is_not_named_retention_eval(prepared, write_rows):
    result = prepared(ROWS, f"data.validation={write_rows(HELD_OUT, 'retention_eval.jsonl')}")
    assert list(details(result)["validation_rows"]) == ["retention_eval_2"]
    both = prepared(ROWS, f"data.retention_eval={write_rows(KNOWN, 'retention_eval.jsonl')}", validation=HELD_OUT)
    assert details(both)["sources"]["retention_eval"][0]["name"] == "retention_eval"
    assert list(details(both)["validation_rows"]) == ["held_out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", r"^data.retention_eval: no file or folder '.*missing.jsonl'"),
        ("rows.txt", r"^data.retention_eval: .*rows.txt: file type: found .txt, expected .jsonl"),
        ("empty.jsonl", r"^data.retention_eval: .*empty.jsonl: found no rows"),
        ("bad.jsonl", r"bad.jsonl:2: row keys: found text, expected"),
    ],
)
def test_prepare_rejects_bad_retention_eval(prepared, write_rows, tmp_path, name, message):
    write_rows([], "empty.jsonl")
    write_rows([KNOWN[0], {"text": "x"}], "bad.jsonl")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(UserError, match=message) as raised:
        prepared(ROWS, f"data.retention_eval={tmp_path / name}", validation=HELD_OUT)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "store").glob("*partial*"))


def test_reports_include_retention_eval(prepared, write_rows):
    from sft_recipes.data import validate

    file = write_rows([*KNOWN, {"prompt": "Count.", "completion": "1 2 3 4 5 " * 40}], "known.jsonl")
    plan = plans.resolve(loader.load("tiny", [f"data.retention_eval={file}", "trainer.max_length=128"]), Topology(0, 1))
    assert f"retention eval               {file} " in render.format_plan(plan, explain=True)
    assert "retention_eval" not in render.format_plan(plans.resolve(loader.load("tiny"), Topology(0, 1)))
    counted = details(prepared(ROWS, f"data.retention_eval={file}", validation=HELD_OUT))
    first, *lines = prepare.summary(128, counted, 1.0)
    assert "; 4 validation examples, 31 retention_eval examples; 1.0 s" in first
    assert any(line.startswith("data: retention_eval: 1 of 31 rows truncated (increase") for line in lines)
    (line,) = [line for line in validate.report_lines(counted) if line.startswith("retention_eval")]
    assert line.startswith("retention_eval      known: 31 examples; 0 of 31 rows dropped; ")
    counted = details(prepared(ROWS, validation=HELD_OUT))
    assert "retention" not in "".join([*prepare.summary(128, counted, 1.0), *validate.report_lines(counted)])


@pytest.mark.parametrize(
    ("rows", "packing", "expected"), [(ROWS, "false", 16), (ROWS[:1], "true", 16), (ROWS, "true", 16)]
)
def test_overfit_repeats_a_few_rows_to_the_effective_batch(tmp_path, model_folder, write_rows, rows, packing, expected):
    from datasets import load_from_disk

    keys = [f"data.train={write_rows(rows)}", f"model.name_or_path={model_folder}", "model.from_scratch=false"]
    keys += ["trainer.max_length=128", f"trainer.packing={packing}", "batch.effective_batch_size=16"]
    plan = plans.resolve(loader.load("tiny", keys, overfit=True), Topology(0, 1))
    data = prepare.prepare(plan, tmp_path / "store")
    train, validation = (load_from_disk(str(Path(data.folder) / part)) for part in ("train", "validation"))
    assert (len(train), details(data)["train"]["examples"]) == (expected, min(len(rows), 8))
    assert {tuple(row) for row in train["input_ids"]} == {tuple(row) for row in validation["input_ids"]}
    assert plans.with_prepared_data(plan, data).optimizer_steps == 200


def test_overfit_uses_train_split_of_folder(tmp_path, model_folder):
    for name, rows in (("train", ROWS), ("test", HELD_OUT)):
        (tmp_path / "rows" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"data.train={tmp_path / 'rows'}", f"model.name_or_path={model_folder}", "model.from_scratch=false"]
    plan = plans.resolve(loader.load("tiny", [*keys, "trainer.max_length=128"], overfit=True), Topology(0, 1))
    data = prepare.prepare(plan, tmp_path / "store")
    assert list(details(data)["validation_rows"]) == ["rows"] and len(Path(data.folder, "prompts.jsonl").read_text())


def test_weights_are_part_of_rows_steps_and_fingerprint(prepared, tmp_path, write_rows):
    other = write_rows([{"prompt": f"Name {n}", "completion": f"It is {n}."} for n in range(20)], "other.jsonl")

    def weighted(first, second):
        sources = f"[{{path: {tmp_path / 'rows.jsonl'}, weight: {first}}}, {{path: {other}, weight: {second}}}]"
        return prepared(ROWS, f"data.train={sources}", validation=HELD_OUT)

    plain, twice = weighted(1, 1), weighted(2.5, 0.5)
    counts = [rows for rows, _ in details(twice)["source_weights"]]
    assert details(plain)["source_weights"] == []
    assert twice.rows == 2 * counts[0] + round(counts[0] / 2) + round(counts[1] / 2)
    assert twice.examples == 60 * 2.5 + 20 * 0.5
    assert len({plain.fingerprint, twice.fingerprint, weighted(2.5, 0.6).fingerprint}) == 3
    rows = load_from_disk(str(Path(twice.folder) / "train"))["source"]
    assert [len({Path(place).name[:1] for place in row}) for row in rows] == [1] * sum(counts), "packed separately"


def test_what_was_read_is_reported(prepared, tmp_path):
    rows = [*ROWS, {"prompt": "last?", "completion": ""}]
    report = details(prepared([{**row, "id": 1} for row in rows], "data.max_rejected_fraction=0.1"))["reading"]["train"]
    assert report["rows"]["ignored"] == {"id": 60}
    assert [count for count, _ in report["rows"]["rejected"].values()] == [1]
    with pytest.raises(UserError, match="1 of 61 rows rejected"):  # rows that were cached with a larger fraction
        prepared([{**row, "id": 1} for row in rows])


def test_rows_without_a_trained_turn_are_left_out(prepared):
    untrained = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "train": False}]}
    found = details(prepared([*ROWS, untrained], validation=HELD_OUT))
    assert (found["train"]["examples"], found["train"]["untrained"], found["train"]["dropped"]) == (60, 1, 0)
    with pytest.raises(UserError, match="data.train: found no row with an assistant turn in the loss"):
        prepared([untrained, untrained], validation=HELD_OUT)


def test_rows_with_one_prompt_are_split_by_text(prepared):
    found = details(prepared([{**row, "prompt": "Count."} for row in ROWS]))
    assert found["validation"]["examples"] == 3
