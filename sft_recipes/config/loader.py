"""Read and validate recipes: YAML, `key=value` overrides, and the file and line of each value."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.config import schema
from sft_recipes.config.architecture import DENSE_KEYS, LINEAR_LAYERS
from sft_recipes.config.schema import Recipe, did_you_mean
from sft_recipes.config.sizes import COMMAND_LINE, RECIPES, check_ranges
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.paths import REPOSITORY


@dataclass(frozen=True)
class Setting:
    """A value and its origin: `recipes/8b.yaml:12` or `command line`."""

    value: Any
    where: str


def names() -> list[str]:
    """Return the shipped recipes, ordered by the number in their names."""
    recipes = [path.stem for path in RECIPES.glob("*.yaml") if path.stem != "sizes"]
    return sorted(recipes, key=lambda name: (float((re.match(r"\d+", name) or ["0"])[0]), name))


def load(name: str, overrides: Iterable[str] = (), overfit: bool = False) -> Recipe:
    """Read `recipes/NAME.yaml` and apply `key=value` overrides, over the settings of OVERFIT=1 with `overfit`.

    Raises:
        ConfigError: no such recipe, an unknown key, a value of the wrong type or outside the range of its size class.
    """
    settings = dict(_flatten(_read_yaml(_path_of(name))))
    if overfit:
        settings |= {key: Setting(value, schema.OVERFIT) for key, value in schema.OVERFIT_SETTINGS.items()}
    for override in overrides:
        key, text = _split_override(override)
        settings[key] = Setting(text, COMMAND_LINE)
    _drop_invalidated(settings)
    recipe = _build(name, settings)
    check_ranges(recipe)
    return recipe


def _path_of(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(
            f"RECIPE: not a recipe name: found {name!r}, expected letters, digits, - and _, no path: "
            f"one of {', '.join(names())}"
        )
    path = RECIPES / f"{name}.yaml"
    if name == "sizes" or not path.is_file():
        raise ConfigError(
            f"RECIPE: no recipe {name!r}: expected one of {', '.join(names())}{did_you_mean(name, names())}"
        )
    return path


def _display(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def _read_yaml(path: Path) -> yaml.MappingNode:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{_display(path)}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not UTF-8 text"
        raise ConfigError(f"{_display(path)}{line}: not YAML: {problem}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{_display(path)}: empty or not a mapping: expected `key: value` lines. See recipes/tiny.yaml"
        )
    node.start_mark.name = _display(path)
    return node


def _flatten(node: yaml.MappingNode, prefix: str = "", file: str = "") -> Iterator[tuple[str, Setting]]:
    """Yield dotted keys with their values and lines; a duplicate key is an error here, though YAML allows it."""
    file = file or node.start_mark.name
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        where = f"{file}:{key_node.start_mark.line + 1}"
        if key in seen:
            raise ConfigError(f"{where}: duplicate key {key}. Remove one")
        seen.add(key)
        section = key in schema.SECTIONS or key == "trainer"
        if section and isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _flatten(value_node, f"{key}.", file)
        elif section and value_node.tag.endswith(":null"):
            continue
        elif section:
            raise ConfigError(
                f"{where}: {key}: found {_scalar(value_node)!r}, expected a section: "
                f"`{key}:` and below it `  key: value`"
            )
        else:
            yield key, Setting(_scalar(value_node), where)


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _drop_invalidated(settings: dict[str, Setting]) -> None:
    """Drop what the recipe states of data or a model that an override replaces: counts, validation, dimensions."""
    for replaced, invalidated in (
        ("data.validation", ("data.validation_examples",)),
        (
            "data.train",
            ("data.validation", "data.revision", "data.examples", "data.mean_tokens", "data.validation_examples"),
        ),
        ("model.name_or_path", ("model.architecture", "model.revision", "model.license", "model.open_alternative")),
    ):
        if replaced in settings and settings[replaced].where == COMMAND_LINE:
            for key in invalidated:
                if key in settings and settings[key].where != COMMAND_LINE:
                    del settings[key]


def _split_override(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{COMMAND_LINE}: found {override!r}, expected key=value, for example trainer.learning_rate=1.0e-5"
        )
    return key, text


@cache
def _kinds(section: type) -> dict[str, list[str]]:
    """Return the keys of a section and the types of each, such as `["str", "None"]` for `str | None`."""
    fields = dataclasses.fields(section)
    return {field.name: [kind.partition("[")[0] for kind in str(field.type).split(" | ")] for field in fields}


def _build(name: str, settings: Mapping[str, Setting]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {section: {} for section in (*schema.SECTIONS, "trainer", "")}
    for key, setting in settings.items():
        section, _, leaf = key.rpartition(".")
        if section.startswith("model.architecture"):
            raise ConfigError(
                f"{setting.where}: {key}: set all keys of model.architecture together: model.architecture={{{leaf}: …}}"
            )
        if section not in sections or (not section and key in (*schema.SECTIONS, "trainer", "name", "origins")):
            raise ConfigError(f"{setting.where}: unknown key {key}{did_you_mean(key, _known_keys())}")
        sections[section][leaf] = _validate(key, section, leaf, setting)
    for required in ("size", "data.train"):
        if required not in settings or settings[required].value in (None, ""):
            raise ConfigError(f"recipes/{name}.yaml: required key {required} is missing. Add it")
    top = sections.pop("")
    trainer = {**schema.TRAINER_DEFAULTS, **sections.pop("trainer")}
    typed: dict[str, Any] = {
        section: schema.SECTIONS[section](**values) if values or section != "lora" else None
        for section, values in sections.items()
    }
    recipe = Recipe(
        name=name, **top, **typed, trainer=trainer, origins={key: setting.where for key, setting in settings.items()}
    )
    _check_model(recipe)
    _check_lists(recipe)
    return recipe


def _known_keys() -> list[str]:
    keys = [f"{section}.{key}" for section, kind in schema.SECTIONS.items() for key in _kinds(kind)]
    keys += [f"trainer.{key}" for key in _trainer_keys()]
    return keys + [key for key in _kinds(Recipe) if key not in ("name", "origins", "trainer", *schema.SECTIONS)]


def _trainer_keys() -> list[str]:
    allowed = set(schema.trainer_fields()) | set(schema.TABLE_KEYS) - {"effective_batch_size"}
    return sorted(allowed - set(schema.OWNED_BY_THE_PLAN))


def _validate(key: str, section: str, leaf: str, setting: Setting) -> Any:
    """Return the value in the type of its key.

    Raises:
        ConfigError: the key is unknown or set by the plan, or the value has another type or is not one of the choices.
    """
    if section == "trainer":
        if leaf in schema.OWNED_BY_THE_PLAN:
            raise ConfigError(f"{setting.where}: {key} is set by the plan{_hint(schema.OWNED_BY_THE_PLAN[leaf])}")
        if leaf not in _trainer_keys():
            raise ConfigError(f"{setting.where}: unknown key {key}{did_you_mean(leaf, _trainer_keys())}")
        kinds = schema.trainer_fields().get(leaf, ["float"])
    else:
        keys = _kinds(schema.SECTIONS[section] if section else Recipe)
        if leaf not in keys:
            raise ConfigError(f"{setting.where}: unknown key {key}{did_you_mean(key, _known_keys())}")
        kinds = keys[leaf]
    value = _coerce(key, kinds, _parse(setting, kinds))
    choices = schema.CHOICES.get(key)
    if key == "model.attention" and "/" in str(value) and not schema.KERNEL.fullmatch(str(value)):
        raise ConfigError(
            f"{setting.where}: {key}: kernel without a commit: found {value!r}, expected "
            f"owner/name@<40 hexadecimal digits of its commit>, because a kernel is code"
        )
    if choices and value is not None and value not in choices and "/" not in str(value):
        raise ConfigError(
            f"{setting.where}: {key}: found {value!r}, expected one of {', '.join(choices)}"
            f"{did_you_mean(str(value), choices)}"
        )
    _check_bounds(key, value, setting.where)
    return value


def _hint(owner: str) -> str:
    """Return the key or variable to set instead, or why the field is fixed."""
    return f" ({owner})" if owner.startswith("fixed: ") else f". Set {owner} instead"


def _parse(setting: Setting, kinds: list[str]) -> Setting:
    """Parse a value of the command line as YAML, like a recipe's; keep text unchanged."""
    if setting.where != COMMAND_LINE:
        return setting
    if not setting.value:
        return Setting(None, COMMAND_LINE)
    brackets = {"list": "[", "dict": "{"}
    structured = any(kind in kinds and setting.value.startswith(bracket) for kind, bracket in brackets.items())
    if "str" in kinds and not structured:
        return setting
    try:
        return Setting(yaml.safe_load(setting.value), COMMAND_LINE)
    except (yaml.YAMLError, ValueError):
        return setting


