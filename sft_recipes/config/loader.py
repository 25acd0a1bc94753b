"""Read and validate recipes: YAML, `key=value` overrides, and the file and line of each value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sft_recipes.config import schema
from sft_recipes.config.architecture import DENSE_KEYS, is_dense_kind
from sft_recipes.config.schema import Recipe, did_you_mean
from sft_recipes.config.sizes import COMMAND_LINE, MODEL, RECIPES, check_ranges
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


def load(
    name: str,
    overrides: Iterable[str] = (),
    overfit: bool = False,
    model: Mapping[str, Any] | None = None,
    from_file: bool = True,
) -> Recipe:
    """Read `recipes/NAME.yaml` and apply `key=value` overrides, over the settings of OVERFIT=1 with `overfit`.

    Args:
        model: values of MODEL, which replace the recipe's; all values without `from_file`.

    Raises:
        ConfigError: no such recipe, an unknown key, a value of the wrong type or outside the range of its size class.
    """
    if from_file and name not in names():
        raise ConfigError(
            f"RECIPE: no recipe {name!r}: expected one of {', '.join(names())}{did_you_mean(name, names())}"
        )
    settings = _read(RECIPES / f"{name}.yaml") if from_file else {}
    if model:
        settings |= {key: Setting(value, MODEL) for key, value in model.items()}
        _drop_invalidated(settings, MODEL)
    if overfit:
        settings |= {key: Setting(value, schema.OVERFIT) for key, value in schema.defaults()["overfit"].items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{COMMAND_LINE}: found {override!r}, expected key=value")
        settings[key] = Setting(_parse(key, text), COMMAND_LINE)
    _drop_invalidated(settings, COMMAND_LINE)
    recipe = _build(name, settings)
    _check_sources(recipe)
    _check_combinations(recipe)
    check_ranges(recipe)
    return recipe


class _Yaml(yaml.SafeLoader):
    """YAML in which a key is unique, and 2e-5 is a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"duplicate key {name}. Remove one"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(path: Path) -> dict[str, Setting]:
    """Return the values of a file by dotted key."""
    file = str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)
    try:
        loader = _Yaml(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        content = root and loader.construct_document(root)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict) or root is None:
        raise ConfigError(f"{file}: empty or not a mapping: expected `key: value` lines. See recipes/tiny.yaml")
    settings = {}
    for key_node, value_node in root.value:
        key, where = key_node.value, f"{file}:{key_node.start_mark.line + 1}"
        value = content.get(key)
        if key not in (*schema.SECTIONS, "trainer"):
            settings[str(key)] = Setting(value, where)
        elif isinstance(value, dict) and value:
            for inner, _ in value_node.value:
                line = f"{file}:{inner.start_mark.line + 1}"
                settings[f"{key}.{inner.value}"] = Setting(value.get(inner.value), line)
        elif value is not None:
            raise ConfigError(
                f"{where}: {key}: found {value!r}, expected a section: `{key}:` and below it `  key: value`"
            )
    return settings


def _parse(key: str, text: str) -> Any:
    """Parse a value of the command line as YAML; keep it where its key takes text."""
    try:
        value = yaml.load(text, _Yaml)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if value is None or (text[0] in "[{" and isinstance(value, (list, dict))):
        return value
    try:
        return _validate("", key, text, schema.key_types())
    except ConfigError:
        return value


def _drop_invalidated(settings: dict[str, Setting], where: str) -> None:
    """Drop what the recipe states of data or a model that `where` replaces: counts, validation, dimensions."""
    of_data = ("data.validation", "data.revision", "data.examples", "data.mean_tokens", "data.validation_examples")
    of_model = ("model.architecture", "model.revision", "model.license", "model.open_alternative")
    replaced = {"data.validation": of_data[-1:], "data.train": of_data, "model.name_or_path": of_model}
    given = {key for key, setting in settings.items() if setting.where == where}
    for key in given & replaced.keys():
        for invalid in set(replaced[key]) - given:
            settings.pop(invalid, None)


def _build(name: str, settings: Mapping[str, Setting]) -> Recipe:
    """Validate each value by itself."""
    types = schema.key_types()
    sections: dict[str, dict[str, Any]] = {section: {} for section in (*schema.SECTIONS, "trainer", "")}
    for key, setting in settings.items():
        section, _, leaf = key.rpartition(".")
        if section == "trainer" and (owner := schema.owned_trainer_fields().get(leaf)):
            fix = f" ({owner})" if owner.startswith("fixed: ") else f". Set {owner} instead"
            raise ConfigError(f"{setting.where}: {key} is set by the plan{fix}")
        sections[section][leaf] = _validate(f"{setting.where}: ", key, setting.value, types)
    for required in ("size", "data.train"):
        if required not in settings or settings[required].value in (None, ""):
            raise ConfigError(f"recipes/{name}.yaml: required key {required} is missing. Add it")
    top, trainer = sections.pop(""), sections.pop("trainer")
    typed: dict[str, Any] = {
        section: schema.SECTIONS[section](**values) if values or section != "lora" else None
        for section, values in sections.items()
    }
    origins = {key: setting.where for key, setting in settings.items()}
    return Recipe(name=name, **top, **typed, trainer=schema.defaults()["trainer"] | trainer, origins=origins)


