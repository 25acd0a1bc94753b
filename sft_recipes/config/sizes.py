"""The hyperparameter table (recipes/sizes.yaml): size classes, their ranges, and which one a recipe belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from sft_recipes.config import schema
from sft_recipes.config.architecture import parameter_count
from sft_recipes.config.schema import Recipe, did_you_mean
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.paths import REPOSITORY

RECIPES = REPOSITORY / "recipes"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Entry:
    """One cell of the hyperparameter table."""

    start: Any
    range: list[float] | None
    one_of: tuple[str, ...]

    def allows(self, value: Any) -> bool:
        """Whether a recipe of this row may hold `value` without saying `allow_out_of_range`."""
        return value in self.one_of if self.range is None else self.range[0] <= value <= self.range[1]

    def wanted(self) -> str:
        """The cell as an error names it."""
        if self.range is None:
            return " or ".join(self.one_of)
        low, high = self.range
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"


@dataclass(frozen=True)
class SizeClass:
    """One size class of the hyperparameter table: billions of parameters, the method that it is for, its cells."""

    smallest: float
    largest: float
    method: str
    cells: dict[str, Entry]

    def distance(self, billions: float) -> float:
        """How many times larger or smaller than the row's nearest size; 1 inside it."""
        return max(self.smallest / billions, billions / self.largest, 1.0)


@cache
def size_classes() -> dict[str, SizeClass]:
    """The hyperparameter table, row by row."""
    rows = yaml.safe_load((RECIPES / "sizes.yaml").read_text(encoding="utf-8"))
    return {
        name: SizeClass(
            smallest=cells["parameters"][0],
            largest=cells["parameters"][1],
            method=cells.get("method", "full"),
            cells={
                key: Entry(cells[key]["start"], cells[key].get("range"), tuple(cells[key].get("one_of", ())))
                for key in schema.TABLE_KEYS
            },
        )
        for name, cells in rows.items()
    }


def size_class_of(recipe: Recipe) -> str:
    """The row of the table that a recipe's `size` stands for: named, or the nearest to a size such as `20b`.

    Raises:
        ConfigError: no such row, one for another method or another size of model, or a size far from every row.
    """
    where, rows = recipe.origins["size"], size_classes()
    method = "lora" if recipe.lora else "full"
    sized = re.fullmatch(r"(\d+(?:\.\d+)?)[bB]", recipe.size)
    if sized and float(sized[1]) > 0:
        nearest = nearest_size_class(float(sized[1]), method)
        if rows[nearest].distance(float(sized[1])) <= FARTHEST:
            _check_size(recipe, nearest, method)
            return nearest
        raise ConfigError(
            f"{where}: size is {recipe.size}, more than {FARTHEST:g} times beyond every row of recipes/sizes.yaml for "
            f"{method} fine-tuning; name a row and say what differs: {', '.join(_rows(method))}"
        )
    if recipe.size not in rows:
        raise ConfigError(
            f"{where}: size is {recipe.size!r}; wanted a row of recipes/sizes.yaml or billions of parameters such as "
            f"20b: {', '.join(rows)}{did_you_mean(recipe.size, rows)}"
        )
    if rows[recipe.size].method != method and recipe.size != "tiny":
        has = "no lora section" if method == "full" else "a lora section"
        raise ConfigError(
            f"{where}: row {recipe.size} of recipes/sizes.yaml is for {rows[recipe.size].method} fine-tuning and the "
            f"recipe has {has}; say size: {' or '.join(_rows(method))}"
        )
    _check_size(recipe, recipe.size, method)
    return recipe.size


FARTHEST = 2.0  # a size so many times beyond the table is in no row of it


def _rows(method: str) -> list[str]:
    return [name for name, row in size_classes().items() if row.method == method and name != "tiny"]


def nearest_size_class(billions: float, method: str) -> str:
    """The row for a model of so many billions of parameters."""
    return min(_rows(method), key=lambda name: size_classes()[name].distance(billions))


def _check_size(recipe: Recipe, row: str, method: str) -> None:
    """A recipe whose own architecture belongs to another row; one from the command line is an experiment's."""
    counted = parameter_count(recipe.model.architecture)
    if counted is None or recipe.origins.get("model.architecture") == COMMAND_LINE:
        return
    nearest = nearest_size_class(counted / 1e9, method)
    if row == "tiny" and size_classes()[row].distance(counted / 1e9) <= FARTHEST:
        return
    if nearest != row:
        raise ConfigError(
            f"{recipe.origins['size']}: size is {recipe.size}, row {row}, but model.architecture has "
            f"{counted / 1e9:.1f} billion parameters, nearest to row {nearest}; say size: {nearest}"
        )


def hyperparameter(recipe: Recipe, key: str) -> tuple[Any, str]:
    """The value of a key of the table for this recipe, and where it comes from."""
    dotted = "batch.effective_batch_size" if key == "effective_batch_size" else f"trainer.{key}"
    own = recipe.batch.effective_batch_size if key == "effective_batch_size" else recipe.trainer.get(key)
    if own is not None:
        return own, recipe.origins[dotted]
    row = size_class_of(recipe)
    return size_classes()[row].cells[key].start, f"recipes/sizes.yaml, row {row}"


def scientific(value: float) -> str:
    """A rate as recipes write it: 2.0e-5."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def override_line(size: str, key: str, value: float) -> str:
    """Return `trainer.KEY=VALUE`, with the `allow_out_of_range` that it needs if the size class would reject it."""
    rate = scientific(value) if key == "learning_rate" else f"{value:g}"
    said, entry = f"trainer.{key}={rate}", size_classes()[size].cells[key]
    return (
        said if entry.allows(float(rate)) else f"{said} allow_out_of_range=[{key}] (row {size} wants {entry.wanted()})"
    )


def check_ranges(recipe: Recipe) -> None:
    """Refuses a value outside its size row unless the recipe says so on purpose.

    Raises:
        ConfigError: no such row, or a value outside the row's range.
    """
    row = size_class_of(recipe)
    for key in map(str, recipe.allow_out_of_range):
        if key not in schema.TABLE_KEYS:
            raise ConfigError(
                f"{recipe.origins['allow_out_of_range']}: allow_out_of_range names {key!r}; wanted some of "
                f"{', '.join(schema.TABLE_KEYS)}{did_you_mean(key, schema.TABLE_KEYS)}"
            )
    for key in schema.TABLE_KEYS:
        value, where = hyperparameter(recipe, key)
        cell = size_classes()[row].cells[key]
        if key not in recipe.allow_out_of_range and not cell.allows(value):
            raise ConfigError(
                f"{where}: {key} is {value}; row {row} of recipes/sizes.yaml wants {cell.wanted()} "
                f"(on purpose: allow_out_of_range: [{key}])"
            )