def _coerce(key: str, kinds: list[str], setting: Setting) -> Any:
    value = setting.value
    if isinstance(value, str) and "float" in kinds and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 2e-5 as text: it needs a dot and a sign
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{setting.where}: {key}: found {value}, expected a finite number")
    if type(value).__name__ in kinds or (value is None and "None" in kinds):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and "float" in kinds:
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and set(kinds) <= {"str", "None"}:
        return str(value)
    expected = " or ".join(_KIND_NAMES[kind] for kind in kinds if kind != "None")
    raise ConfigError(f"{setting.where}: {key}: found {value!r}, expected {expected}")


_KIND_NAMES = {
    "str": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
}
# Lowest and highest values; the highest of a batch only keeps the arithmetic finite.
_BOUNDS: dict[str, tuple[float, float]] = {
    "batch.effective_batch_size": (1, 100_000),
    "batch.max_per_device_batch_size": (1, 100_000),
    "batch.min_optimizer_steps": (1, math.inf),
    "hardware.gpus": (0, 100_000),
    "hardware.nodes": (1, 100_000),
    "hardware.mfu": (0.01, 1),
    "lora.r": (1, 100_000),
    "lora.alpha": (1, math.inf),
    "lora.dropout": (0, 0.99),
    "data.max_eval_samples": (1, math.inf),
    "data.examples": (1, math.inf),
    "data.mean_tokens": (1, math.inf),
    "data.max_dropped_fraction": (0, 1),
    "data.max_overlap": (0, 1),
    "data.overfit_rows": (1, 1000),
    "data.max_rejected_fraction": (0, 1),
    "data.validation_fraction": (0.0001, 0.9999),
    "generation.show": (0, 1000),
    "generation.exact_match": (0, 1000),
    "generation.max_new_tokens": (1, math.inf),
    "trainer.seed": (0, 2**32 - 1),
    "trainer.data_seed": (0, 2**32 - 1),
    "trainer.max_length": (1, math.inf),
    "trainer.num_train_epochs": (0.001, 10_000),
    "trainer.learning_rate": (1e-12, 10),
    "trainer.warmup_ratio": (0, 1),
    "trainer.weight_decay": (0, 10),
    "data.validation_examples": (1, math.inf),
    "trainer.eval_steps": (1, math.inf),
    "trainer.save_steps": (1, math.inf),
    "trainer.logging_steps": (1, math.inf),
    "monitor.overfitting_gap": (0, math.inf),
    "monitor.grad_norm_above": (0, math.inf),
    "monitor.grad_norm_below": (0, math.inf),
    "monitor.loss_spike": (1, math.inf),
    "monitor.throughput_drop": (0, 1),
    "monitor.plateau": (0, 1),
    "monitor.data_wait": (0, 1),
    "monitor.memory_growth": (0, math.inf),
    "monitor.rank_lag": (0, math.inf),
    "monitor.window": (2, 10_000),
    "monitor.early_stopping_patience": (1, math.inf),
    "monitor.heartbeat_timeout_seconds": (1, math.inf),
    "monitor.replica_check_steps": (1, math.inf),
}
_OPTIONAL = {
    "batch.effective_batch_size",
    "data.examples",
    "data.mean_tokens",
    "data.overfit_rows",
    "data.max_eval_samples",
    "data.validation_examples",
    "monitor.early_stopping_patience",
}
_INTEGERS = {
    "trainer.eval_steps",
    "trainer.save_steps",
    "trainer.logging_steps",
}  # transformers reads a fraction as a ratio of all steps


