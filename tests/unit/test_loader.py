import re

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.config import loader, sizes
from sft_recipes.runtime.errors import UserError

SFT_GUIDE = {
    # size class: learning rate, effective batch, epochs, warm-up ratio, weight decay
    "1-3b": ([5e-5, 1e-4], [16, 32], [3, 5], [0.05, 0.1], [0.01, 0.1]),
    "7-13b": ([1e-5, 5e-5], [32, 64], [2, 3], [0.03, 0.1], [0.01, 0.01]),
    "30-70b": ([5e-6, 2e-5], [64, 128], [1, 2], [0.03, 0.05], [0.01, 0.01]),
}


@pytest.fixture
def load_recipe(tmp_path, monkeypatch):
    """Write a recipe `mine` into a copy of the recipes folder, and load it."""

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


@pytest.mark.parametrize("size", SFT_GUIDE)
def test_size_classes_equal_the_sft_guide(size):
    ranges = sizes.size_classes()[size].ranges
    keys = ("learning_rate", "effective_batch_size", "num_train_epochs", "warmup_ratio", "weight_decay")
    assert tuple(ranges[key].range for key in keys) == SFT_GUIDE[size]
    assert ranges["max_grad_norm"].range == [1.0, 1.0]
    assert ranges["lr_scheduler_type"].one_of == ["cosine"]
    assert ranges["learning_rate"].start == (5e-5 if size == "1-3b" else 2e-5)


def test_size_class_starts_inside_its_ranges():
    ranges = [(name, key, value) for name, size in sizes.size_classes().items() for key, value in size.ranges.items()]
    assert len(ranges) == 7 * 7
    assert [(name, key) for name, key, value in ranges if not value.allows(value.start)] == []


def test_loader_reads_every_shipped_recipe():
    names = loader.names()
    assert "tiny" in names
    assert [loader.load(name).name for name in names] == names


def test_loader_reads_exponent_without_dot(load_recipe):
    assert load_recipe(GOOD).trainer["learning_rate"] == 2e-5
    assert load_recipe(GOOD, "trainer.learning_rate=3E-5").trainer["learning_rate"] == 3e-5


