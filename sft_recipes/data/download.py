"""Brings what a recipe needs from the Hub beforehand; the run then needs no network."""

from __future__ import annotations

from pathlib import Path

from sft_recipes.config.schema import Recipe
from sft_recipes.data import hub, sources
from sft_recipes.data.model_files import check_model


def download(recipe: Recipe) -> list[tuple[str, Path]]:
    """Brings model, tokenizer and data; each with where it lies. What is local already is left where it is.

    Raises:
        UserError: something is not to be had, or is not whole.
    """
    fetched = []
    model, data = recipe.model, recipe.data
    if model.name_or_path:
        folder = check_model(model.name_or_path, model.revision, model.trust_remote_code, model.open_alternative)
        fetched.append((model.name_or_path, folder))
    named = [(name, "data.train") for name in data.training] + [(name, "data.validation") for name in data.held_out]
    named += [(data.retention_eval, "data.retention_eval")] if data.retention_eval else []
    for name, key in named:
        hub_name = sources.hub_name(name)
        if hub_name and hub_name not in dict(fetched):
            fetched.append((hub_name, hub.dataset(hub_name, data.revision_of(hub_name), key)))
    return fetched