def _validate(prefix: str, key: str, value: Any, types: Mapping[str, Any]) -> Any:
    """Return the value in the type of its key.

    Raises:
        ConfigError: the key is unknown, or the value has another type or is out of bounds.
    """
    if key not in types:
        section, _, leaf = key.rpartition(".")
        siblings = [name.removeprefix(f"{section}.") for name in types if section and name.startswith(f"{section}.")]
        near = did_you_mean(leaf, siblings) if siblings else did_you_mean(key, types)
        raise ConfigError(f"{prefix}unknown key {key}{near}")
    try:
        return TypeAdapter(types[key], config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
        deepest = max(errors, key=lambda error: len(error["loc"]))
        inner = [part for part in deepest["loc"] if isinstance(part, str)] if len(errors) == 1 else []
        place = prefix + ".".join([key, *inner])
        if deepest["type"] == "value_error":
            raise ConfigError(f"{place}: {deepest['ctx']['error']}") from None
        texts = (error["msg"] for error in errors if error["input"] is deepest["input"])
        expected = " or ".join(
            re.sub(r"^(Input should be|\w+ should have) ", "", text) for text in dict.fromkeys(texts)
        )
        expected = expected.replace("String should match", "text of the")
        raise ConfigError(f"{place}: found {deepest['input']!r}, expected {expected}") from None


def _check_sources(recipe: Recipe) -> None:
    """Check the sources that have keys, and the dimensions that forecasts use; transformers checks the others."""
    types = get_type_hints(schema.DataSource, include_extras=True)
    for part in ("train", "validation"):
        entries = getattr(recipe.data, part)
        for entry in entries if isinstance(entries, list) else []:
            for key, value in ({"path": None} | entry).items() if isinstance(entry, dict) else ():
                _validate(f"{recipe.origins[f'data.{part}']}: data.{part}: ", key, value, types)
    integers = dict.fromkeys((*DENSE_KEYS, "num_key_value_heads", "head_dim"), schema.Count)
    dimensions: dict[str, Any] = integers | {"tie_word_embeddings": bool, "attention_bias": bool}
    dense = is_dense_kind(recipe.model.architecture)
    for key in dimensions.keys() & recipe.model.architecture.keys() if dense else ():
        if (value := recipe.model.architecture[key]) is not None:
            _validate(f"{recipe.origins['model.architecture']}: model.architecture.", key, value, dimensions)


def _check_combinations(recipe: Recipe) -> None:
    """Reject settings that exclude each other."""
    model, data, monitor, lora = recipe.model, recipe.data, recipe.monitor, recipe.lora
    heads, hidden = (model.architecture.get(key) for key in ("num_attention_heads", "hidden_size"))
    has_weight = any(isinstance(entry, dict) and "weight" in entry for entry in data.validation or ())
    overfit = data.overfit_rows and "expected none with OVERFIT, which validates on the training rows. Remove one"
    above, below, dropout = monitor.grad_norm_above, monitor.grad_norm_below, lora and lora.experts and lora.dropout
    fixed = heads and hidden and not model.architecture.get("head_dim") and hidden % heads
    built = f"found {model.name_or_path}, but {recipe.name} builds its model from scratch. Add model.from_scratch=false"
    no_name, no_size = not model.name_or_path, not model.architecture
    rejected = (
        (data.train == [], "data.train", "found no source, expected names such as [a.jsonl, b.jsonl]"),
        (has_weight, "data.validation", "weight: found one, expected none: only training rows have weights. Remove it"),
        (overfit and data.validation, "data.validation", f"found {data.validation}, {overfit}"),
        (overfit and data.retention_eval, "data.retention_eval", f"found {data.retention_eval}, {overfit}"),
        (model.from_scratch and not no_name, "model.name_or_path", built),
        (no_name and not model.from_scratch, "model.name_or_path", "missing. Set a Hub name or a local folder"),
        (model.from_scratch and no_size, "model.from_scratch", "needs the numbers of a config in model.architecture"),
        (fixed, "model.architecture", f"hidden_size: found {hidden}, expected a multiple of {heads} heads"),
        (lora and model.add_tokens, "model.add_tokens", "adds embeddings, which LoRA does not train. Remove lora"),
        (dropout, "lora.dropout", f"found {dropout}, expected 0 with lora.experts, whose adapters have no dropout"),
        (below >= above, "monitor.grad_norm_below", f"found {below:g}, expected less than grad_norm_above, {above:g}"),
    )
    for applies, key, text in rejected:
        if applies:
            raise ConfigError(f"{recipe.origins.get(key, f'recipes/{recipe.name}.yaml')}: {key}: {text}")
