"""The hyperparameter table (recipes/sizes.yaml): size classes and their ranges; the size class of a recipe."""

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
class HyperparameterRange:
    """The values of a hyperparameter that a size class allows, and its default."""

    start: Any
    range: list[float] | None
    one_of: tuple[str, ...]

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
            ranges={
                key: HyperparameterRange(
                    values[key]["start"], values[key].get("range"), tuple(values[key].get("one_of", ()))
                )
                for key in schema.TABLE_KEYS
            },
        )
        for name, values in table.items()
    }


def size_class_of(recipe: Recipe) -> str:
    """Return the size class of a recipe's `size`: by name, or the nearest to a number of parameters such as `20b`.

    Raises:
        ConfigError: no such size class, one for another method or model size, or a size far from all of them.
    """
    where, classes = recipe.origins["size"], size_classes()
    method = "lora" if recipe.lora else "full"
    number = re.fullmatch(r"(\d+(?:\.\d+)?)[bB]", recipe.size)
    if number and float(number[1]) > 0:
        nearest = nearest_size_class(float(number[1]), method)
        if classes[nearest].distance(float(number[1])) <= MAX_DISTANCE:
            _check_size(recipe, nearest, method)
            return nearest
        raise ConfigError(
            f"{where}: size: found {recipe.size}, expected at most {MAX_DISTANCE:g} times beyond a size class for "
            f"{method} fine-tuning. Set size to one of {', '.join(_names(method))} and the values that differ"
        )
    if recipe.size not in classes:
        raise ConfigError(
            f"{where}: size: found {recipe.size!r}, expected a number of parameters such as 20b or a size class of "
            f"recipes/sizes.yaml: {', '.join(classes)}{did_you_mean(recipe.size, classes)}"
        )
    if classes[recipe.size].method != method and recipe.size != "tiny":
        sections = "no lora section, expected one" if method == "full" else "a lora section, expected none"
        raise ConfigError(
            f"{where}: size class {recipe.size} is for {classes[recipe.size].method} fine-tuning: found {sections}. "
            f"Set size: {' or '.join(_names(method))}"
        )
    _check_size(recipe, recipe.size, method)
    return recipe.size


MAX_DISTANCE = 2.0  # times beyond the nearest size class


def _names(method: str) -> list[str]:
    return [name for name, size in size_classes().items() if size.method == method and name != "tiny"]


def nearest_size_class(billions: float, method: str) -> str:
    """Return the size class for a model with this number of parameters, in billions."""
    return min(_names(method), key=lambda name: size_classes()[name].distance(billions))


def _check_size(recipe: Recipe, size: str, method: str) -> None:
    """Reject a size class that does not fit `model.architecture`, unless the latter is from the command line."""
    parameters = parameter_count(recipe.model.architecture)
    if parameters is None or recipe.origins.get("model.architecture") == COMMAND_LINE:
        return
    nearest = nearest_size_class(parameters / 1e9, method)
    if size == "tiny" and size_classes()[size].distance(parameters / 1e9) <= MAX_DISTANCE:
        return
    if nearest != size:
        raise ConfigError(
            f"{recipe.origins['size']}: size: found {recipe.size} (size class {size}), expected {nearest}: "
            f"model.architecture has {parameters / 1e9:.1f} billion parameters. Set size: {nearest}"
        )


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
    for key in map(str, recipe.allow_out_of_range):
        if key not in schema.TABLE_KEYS:
            raise ConfigError(
                f"{recipe.origins['allow_out_of_range']}: allow_out_of_range: found {key!r}, expected some of "
                f"{', '.join(schema.TABLE_KEYS)}{did_you_mean(key, schema.TABLE_KEYS)}"
            )
    for key in schema.TABLE_KEYS:
        value, where = hyperparameter(recipe, key)
        limits = size_classes()[size].ranges[key]
        if key not in recipe.allow_out_of_range and not limits.allows(value):
            raise ConfigError(
                f"{where}: {key} of size class {size}: found {value}, expected {limits.describe()}. "
                f"To use it on purpose, set allow_out_of_range=[{key}]"
            )
