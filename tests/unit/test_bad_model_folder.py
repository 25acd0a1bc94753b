"""No content of a model folder's files gives a traceback: it trains, or one line says what is wrong."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sft_recipes.config import loader
from sft_recipes.data import prepare
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError
from sft_recipes.training import model

ROWS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(8)]
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"
# Values of another type, or without meaning, for any key of a JSON file.
VALUES = (None, True, -1, 0, 2**40, 0.5, "", "x", "\ud800", [], ["x", -1], {}, {"x": {"y": 1}})


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    keys = [f"data.train={folder / 'rows.jsonl'}", "data.validation=", "model.from_scratch=false", "precision=fp32"]
    keys += [f"model.name_or_path={folder / 'model'}", "model.architecture={}", "trainer.max_length=128"]
    return plans.resolve(loader.load("tiny", keys), Topology(0, 1))


@pytest.fixture
def outcome(plan, model_folder, tmp_path):
    """Prepare the rows and load a changed copy of the small model; return the error's line, or the model."""
    folder = Path(plan.sections.model.name_or_path)

    def load(change):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model_folder, folder)
        change(folder)
        try:
            prepared = prepare.prepare(plan, tmp_path / "store")
            details = json.loads((Path(prepared.folder) / "details.json").read_text())
            section = plan.sections.model
            tokenizer = load_tokenizer(prepared.model, section.chat_template, section.trust_remote_code)
            return model.build_model(plan, prepared.model, tokenizer, details)[0]
        except UserError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 500, line
            return line

    return load


def bytes_of(content):
    """Some ways in which a file can be broken."""
    half = content[: len(content) // 2]
    return {
        "empty": b"",
        "cut off": half,
        "not UTF-8": b"\xff\xfe" + half,
        "null": b"null",
        "a list": b"[1]",
        "{}": b"{}",
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [*bytes_of(b""), "missing", "a folder"])
def test_broken_file_gives_one_line(outcome, name, kind):
    def change(folder):
        file = folder / name
        content = file.read_bytes() if file.is_file() else b"{}"
        file.unlink(missing_ok=True)
        if kind == "a folder":
            file.mkdir()
        elif kind != "missing":
            file.write_bytes(bytes_of(content)[kind])

    line = outcome(change)
    if name == "config.json" or (name == "tokenizer.json" and kind != "{}"):
        assert isinstance(line, str)


def places(content, path=()):
    """Yield the path of each value, of the first two of a list or of a vocabulary."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[: 2 if len(content) > 60 or isinstance(content, list) else None] if items else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def mutations(folder, name):
    content = json.loads((folder / name).read_text())
    keys = [
        *places(content),
        ("rope_scaling",),
        ("vocab_size",),
        ("auto_map",),
        ("tokenizer_class",),
        ("added_tokens_decoder",),
    ]
    return [(path, value) for path in keys for value in VALUES]


def mutate(folder, name, path, value):
    content = json.loads((folder / name).read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_odd_value_gives_one_line_or_trains(outcome, model_folder, name):
    """A seeded sample of all values in all places."""
    every = mutations(model_folder, name)
    for path, value in random.Random(0).sample(every, 8):
        outcome(lambda folder, path=path, value=value: mutate(folder, name, path, value))


@pytest.mark.parametrize(
    "index",
    ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "none.safetensors"}}'],
)
def test_bad_index_of_weights_gives_one_line(outcome, index):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(index)

    assert isinstance(outcome(change), str)


def test_weights_that_bitsandbytes_has_quantized_give_one_line(outcome):
    def quantized(folder):
        mutate(folder, "config.json", ("quantization_config",), {"quant_method": "bitsandbytes", "load_in_4bit": True})

    assert "has weights quantized by bitsandbytes. Name the unquantized model" in outcome(quantized)


def test_bad_weights_give_one_line(outcome):
    def cut(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])

    def incomplete(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert "cannot be loaded" in outcome(cut) and "lack model.norm.weight" in outcome(incomplete)


def test_invalid_generation_config_is_repaired_or_rejected(outcome, console):
    def write(**values):
        return lambda folder: (folder / "generation_config.json").write_text(json.dumps(values))

    assert outcome(write(do_sample=False, temperature=0.9, top_p=0.6)).generation_config.do_sample is True
    assert "do_sample: true is set" in console.readouterr().out
    assert outcome(write(top_k=50)).generation_config.do_sample is not True
    assert "max_new_tokens" in outcome(write(max_new_tokens=-1))
    assert "generation_config.json is invalid" in outcome(write(eos_token_id=["x"]))


def test_adapters_are_not_a_model(outcome):
    line = outcome(lambda folder: (folder / "adapter_config.json").write_text("{}"))
    assert "found adapters (adapter_config.json), expected a model" in line and "make merge" in line