def _check_bounds(key: str, value: Any, where: str) -> None:
    if key not in _BOUNDS or (value is None and key in _OPTIONAL):
        return
    lowest, highest = _BOUNDS[key]
    if value is None or not lowest <= value <= highest:
        expected = f"at least {lowest:g}" if highest == math.inf else f"{lowest:g} to {highest:g}"
        raise ConfigError(f"{where}: {key}: found {value}, expected {expected}")
    if key in _INTEGERS and value != int(value):
        raise ConfigError(f"{where}: {key}: found {value}, expected an integer number of steps")


def _check_model(recipe: Recipe) -> None:
    model, where = recipe.model, recipe.origins.get("model.from_scratch", f"recipes/{recipe.name}.yaml")
    if model.from_scratch and model.name_or_path:
        if recipe.origins.get("model.name_or_path") == COMMAND_LINE:
            raise ConfigError(
                f"{COMMAND_LINE}: {recipe.name} builds its model from scratch. Add model.from_scratch=false "
                f"to start from {model.name_or_path}"
            )
        raise ConfigError(f"{where}: model.from_scratch and model.name_or_path are both set. Remove one")
    if not model.from_scratch and not model.name_or_path:
        raise ConfigError(
            f"recipes/{recipe.name}.yaml: model.name_or_path is missing. Set a Hub name or a local folder"
        )
    _check_architecture(model.architecture, recipe.origins.get("model.architecture", where))
    if recipe.lora and recipe.lora.experts and recipe.lora.dropout:
        raise ConfigError(
            f"{recipe.origins.get('lora.dropout', where)}: lora.dropout: found {recipe.lora.dropout:g}, expected 0 "
            f"with lora.experts, whose adapters have no dropout. Set lora.dropout=0"
        )
    if recipe.lora:
        _check_targets(recipe.lora.target_modules, recipe.origins.get("lora.target_modules", where))
    if model.from_scratch and not model.architecture:
        raise ConfigError(
            f"{where}: model.from_scratch needs model.architecture. Add the numbers of the model's config"
        )


