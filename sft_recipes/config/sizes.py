"""The hyperparameter table (recipes/sizes.yaml): size classes and their ranges; the size class of a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from sft_recipes.config import schema
from sft_recipes.config.architecture import is_dense, parameter_count
from sft_recipes.config.schema import Recipe
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.paths import REPOSITORY

RECIPES = REPOSITORY / "recipes"
COMMAND_LINE = "command line"
MODEL = "MODEL"  # origin of what a model's files say


@dataclass(frozen=True)
class HyperparameterRange:
    """The values of a hyperparameter that a size class allows, and its default."""

    start: Any
    range: list[float] | None = None
    one_of: Sequence[str] = ()

    def allows(self, value: Any) -> bool:
        """Return whether a recipe of this size class may set `value` without `allow_out_of_range`."""
        return value in self.one_of if self.range is None else self.range[0] <= value <= self.range[1]

    def describe(self) -> str:
        """Return the allowed values for an error message."""
        if self.range is None:
            return " or ".join(self.one_of)
        low, high = self.range
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"


@dataclass(frozen=True)
class SizeClass:
    """A size class.

    Attributes:
        smallest: billions of parameters.
        largest: billions of parameters.
        method: `full` or `lora`.
        ranges: by key of the table.
    """

    smallest: float
    largest: float
    method: str
    ranges: dict[str, HyperparameterRange]

    def distance(self, billions: float) -> float:
        """Return the factor between this number of parameters and the nearest in the size class; 1 inside it."""
        return max(self.smallest / billions, billions / self.largest, 1.0)


@cache
def size_classes() -> dict[str, SizeClass]:
    """Return the size classes by name."""
    table = yaml.safe_load((RECIPES / "sizes.yaml").read_text(encoding="utf-8"))
    return {
        name: SizeClass(
            smallest=values["parameters"][0],
            largest=values["parameters"][1],
            method=values.get("method", "full"),
            ranges={key: HyperparameterRange(**values[key]) for key in schema.TABLE_KEYS},
        )
        for name, values in table.items()
    }


def size_class_of(recipe: Recipe) -> str:
    """Return the size class of a recipe's `size`: by name, or the nearest to a number of parameters such as `20b`.

    Raises:
        ConfigError: no such size class, one for another method or number of parameters, or a size far from all of them.
    """
    where, method = recipe.origins["size"], "lora" if recipe.lora else "full"
    number = re.fullmatch(r"(\d+(?:\.\d+)?)[bB]", recipe.size)
    billions = float(number[1]) if number else 0.0
    size = nearest_size_class(billions, method) if billions else recipe.size
    if size not in (*_names(method), "tiny") or (billions and size_classes()[size].distance(billions) > MAX_DISTANCE):
        raise ConfigError(
            f"{where}: size: found {recipe.size!r}, expected a size such as 20b, at most {MAX_DISTANCE:g} times beyond "
            f"a size class, or a size class for {'LoRA' if recipe.lora else 'a recipe without a lora section'}: "
            f"{', '.join(_names(method))}"
        )
    architecture = recipe.model.architecture
    parameters = parameter_count(architecture) if is_dense(architecture) else None
    if parameters is None or recipe.origins.get("model.architecture") == COMMAND_LINE:
        return size
    nearest = nearest_size_class(parameters / 1e9, method)
    if size != nearest and not (size == "tiny" and size_classes()[size].distance(parameters / 1e9) <= MAX_DISTANCE):
        raise ConfigError(
            f"{where}: size: found {recipe.size} (size class {size}), expected {nearest}: model.architecture has "
            f"{parameters / 1e9:.1f} billion parameters. Set size: {nearest}"
        )
    return size


MAX_DISTANCE = 2.0  # times beyond the nearest size class


def _names(method: str) -> list[str]:
    return [name for name, size in size_classes().items() if size.method == method and name != "tiny"]


def nearest_size_class(billions: float, method: str) -> str:
    """Return the size class for a model with this number of parameters, in billions."""
    return min(_names(method), key=lambda name: size_classes()[name].distance(billions))


def hyperparameter(recipe: Recipe, key: str) -> tuple[Any, str]:
    """Return the value of a key of the table for this recipe, and its origin."""
    dotted = "batch.effective_batch_size" if key == "effective_batch_size" else f"trainer.{key}"
    value = recipe.batch.effective_batch_size if key == "effective_batch_size" else recipe.trainer.get(key)
    if value is not None:
        return value, recipe.origins[dotted]
    size = size_class_of(recipe)
    return size_classes()[size].ranges[key].start, f"recipes/sizes.yaml, size class {size}"


def scientific(value: float) -> str:
    """Format a rate as in recipes: 2.0e-5."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def override_line(size: str, key: str, value: float) -> str:
    """Return `trainer.KEY=VALUE`, with the `allow_out_of_range` that it needs if the size class would reject it."""
    rate = scientific(value) if key == "learning_rate" else f"{value:g}"
    override, limits = f"trainer.{key}={rate}", size_classes()[size].ranges[key]
    if limits.allows(float(rate)):
        return override
    return f"{override} allow_out_of_range=[{key}] (size class {size} allows {limits.describe()})"


def check_ranges(recipe: Recipe) -> None:
    """Reject values outside the range of the size class, unless `allow_out_of_range` names them.

    Raises:
        ConfigError: no such size class, or a value outside its range.
    """
    size = size_class_of(recipe)
    for key in schema.TABLE_KEYS:
        value, where = hyperparameter(recipe, key)
        limits = size_classes()[size].ranges[key]
        if key not in recipe.allow_out_of_range and not limits.allows(value):
            raise ConfigError(
                f"{where}: {key} of size class {size}: found {value}, expected {limits.describe()}. "
                f"To use it on purpose, set allow_out_of_range=[{key}]"
            )
