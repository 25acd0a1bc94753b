"""Make a recipe for a model: its number of parameters gives the size class, and the plan chooses the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.config import schema
from sft_recipes.config.schema import Recipe
from sft_recipes.config.sizes import hyperparameter, nearest_size_class, scientific
from sft_recipes.runtime.errors import ConfigError

METHODS = ("full", "lora", "qlora")
# Rows of the shipped recipes' dataset, for a recipe without DATA.
DEFAULT_DATA: dict[str, Any] = {
    "data.train": "HuggingFaceH4/ultrachat_200k:train_sft",
    "data.validation": "HuggingFaceH4/ultrachat_200k:test_sft",
    "data.revision": "8049631c405ae6576f93f445c6b8166f76f5505a",
    "data.examples": 207865,
    "data.validation_examples": 23110,
    "data.mean_tokens": 1374,
}
_SMALL = 0.5e9  # parameters; above it saves and evaluations take long, below it people try things out
_LARGE = 4e9  # parameters; above it a save takes minutes
_OUTPUTS = re.compile(r"final|last|merged|best-\d+|checkpoint-\d+")  # folders of a run, named after it


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
        "trainer.max_length": min(schema.TRAINER_DEFAULTS["max_length"], positions or 1 << 20),
    }
    values |= {"model.architecture": architecture} if architecture else {}
    values |= {"lora.r": 16, "lora.alpha": 32} if kind == "lora" else {}
    values |= {"lora.quantize": "nf4"} if method == "qlora" else {}
    if parameters > _SMALL:
        steps = 500 if parameters < _LARGE else 1000
        return values | {"data.max_eval_samples": 1000, "trainer.eval_steps": steps, "trainer.save_steps": 2 * steps}
    return values | {"batch.min_optimizer_steps": 1, "trainer.packing": False}  # a few short rows are enough


def check_method(method: str, model: str, quantization: str | None) -> None:
    """Reject an unknown method, and one that cannot train a model's quantized weights.

    Raises:
        ConfigError: with the method to use.
    """
    if method not in METHODS:
        raise ConfigError(f"METHOD: found {method!r}, expected one of {', '.join(METHODS)}")
    if quantization:
        raise ConfigError(
            f"MODEL: {model} has quantized weights ({quantization}), which METHOD={method} cannot train. Name the "
            f"unquantized model; METHOD=qlora quantizes it while loading"
        )


_ORDER = ("size", "hardware", "precision", "parallelism", "model", "lora", "data", "batch", "trainer")
_COMMENTS = {
    "size": "learning rate {rate}, batch {batch}, {epochs} epoch(s): recipes/sizes.yaml",
    "precision": "bf16 on GPUs, fp32 on the CPU",
    "model.revision": "the commit that its files were read at",
    "model.architecture": "from its config.json, for forecasts",
    "data.train": "a file, a folder, a Hub dataset, or a list",
    "data.max_eval_samples": "keeps evaluation short",
    "trainer.max_length": "tokens; longer examples are cut off",
    "trainer.eval_steps": "optimizer steps",
    "trainer.packing": "a small model: one example per row",
    "lora.quantize": "4-bit frozen weights",
    "batch.min_optimizer_steps": "a few rows are enough to try it",
}


def to_yaml(recipe: Recipe, title: str, choice: dict[str, Any]) -> str:
    """Return what a recipe sets as a file with comments.

    Args:
        title: first lines, as comments.
        choice: values by key that the plan chooses on this hardware, as comments to pin them.
    """
    keys = ("learning_rate", "effective_batch_size", "num_train_epochs")
    rate, size, epochs = (hyperparameter(recipe, key)[0] for key in keys)
    table = {"rate": scientific(rate), "batch": size, "epochs": epochs}
    lines = [f"# {line}" for line in title.splitlines()]
    sections: dict[str, list[str]] = {name: [] for name in _ORDER}
    for key in [*recipe.origins, *choice]:
        section, _, leaf = key.rpartition(".")
        holder = getattr(recipe, section) if section else recipe
        value = choice[key] if key in choice else holder[leaf] if isinstance(holder, dict) else getattr(holder, leaf)
        text = yaml.safe_dump({leaf: value}, sort_keys=False, width=1000).rstrip("\n")
        comment = "chosen by the plan; uncomment to pin it" if key in choice else _COMMENTS.get(key, "").format(**table)
        first, *more = text.splitlines()
        first = f"# {first}" if key in choice else first
        indented = [
            ("  " if section else "") + line for line in [f"{first:<34} # {comment}" if comment else first, *more]
        ]
        sections[section or leaf] += indented
    for name, body in sections.items():
        if body and name in (*schema.SECTIONS, "trainer"):
            only_comments = all(line.lstrip().startswith("#") for line in body)
            lines.append(f"# {name}:" if only_comments else f"{name}:")
        lines += body
    return "\n".join(lines) + "\n"
