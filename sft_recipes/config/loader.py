"""Finds a recipe, reads it strictly, lays the user's `key=value` over it, and keeps where each value was written."""

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
class Written:
    """A value and the place where somebody wrote it, such as `recipes/8b.yaml:12` or `command line`."""

    value: Any
    where: str


def names() -> list[str]:
    """Every shipped recipe, smallest model first as the names sort by their number."""
    found = [path.stem for path in RECIPES.glob("*.yaml") if path.stem != "sizes"]
    return sorted(found, key=lambda name: (float((re.match(r"\d+", name) or ["0"])[0]), name))


def load(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Reads `recipes/NAME.yaml` and lays `key=value` overrides over it.

    Raises:
        ConfigError: no such recipe, an unknown key, a value of the wrong type or outside its row's range.
    """
    written = dict(_flatten(_read_yaml(_path_of(name))))
    for override in overrides:
        key, text = _split_override(override)
        written[key] = Written(text, COMMAND_LINE)
    _drop_what_an_override_makes_untrue(written)
    recipe = _build(name, written)
    check_ranges(recipe)
    return recipe


def _path_of(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(
            f"RECIPE: {name!r} is not the name of a recipe (letters, digits, - and _, no path); "
            f"there are: {', '.join(names())}"
        )
    path = RECIPES / f"{name}.yaml"
    if name == "sizes" or not path.is_file():
        raise ConfigError(f"RECIPE: no recipe {name!r}{did_you_mean(name, names())}; there are: {', '.join(names())}")
    return path


def _shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def _read_yaml(path: Path) -> yaml.MappingNode:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{_shown(path)}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not UTF-8 text"
        raise ConfigError(f"{_shown(path)}{line}: not YAML: {problem}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{_shown(path)}: empty or not a mapping; a recipe is `key: value` lines, see recipes/tiny.yaml"
        )
    node.start_mark.name = _shown(path)
    return node


def _flatten(node: yaml.MappingNode, prefix: str = "", file: str = "") -> Iterator[tuple[str, Written]]:
    """Dotted keys with their values and lines; a key written twice is an error that YAML itself lets pass."""
    file = file or node.start_mark.name
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        where = f"{file}:{key_node.start_mark.line + 1}"
        if key in seen:
            raise ConfigError(f"{where}: {key} is written twice; remove one")
        seen.add(key)
        section = key in schema.SECTIONS or key == "trainer"
        if section and isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _flatten(value_node, f"{key}.", file)
        elif section and value_node.tag.endswith(":null"):
            continue
        elif section:
            raise ConfigError(
                f"{where}: {key} is {_scalar(value_node)!r}; wanted keys below it, `{key}:` and then `  key: value`"
            )
        else:
            yield key, Written(_scalar(value_node), where)


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _drop_what_an_override_makes_untrue(written: dict[str, Written]) -> None:
    """Other data than the recipe's has other counts and another validation; another model, other dimensions."""
    for replaced, untrue in (
        ("data.validation", ("data.validation_examples",)),
        (
            "data.train",
            ("data.validation", "data.revision", "data.examples", "data.mean_tokens", "data.validation_examples"),
        ),
        ("model.name_or_path", ("model.architecture", "model.revision", "model.license", "model.open_alternative")),
    ):
        if replaced in written and written[replaced].where == COMMAND_LINE:
            for key in untrue:
                if key in written and written[key].where != COMMAND_LINE:
                    del written[key]


def _split_override(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not key=value, for example trainer.learning_rate=1.0e-5")
    return key, text


@cache
def _kinds(section: type) -> dict[str, list[str]]:
    """The keys of a section and the kinds of value each takes, such as `["str", "None"]` for `str | None`."""
    fields = dataclasses.fields(section)
    return {field.name: [kind.partition("[")[0] for kind in str(field.type).split(" | ")] for field in fields}


def _build(name: str, written: Mapping[str, Written]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {section: {} for section in (*schema.SECTIONS, "trainer", "")}
    for key, found in written.items():
        section, _, leaf = key.rpartition(".")
        if section.startswith("model.architecture"):
            raise ConfigError(
                f"{found.where}: write {key} as model.architecture={{{leaf}: …}}, all of its keys together"
            )
        if section not in sections or (not section and key in (*schema.SECTIONS, "trainer", "name", "origins")):
            raise ConfigError(f"{found.where}: unknown key {key}{did_you_mean(key, _known_keys())}")
        sections[section][leaf] = _checked(key, section, leaf, found)
    for needed in ("size", "data.train"):
        if needed not in written or written[needed].value in (None, ""):
            raise ConfigError(f"recipes/{name}.yaml: {needed} is missing")
    top = sections.pop("")
    trainer = {**schema.TRAINER_DEFAULTS, **sections.pop("trainer")}
    built: dict[str, Any] = {
        section: schema.SECTIONS[section](**values) if values or section != "lora" else None
        for section, values in sections.items()
    }
    recipe = Recipe(
        name=name, **top, **built, trainer=trainer, origins={key: found.where for key, found in written.items()}
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


def _checked(key: str, section: str, leaf: str, found: Written) -> Any:
    """The value in its right type.

    Raises:
        ConfigError: the key is unknown or the plan's own, or the value is of another type or none of the choices.
    """
    if section == "trainer":
        if leaf in schema.OWNED_BY_THE_PLAN:
            raise ConfigError(f"{found.where}: {key} is the plan's to set{_instead(schema.OWNED_BY_THE_PLAN[leaf])}")
        if leaf not in _trainer_keys():
            raise ConfigError(f"{found.where}: unknown key {key}{did_you_mean(leaf, _trainer_keys())}")
        kinds = schema.trainer_fields().get(leaf, ["float"])
    else:
        known = _kinds(schema.SECTIONS[section] if section else Recipe)
        if leaf not in known:
            raise ConfigError(f"{found.where}: unknown key {key}{did_you_mean(key, _known_keys())}")
        kinds = known[leaf]
    value = _coerce(key, kinds, _typed(found, kinds))
    choices = schema.CHOICES.get(key)
    if key == "model.attention" and "/" in str(value) and not schema.KERNEL.fullmatch(str(value)):
        raise ConfigError(
            f"{found.where}: {key} is {value!r}, a kernel from the Hub, which is code, and nothing says which; write "
            f"owner/name@<the 40 hexadecimal digits of its commit>"
        )
    if choices and value is not None and value not in choices and "/" not in str(value):
        raise ConfigError(
            f"{found.where}: {key} is {value!r}; wanted one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
        )
    _check_bounds(key, value, found.where)
    return value


def _instead(said: str) -> str:
    """The way out, or why there is none."""
    return f" ({said})" if said.startswith(("fixed: ", "derived ")) else f"; say {said} instead"


def _typed(found: Written, kinds: list[str]) -> Written:
    """What the command line said, read as YAML reads a recipe's value; text stays as it was typed."""
    if found.where != COMMAND_LINE:
        return found
    if not found.value:
        return Written(None, COMMAND_LINE)
    opens = {"list": "[", "dict": "{"}
    structured = any(kind in kinds and found.value.startswith(mark) for kind, mark in opens.items())
    if "str" in kinds and not structured:
        return found
    try:
        return Written(yaml.safe_load(found.value), COMMAND_LINE)
    except (yaml.YAMLError, ValueError):
        return found


def _coerce(key: str, kinds: list[str], found: Written) -> Any:
    value = found.value
    if isinstance(value, str) and "float" in kinds and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 2e-5 as text: it wants a dot and a sign
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{found.where}: {key} is {value}; wanted a finite number")
    if type(value).__name__ in kinds or (value is None and "None" in kinds):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and "float" in kinds:
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and set(kinds) <= {"str", "None"}:
        return str(value)
    wanted = " or ".join(_SPOKEN[kind] for kind in kinds if kind != "None")
    raise ConfigError(f"{found.where}: {key} is {value!r}; wanted {wanted}")


_SPOKEN = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
}
# Least and most of the numbers that have such; the most of a batch only keeps the arithmetic finite.
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
_MAY_BE_LEFT_OUT = {
    "batch.effective_batch_size",
    "data.examples",
    "data.mean_tokens",
    "data.max_eval_samples",
    "data.validation_examples",
    "monitor.early_stopping_patience",
}
_WHOLE = {"trainer.eval_steps", "trainer.save_steps", "trainer.logging_steps"}  # transformers reads a part as a share


def _check_bounds(key: str, value: Any, where: str) -> None:
    if key not in _BOUNDS or (value is None and key in _MAY_BE_LEFT_OUT):
        return
    least, most = _BOUNDS[key]
    if value is None or not least <= value <= most:
        wanted = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
        raise ConfigError(f"{where}: {key} is {value}; wanted {wanted}")
    if key in _WHOLE and value != int(value):
        raise ConfigError(f"{where}: {key} is {value}; wanted a whole number of steps")


def _check_model(recipe: Recipe) -> None:
    model, where = recipe.model, recipe.origins.get("model.from_scratch", f"recipes/{recipe.name}.yaml")
    if model.from_scratch and model.name_or_path:
        if recipe.origins.get("model.name_or_path") == COMMAND_LINE:
            raise ConfigError(
                f"{COMMAND_LINE}: {recipe.name} builds its model from scratch; add model.from_scratch=false "
                f"to start from {model.name_or_path}"
            )
        raise ConfigError(f"{where}: model.from_scratch and model.name_or_path are both set; keep one")
    if not model.from_scratch and not model.name_or_path:
        raise ConfigError(f"recipes/{recipe.name}.yaml: model.name_or_path is missing: a Hub name or a local folder")
    _check_architecture(model.architecture, recipe.origins.get("model.architecture", where))
    if recipe.lora:
        _check_targets(recipe.lora.target_modules, recipe.origins.get("lora.target_modules", where))
    if model.from_scratch and not model.architecture:
        raise ConfigError(f"{where}: model.from_scratch needs model.architecture, the numbers of the model's config")


def _check_lists(recipe: Recipe) -> None:
    """Lists of names: some of each, all of them text."""
    for key, names in (
        ("data.train", recipe.data.training),
        ("data.validation", recipe.data.held_out),
        ("model.add_tokens", recipe.model.add_tokens),
    ):
        where = recipe.origins.get(key, f"recipes/{recipe.name}.yaml")
        if not all(isinstance(name, str) and name.strip() for name in names) or (key == "data.train" and not names):
            raise ConfigError(f"{where}: {key} is {names!r}; wanted names, as in [a.jsonl, b.jsonl]")
    unknown = [name for name in recipe.monitor.stop_on if name not in schema.STOPPING_GUARDS]
    if unknown:
        raise ConfigError(
            f"{recipe.origins.get('monitor.stop_on')}: monitor.stop_on names {unknown[0]!r}; wanted some of "
            f"{', '.join(schema.STOPPING_GUARDS)}"
        )
    if recipe.monitor.grad_norm_below >= recipe.monitor.grad_norm_above:
        stated = recipe.origins.get("monitor.grad_norm_below") or recipe.origins.get("monitor.grad_norm_above")
        raise ConfigError(
            f"{stated}: monitor.grad_norm_below {recipe.monitor.grad_norm_below:g} is not below "
            f"monitor.grad_norm_above {recipe.monitor.grad_norm_above:g}"
        )
    if recipe.lora and recipe.model.add_tokens:
        raise ConfigError(
            f"{recipe.origins.get('model.add_tokens')}: model.add_tokens gives the model new embeddings, which LoRA "
            f"does not train; take a chat template whose marks the tokenizer has, or full fine-tuning"
        )


def _check_architecture(architecture: Mapping[str, Any], where: str) -> None:
    """The numbers that forecasts are made from; others are the model's own affair."""
    for key in (*DENSE_KEYS, "num_key_value_heads", "head_dim"):
        value = architecture.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{where}: model.architecture.{key} is {value!r}; wanted a whole number of at least 1")
    for key in ("tie_word_embeddings", "attention_bias"):
        if not isinstance(architecture.get(key, False), bool):
            raise ConfigError(f"{where}: model.architecture.{key} is {architecture[key]!r}; wanted true or false")
    heads, hidden = architecture.get("num_attention_heads"), architecture.get("hidden_size")
    if heads and hidden and not architecture.get("head_dim") and hidden % heads:
        raise ConfigError(
            f"{where}: model.architecture: hidden_size {hidden} is no multiple of num_attention_heads {heads}; "
            f"give head_dim"
        )


def _check_targets(targets: str | list[Any], where: str) -> None:
    if targets != "all-linear" and (isinstance(targets, str) or not targets or set(targets) - set(LINEAR_LAYERS)):
        raise ConfigError(
            f"{where}: lora.target_modules is {targets!r}; wanted all-linear or a list of some of "
            f"{', '.join(LINEAR_LAYERS)}"
        )
