"""Make a recipe for a model: its number of parameters gives the size class, and the plan chooses the rest."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.config import schema
from sft_recipes.config.schema import Recipe
from sft_recipes.config.sizes import hyperparameter, nearest_size_class
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.paths import REPOSITORY

_SMALL = 0.5e9  # parameters; above it saves and evaluations take long, below it people try things out
_LARGE = 4e9  # parameters; above it a save takes minutes
_OUTPUTS = re.compile(r"final|last|merged|best-\d+|checkpoint-\d+")  # folders of a run, named after it


def default_data() -> dict[str, Any]:
    """Return the dataset of a shipped recipe by dotted key, for a recipe without DATA."""
    recipe = yaml.safe_load((REPOSITORY / "recipes" / "8b.yaml").read_text(encoding="utf-8"))
    return {f"data.{key}": value for key, value in recipe["data"].items()}


def name_of(model: str, method: str) -> str:
    """Return a name for the recipe of a model: `qwen3-8b-lora` for Qwen/Qwen3-8B, the run's for a run's folder."""
    parts = [part for part in Path(model).parts if not _OUTPUTS.fullmatch(part)]
    slug = re.sub(r"[^a-z0-9]+", "-", (parts or [model])[-1].lower()).strip("-")
    return (slug or "model") + ("" if method == "full" else f"-{method}")


def settings(
    name_or_path: str, parameters: int, positions: int | None, architecture: dict[str, Any], method: str, gpus: int
) -> dict[str, Any]:
    """Return the values of a recipe for a model, by dotted key.

    Args:
        parameters: number of weights.
        positions: context length of the model, if it is known.
        architecture: dimensions for the memory forecast, if they are known.
    """
    billions, kind = parameters / 1e9, "full" if method == "full" else "lora"
    values: dict[str, Any] = {
        "size": nearest_size_class(billions, kind),
        "model.name_or_path": name_or_path,
        "precision": "bf16" if gpus else "fp32",
        "trainer.max_length": min(schema.defaults()["trainer"]["max_length"], positions or 1 << 20),
    }
    values |= {"model.architecture": architecture} if architecture else {}
    values |= {"lora.r": 16, "lora.alpha": 32} if kind == "lora" else {}
    values |= {"lora.quantize": "nf4"} if method == "qlora" else {}
    if parameters > _SMALL:
        steps = 500 if parameters < _LARGE else 1000
        return values | {"data.max_eval_samples": 1000, "trainer.eval_steps": steps, "trainer.save_steps": 2 * steps}
    return values | {"batch.min_optimizer_steps": 1, "trainer.packing": False}  # a few short rows are enough


def check_method(method: str, model: str, quantization: str | None) -> None:
    """Reject quantized weights, which no method can train.

    Raises:
        ConfigError: with the method to use.
    """
    if quantization:
        raise ConfigError(
            f"MODEL: {model} has quantized weights ({quantization}), which METHOD={method} cannot train. Name the "
            f"unquantized model; METHOD=qlora quantizes it while loading"
        )


_ORDER = ("size", "hardware", "precision", "parallelism", "model", "lora", "data", "batch", "trainer")
_COMMENTS = {
    "size": "rate {learning_rate:g}, batch {effective_batch_size}, epochs {num_train_epochs:g}: recipes/sizes.yaml",
    "model.architecture": "from its config.json, for forecasts",
    "data.train": "a file, a folder, a Hub dataset, or a list",
    "data.max_eval_samples": "keeps evaluation short",
    "trainer.max_length": "tokens; longer examples are cut off",
    "batch.min_optimizer_steps": "a few rows are enough to try it",
}


def to_yaml(recipe: Recipe, title: str, choice: dict[str, Any]) -> str:
    """Return what a recipe sets as a file with comments.

    Args:
        title: first lines, as comments.
        choice: values by key that the plan chooses on this hardware, as comments to pin them.
    """
    table = {key: hyperparameter(recipe, key)[0] for key in schema.TABLE_KEYS}
    lines = [f"# {line}" for line in title.splitlines()]
    sections = dataclasses.asdict(recipe)
    for name in _ORDER:
        keys = [key for key in (*recipe.origins, *choice) if key.partition(".")[0] == name]
        if keys not in ([], [name]):
            lines.append(f"# {name}:" if choice.keys() >= set(keys) else f"{name}:")
        for key in keys:
            comment = _COMMENTS.get(key, "").format(**table)
            section, _, leaf = key.rpartition(".")
            value = choice.get(key, (sections[section] if section else sections)[leaf])
            first, *more = yaml.safe_dump({leaf: value}, sort_keys=False, width=1000).splitlines()
            if key in choice:
                first, comment = f"# {first}", "chosen by the plan; uncomment to pin it"
            first = f"{first:<34} # {comment}" if comment else first
            lines += [("  " if section else "") + line for line in (first, *more)]
    return "\n".join(lines) + "\n"