def test_loader_records_origins(load_recipe):
    recipe = load_recipe(GOOD, "trainer.num_train_epochs=2")
    assert recipe.origins["trainer.learning_rate"].endswith("mine.yaml:7")
    assert recipe.origins["trainer.num_train_epochs"] == "command line"
    assert sizes.hyperparameter(recipe, "weight_decay") == (0.01, "recipes/sizes.yaml, size class 7-13b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD + "  lerning_rate: 1\n",
            r"mine.yaml:8: unknown key trainer.lerning_rate; did you mean learning_rate\?",
        ),
        (GOOD + "optimizer: x\n", r"mine.yaml:8: unknown key optimizer"),
        (GOOD.replace("name_or_path", "name"), r"mine.yaml:3: unknown key model.name"),
        (GOOD + "  learning_rate: 1e-5\n", r"mine.yaml:8: .*duplicate key learning_rate"),
        (GOOD.replace("2e-5", "fast"), r"mine.yaml:7: trainer.learning_rate: found 'fast', expected a valid number"),
        (
            GOOD.replace("2e-5", "1e-3"),
            r"mine.yaml:7: learning_rate of size class 7-13b: found 0.001, expected 1e-05 to 5e-05",
        ),
        (
            GOOD + "  lr_scheduler_type: linear\n",
            r"mine.yaml:8: lr_scheduler_type of size class 7-13b: found linear, expected cosine",
        ),
        (
            GOOD + "  warmup_steps: 5\n",
            r"mine.yaml:8: trainer.warmup_steps is set by the plan. Set trainer.warmup_ratio",
        ),
        (GOOD + "  bf16: true\n", r"mine.yaml:8: trainer.bf16 is set by the plan. Set precision"),
        (GOOD + "  max_length: 0\n", r"mine.yaml:8: trainer.max_length: found 0, expected greater than or equal to 1"),
        (GOOD + "  seed: 1.5\n", r"mine.yaml:8: trainer.seed: found 1.5, expected a valid integer"),
        (GOOD + "  packing: maybe\n", r"mine.yaml:8: trainer.packing: found 'maybe', expected a valid boolean"),
        (GOOD + "parallelism: zero4\n", r"mine.yaml:8: parallelism: found 'zero4', expected one of .*did you mean"),
        (GOOD + "batch: 4\n", r"mine.yaml:8: batch: found 4, expected a section"),
        (
            GOOD.replace("7-13b", "large"),
            r"mine.yaml:1: size: found 'large', expected a size such as 20b, .*or a size class",
        ),
        (
            GOOD.replace("7-13b", "405b"),
            r"mine.yaml:1: size: found '405b', expected .* at most 2 times beyond a size class, .*30-70b",
        ),
        (GOOD.replace("7-13b", "0b"), r"mine.yaml:1: size: found '0b', expected a size such as"),
        (
            GOOD.replace("7-13b", "lora-7-13b"),
            r"mine.yaml:1: size: found 'lora-7-13b', expected .* size class for a recipe without a lora section: .*7-13b",
        ),
        (
            GOOD + "lora: {r: 8}\n",
            r"mine.yaml:1: size: found '7-13b', expected .* size class for LoRA: .*lora-7-13b",
        ),
        (GOOD + "lora: {}\n", r"mine.yaml:8: lora: found {}, expected a section"),
        (GOOD + "lora: {quantize: int8}\n", r"mine.yaml:8: lora.quantize: found 'int8', expected 'nf4'"),
        (GOOD + "lora: {r: 0}\n", r"mine.yaml:8: lora.r: found 0, expected greater than or equal to 1"),
        (GOOD.replace("size: 7-13b\n", ""), r"size is missing"),
        (GOOD.replace("  train: some/data\n", "  validation: x\n"), r"data.train is missing"),
        (GOOD.replace("  name_or_path: some/model", "  revision: abc"), r"model.name_or_path: missing"),
        (GOOD + "allow_out_of_range: [speed]\n", r"mine.yaml:8: allow_out_of_range: found 'speed'"),
        (
            GOOD.replace("  name_or_path: some/model", "  name_or_path: some/model\n  architecture: {a: 1, a: 2}"),
            r"mine.yaml:4: .*duplicate key a",
        ),
        (GOOD + "parallelism: 2024-99-99\n", r"mine.yaml: not valid YAML: month must be in 1..12"),
        (GOOD + f"parallelism: {'[' * 2000}\n", r"mine.yaml: not valid YAML"),
        (
            GOOD.replace("some/data", "[a.jsonl, {weight: 2}]"),
            r"mine.yaml:5: data.train: path: found None, expected a valid string",
        ),
        (
            GOOD.replace("some/data", "[{path: a, wait: 2}]"),
            r"mine.yaml:5: data.train: unknown key wait; did you mean weight",
        ),
        (GOOD.replace("some/data", "[]"), r"mine.yaml:5: data.train: found no source"),
        (
            GOOD.replace("some/data", "some/data\n  revision: 0123"),
            r"mine.yaml:6: data.revision: found 83, expected a valid string",
        ),
        (
            GOOD + "allow_out_of_range: learning_rate\n",
            r"mine.yaml:8: allow_out_of_range: found 'learning_rate', expected a valid list",
        ),
        ("size: [7\n", r"mine.yaml:2: not valid YAML"),
        ("", r"mine.yaml: empty or not a mapping"),
        ("- a\n", r"mine.yaml: empty or not a mapping"),
    ],
)
def test_loader_rejects_with_file_and_line(load_recipe, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_recipe(text)
    assert "\n" not in str(error.value)


def test_allow_out_of_range_permits_value(load_recipe):
    recipe = load_recipe(GOOD.replace("2e-5", "1e-3") + "allow_out_of_range: [learning_rate]\n")
    assert sizes.hyperparameter(recipe, "learning_rate")[0] == 1e-3


@pytest.mark.parametrize(
    "name", ["../tiny", "/etc/passwd", "tiny;ls", "$(ls)", "", "sizes", "tiny.yaml", "a b", "`id`"]
)
def test_loader_rejects_invalid_recipe_name(name):
    with pytest.raises(UserError, match="RECIPE: "):
        loader.load(name)


def test_loader_suggests_nearest_recipe():
    with pytest.raises(UserError, match=re.escape("did you mean tiny?")):
        loader.load("tyni")


@pytest.mark.parametrize("override", ["learning_rate", "=3", "trainer.learning_rate", "trainer.=1", "trainer=1"])
def test_loader_rejects_malformed_override(override):
    with pytest.raises(UserError, match="command line: "):
        loader.load("tiny", [override])
