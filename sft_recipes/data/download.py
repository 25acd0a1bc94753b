"""Downloads what a recipe needs from the Hub, so that the run needs no network."""

from pathlib import Path

from sft_recipes.config.schema import Recipe
from sft_recipes.data import hub, sources
from sft_recipes.data.model_files import check_model


def download(recipe: Recipe) -> list[tuple[str, Path]]:
    """Download model, tokenizer and data; return each name with its local folder. Local files are left in place.

    Raises:
        UserError: something is unavailable or incomplete.
    """
    model, data = recipe.model, recipe.data
    downloaded = [(model.name_or_path, check_model(model))] if model.name_or_path else []
    for part in sources.PARTS:
        for name in filter(None, (sources.hub_name(source.path) for source in data.sources(part))):
            if name not in dict(downloaded):
                downloaded.append((name, hub.download_dataset(name, data.revision_of(name), f"data.{part}")))
    return downloaded
