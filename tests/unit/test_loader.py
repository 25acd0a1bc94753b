import re

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.config import loader, sizes
from sft_recipes.runtime.errors import UserError

DOCUMENTS = {
    # row: learning rate, effective batch, epochs, warm-up ratio, weight decay
    "1-3b": ([5e-5, 1e-4], [16, 32], [3, 5], [0.05, 0.1], [0.01, 0.1]),
    "7-13b": ([1e-5, 5e-5], [32, 64], [2, 3], [0.03, 0.1], [0.01, 0.01]),
    "30-70b": ([5e-6, 2e-5], [64, 128], [1, 2], [0.03, 0.05], [0.01, 0.01]),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a recipe `mine` into a recipes folder that else is the real one, and loads it."""

    def load(text, *overrides):
        (tmp_path / "sizes.yaml").write_text((REPOSITORY / "recipes" / "sizes.yaml").read_text())
        (tmp_path / "mine.yaml").write_text(text)
        monkeypatch.setattr(loader, "RECIPES", tmp_path)
        return loader.load("mine", overrides)

    return load


GOOD = """\
size: 7-13b
model:
  name_or_path: some/model
data:
  train: some/data
trainer:
  learning_rate: 2e-5
"""


@pytest.mark.parametrize("row", DOCUMENTS)
def test_the_table_is_the_documents(row):
    table = sizes.size_classes()[row].cells
    keys = ("learning_rate", "effective_batch_size", "num_train_epochs", "warmup_ratio", "weight_decay")
    assert tuple(table[key].range for key in keys) == DOCUMENTS[row]
    assert table["max_grad_norm"].range == [1.0, 1.0]
    assert table["lr_scheduler_type"].one_of == ("cosine",)
    assert table["learning_rate"].start == (5e-5 if row == "1-3b" else 2e-5)


def test_every_row_starts_inside_its_own_ranges():
    cells = [(name, key, cell) for name, row in sizes.size_classes().items() for key, cell in row.cells.items()]
    assert len(cells) == 7 * 7
    assert [(row, key) for row, key, cell in cells if not cell.allows(cell.start)] == []


def test_every_shipped_recipe_loads():
    names = loader.names()
    assert "tiny" in names
    assert [loader.load(name).name for name in names] == names


def test_an_exponent_without_a_dot_is_a_number(written):
    assert written(GOOD).trainer["learning_rate"] == 2e-5
    assert written(GOOD, "trainer.learning_rate=3E-5").trainer["learning_rate"] == 3e-5


def test_where_each_value_was_written_is_kept(written):
    recipe = written(GOOD, "trainer.num_train_epochs=2")
    assert recipe.origins["trainer.learning_rate"].endswith("mine.yaml:7")
    assert recipe.origins["trainer.num_train_epochs"] == "command line"
    assert sizes.hyperparameter(recipe, "weight_decay") == (0.01, "recipes/sizes.yaml, row 7-13b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "  lerning_rate: 1\n", r"mine.yaml:8: unknown key trainer.lerning_rate; did you mean learning_rate\?"),
        (GOOD + "optimizer: x\n", r"mine.yaml:8: unknown key optimizer"),
        (GOOD.replace("name_or_path", "name"), r"mine.yaml:3: unknown key model.name"),
        (GOOD + "  learning_rate: 1e-5\n", r"mine.yaml:8: trainer.learning_rate is written twice"),
        (GOOD.replace("2e-5", "fast"), r"mine.yaml:7: trainer.learning_rate is 'fast'; wanted a number"),
        (GOOD.replace("2e-5", "1e-3"), r"mine.yaml:7: learning_rate is 0.001; row 7-13b .* wants 1e-05 to 5e-05"),
        (
            GOOD + "  lr_scheduler_type: linear\n",
            r"mine.yaml:8: lr_scheduler_type is linear; row 7-13b .* wants cosine",
        ),
        (
            GOOD + "  warmup_steps: 5\n",
            r"mine.yaml:8: trainer.warmup_steps is the plan's to set; say trainer.warmup_ratio",
        ),
        (GOOD + "  bf16: true\n", r"mine.yaml:8: trainer.bf16 is the plan's to set; say precision"),
        (GOOD + "  max_length: 0\n", r"mine.yaml:8: trainer.max_length is 0; wanted at least 1"),
        (GOOD + "  seed: 1.5\n", r"mine.yaml:8: trainer.seed is 1.5; wanted a whole number"),
        (GOOD + "  packing: maybe\n", r"mine.yaml:8: trainer.packing is 'maybe'; wanted true or false"),
        (GOOD + "parallelism: zero4\n", r"mine.yaml:8: parallelism is 'zero4'; wanted one of .*did you mean"),
        (GOOD + "batch: 4\n", r"mine.yaml:8: batch is 4; wanted keys below it"),
        (
            GOOD.replace("7-13b", "large"),
            r"mine.yaml:1: size is 'large'; wanted a row of recipes/sizes.yaml or billions",
        ),
        (GOOD.replace("7-13b", "405b"), r"mine.yaml:1: size is 405b, more than 2 times beyond every row .*30-70b"),
        (GOOD.replace("7-13b", "0b"), r"mine.yaml:1: size is '0b'; wanted a row"),
        (GOOD.replace("7-13b", "lora-7-13b"), r"mine.yaml:1: row lora-7-13b .* no lora section; say size: .*7-13b"),
        (GOOD + "lora: {r: 8}\n", r"mine.yaml:1: row 7-13b .* a lora section; say size: .*lora-7-13b"),
        (GOOD + "lora: {}\n", r"mine.yaml:8: lora is {}; wanted keys below it"),
        (GOOD + "lora: {quantize: int8}\n", r"mine.yaml:8: lora.quantize is 'int8'; wanted one of nf4"),
        (GOOD + "lora: {r: 0}\n", r"mine.yaml:8: lora.r is 0; wanted 1 to 100000"),
        (GOOD.replace("size: 7-13b\n", ""), r"size is missing"),
        (GOOD.replace("  train: some/data\n", "  validation: x\n"), r"data.train is missing"),
        (GOOD.replace("  name_or_path: some/model", "  revision: abc"), r"model.name_or_path is missing"),
        (GOOD + "allow_out_of_range: [speed]\n", r"mine.yaml:8: allow_out_of_range names 'speed'"),
        (
            GOOD + "allow_out_of_range: learning_rate\n",
            r"mine.yaml:8: allow_out_of_range is 'learning_rate'; wanted a list",
        ),
        ("size: [7\n", r"mine.yaml:2: not YAML"),
        ("", r"mine.yaml: empty or not a mapping"),
        ("- a\n", r"mine.yaml: empty or not a mapping"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_file_and_line(written, text, message):
    with pytest.raises(UserError, match=message) as refused:
        written(text)
    assert "\n" not in str(refused.value)


def test_a_value_outside_its_row_is_taken_where_the_recipe_says_so_on_purpose(written):
    recipe = written(GOOD.replace("2e-5", "1e-3") + "allow_out_of_range: [learning_rate]\n")
    assert sizes.hyperparameter(recipe, "learning_rate")[0] == 1e-3


@pytest.mark.parametrize(
    "name", ["../tiny", "/etc/passwd", "tiny;ls", "$(ls)", "", "sizes", "tiny.yaml", "a b", "`id`"]
)
def test_what_is_no_name_of_a_recipe_is_refused(name):
    with pytest.raises(UserError, match="RECIPE: "):
        loader.load(name)


def test_a_misspelt_recipe_gets_the_nearest_name():
    with pytest.raises(UserError, match=re.escape("did you mean tiny?")):
        loader.load("tyni")


@pytest.mark.parametrize("override", ["learning_rate", "=3", "trainer.learning_rate", "trainer.=1", "trainer=1"])
def test_an_override_that_is_not_a_dotted_key_and_a_value_is_refused(override):
    with pytest.raises(UserError, match="command line: "):
        loader.load("tiny", [override])
