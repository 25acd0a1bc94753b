"""Licenses of models and datasets, as the cards on the Hub state them, and what Llama's licenses require."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data import hub
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import read_json

# Identifiers that the Hub accepts in a card: https://huggingface.co/docs/hub/repositories-licenses
HUB_IDS = frozenset(Path(__file__).with_name("hub_licenses.txt").read_text(encoding="utf-8").split())
# Files that a license may require a copy of. Llama's also have the acceptable use policy.
FILES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|USE_POLICY)([-_][A-Za-z0-9.]+)?(\.txt|\.md)?", re.IGNORECASE)


@dataclass(frozen=True)
class LlamaTerms:
    """What a Llama license requires of a model trained from Llama, section 1.b of each.

    Attributes:
        prefix: the beginning of the model's name; empty if any name is allowed.
        attribution: text to display; empty if none is required.
        notice: text of the file NOTICE.
    """

    prefix: str
    attribution: str
    notice: str


_META = "Meta Platforms, Inc. All Rights Reserved."
LLAMA = {
    "llama2": LlamaTerms("", "", f"Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) {_META}"),
    "llama3": LlamaTerms(
        "Llama 3",
        "Built with Meta Llama 3",
        f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © {_META}",
    ),
    **{
        f"llama{version}": LlamaTerms(
            "Llama",
            "Built with Llama",
            f"Llama {version} is licensed under the Llama {version} Community License, Copyright © {_META}",
        )
        for version in ("3.1", "3.2", "3.3", "4")
    },
}


def read(folder: Path) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of the card (`README.md`) in a folder, if it has them."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    stated = {key: card.get(key) for key in ("license", "license_name", "license_link")}
    texts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in stated.items()}
    return {key: str(text).strip() for key, text in texts.items() if text}


def describe_base(plan: Plan, base: Path) -> dict[str, Any]:
    """Return name, commit and license of the model that a run starts from, for the manifest.

    A model of another run of this repository has the base and license of that run.

    Args:
        base: its folder.
    """
    run = plan.parent.path if plan.parent else base.parent
    if inherited := read_json(run / "manifest.json").get("model"):
        return {**inherited, "trained_from": run.name}
    model = plan.sections.model
    if model.from_scratch:
        return {"from_scratch": True}
    name = str(model.name_or_path)
    is_local = Path(name).expanduser().is_dir()
    stated = read(base) or ({"license": model.license.lower()} if model.license else {})
    commit = hub.commit_of(base) or (None if is_local else model.revision)
    return {"name": base.resolve().name if is_local else name, "local": is_local, "commit": commit, **stated}