def _check_lists(recipe: Recipe) -> None:
    """Check the lists of names, and settings that exclude each other."""
    for key, names in (
        ("data.train", schema.source_paths(recipe.data.train)),
        ("data.validation", schema.source_paths(recipe.data.validation)),
        ("data.ignore_columns", recipe.data.ignore_columns),
        ("model.add_tokens", recipe.model.add_tokens),
    ):
        where = recipe.origins.get(key, f"recipes/{recipe.name}.yaml")
        if not all(isinstance(name, str) and name.strip() for name in names) or (key == "data.train" and not names):
            raise ConfigError(f"{where}: {key}: found {names!r}, expected names such as [a.jsonl, b.jsonl]")
    _check_sources(recipe)
    if recipe.data.overfit_rows and (recipe.data.validation or recipe.data.retention_eval):
        key = "data.validation" if recipe.data.validation else "data.retention_eval"
        raise ConfigError(
            f"{recipe.origins[key]}: {key}: found {getattr(recipe.data, key[5:])}, expected none with OVERFIT, which "
            f"validates on the training rows. Leave one of the two out"
        )
    unknown = [name for name in recipe.monitor.stop_on if name not in schema.STOPPING_GUARDS]
    if unknown:
        raise ConfigError(
            f"{recipe.origins.get('monitor.stop_on')}: monitor.stop_on: found {unknown[0]!r}, expected some of "
            f"{', '.join(schema.STOPPING_GUARDS)}"
        )
    if recipe.monitor.grad_norm_below >= recipe.monitor.grad_norm_above:
        origin = recipe.origins.get("monitor.grad_norm_below") or recipe.origins.get("monitor.grad_norm_above")
        raise ConfigError(
            f"{origin}: monitor.grad_norm_below: found {recipe.monitor.grad_norm_below:g}, expected less than "
            f"monitor.grad_norm_above, {recipe.monitor.grad_norm_above:g}"
        )
    if recipe.lora and recipe.model.add_tokens:
        raise ConfigError(
            f"{recipe.origins.get('model.add_tokens')}: model.add_tokens adds embeddings, which LoRA does not train. "
            f"Use a chat template whose special tokens the tokenizer has, or full fine-tuning"
        )


