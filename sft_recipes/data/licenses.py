"""Licenses of models and datasets, as the cards on the Hub state them, and what Llama's licenses require."""

import re
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.data import hub
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import read_json

_TABLE = yaml.safe_load(Path(__file__).with_name("licenses.yaml").read_text(encoding="utf-8"))
HUB_IDS: frozenset[str] = frozenset(_TABLE["hub_ids"])
# What Llama's licenses require, by license: `prefix` of the model's name, `attribution` to display, `notice`.
LLAMA: dict[str, dict[str, str]] = _TABLE["llama"]
# Files that a license may require a copy of. Llama's also have the acceptable use policy.
FILES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|USE_POLICY)([-_][A-Z0-9-]+(\.\d+)?)?(\.txt|\.md)?", re.IGNORECASE)


def read(folder: Path) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of the card (`README.md`) in a folder, if it has them."""
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    return {key: ", ".join(map(str, text if isinstance(text, list) else [text])).strip() for key, text in found.items()}


def describe_base(plan: Plan, base: Path) -> dict[str, Any]:
    """Return what the manifest records of the model that a run starts from: `hub` (its name there) and `commit`, or
    `local` (the name of its folder), or `from_scratch`; and its license.

    A model of another run of this repository has the base model and license of that run.

    Args:
        base: its folder.
    """
    model, run = plan.sections.model, plan.parent.path if plan.parent else base.parent
    if inherited := read_json(run / "manifest.json").get("model"):
        return {**inherited, "trained_from": run.name}
    if model.from_scratch:
        return {"from_scratch": True}
    stated = read(base) or ({"license": model.license.lower()} if model.license else {})
    if Path(str(model.name_or_path)).expanduser().is_dir():
        return {"local": base.resolve().name, **stated}
    return {"hub": model.name_or_path, "commit": hub.commit_of(base) or model.revision, **stated}