def _check_sources(recipe: Recipe) -> None:
    """Check the entries of `data.train` and `data.validation` that have keys, and every column mapping."""
    data = recipe.data
    kinds = _kinds(schema.DataSource)
    for part, entries in (("data.train", data.train), ("data.validation", data.validation)):
        where = recipe.origins.get(part, "")
        for entry in entries if isinstance(entries, list) else []:
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if key not in kinds:
                    raise ConfigError(f"{where}: {part}: unknown key {key}{did_you_mean(str(key), kinds)}")
                _coerce(f"{part}: {key}", kinds[key], Setting(value, where))
                if key == "columns":
                    _check_columns(value, f"{where}: {part}: columns")
                if key == "chat_template_kwargs":
                    _check_template_kwargs(value, f"{where}: {part}")
                if key == "weight" and (part != "data.train" or not 0 < value <= 100):
                    expected = "a number above 0, at most 100" if part == "data.train" else "no weight"
                    raise ConfigError(f"{where}: {part}: weight: found {value}, expected {expected}")
    _check_columns(data.columns, f"{recipe.origins.get('data.columns')}: data.columns")
    _check_template_kwargs(data.chat_template_kwargs, f"{recipe.origins.get('data.chat_template_kwargs')}: data")


def _check_template_kwargs(given: Mapping[str, Any], where: str) -> None:
    if reserved := schema.RESERVED_TEMPLATE_VARIABLES & set(given):
        raise ConfigError(f"{where}.chat_template_kwargs: found {min(reserved)}, which is set for each row. Remove it")


def _check_columns(columns: Mapping[str, Any], where: str) -> None:
    for target, template in columns.items():
        if target not in schema.COLUMN_TARGETS:
            known = ", ".join(schema.COLUMN_TARGETS)
            raise ConfigError(f"{where}: found the target {target!r}, expected one of {known}")
        try:
            names = [name for _, name in schema.column_pieces(template) if name]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}.{target}: not a format string: {error}. Example: '{{question}}'") from error
        if not names and target not in ("system", "prompt"):
            raise ConfigError(f"{where}.{target}: found {template!r}, expected a column name in braces: '{{answer}}'")
    if columns and not ({"prompt", "completion"} <= columns.keys() or {"messages", "conversations"} & columns.keys()):
        raise ConfigError(f"{where}: found {', '.join(columns)}, expected prompt and completion, or messages")


def _check_architecture(architecture: Mapping[str, Any], where: str) -> None:
    """Check the numbers that forecasts use; transformers checks the others."""
    for key in (*DENSE_KEYS, "num_key_value_heads", "head_dim"):
        value = architecture.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{where}: model.architecture.{key}: found {value!r}, expected an integer of at least 1")
    for key in ("tie_word_embeddings", "attention_bias"):
        if not isinstance(architecture.get(key, False), bool):
            raise ConfigError(f"{where}: model.architecture.{key}: found {architecture[key]!r}, expected true or false")
    heads, hidden = architecture.get("num_attention_heads"), architecture.get("hidden_size")
    if heads and hidden and not architecture.get("head_dim") and hidden % heads:
        raise ConfigError(
            f"{where}: model.architecture.hidden_size: found {hidden}, expected a multiple of num_attention_heads "
            f"{heads}. Set head_dim"
        )


def _check_targets(targets: str | list[Any], where: str) -> None:
    if targets != "all-linear" and (isinstance(targets, str) or not targets or set(targets) - set(LINEAR_LAYERS)):
        raise ConfigError(
            f"{where}: lora.target_modules: found {targets!r}, expected all-linear or a list of "
            f"{', '.join(LINEAR_LAYERS)}"
        )
