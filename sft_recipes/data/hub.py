"""Downloads models and datasets from the Hub, or finds them in its cache if there is no network.

One process per node does this before any rank starts, so no GPU waits for a download and no rank uses the network.
"""

import re
from pathlib import Path

from sft_recipes.config.schema import Model
from sft_recipes.runtime.errors import DataError

# The same weights in other formats, and pickles, which are never loaded.
_IGNORED_FILES = ["original/*", "consolidated*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.msgpack", "*.h5"]
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model"]


def download_model(model: Model, only_tokenizer: bool = False) -> Path:
    """Return the cached folder of a model's files; download what is missing.

    Args:
        only_tokenizer: only configuration, tokenizer and template, without weights.

    Raises:
        DataError: the model does not exist or is gated, or neither network nor cache has it.
    """
    alternative = f", or use an open model: MODEL={model.open_alternative}" if model.open_alternative else ""
    patterns = _TOKENIZER_FILES if only_tokenizer else None
    return _snapshot(str(model.name_or_path), model.revision, "model", "model.name_or_path", alternative, patterns)


def download_dataset(name: str, revision: str | None, key: str) -> Path:
    """Return the cached folder of a dataset's files; download what is missing.

    Args:
        key: the recipe key that names the dataset, for errors.

    Raises:
        DataError: the dataset does not exist or is gated, or neither network nor cache has it.
    """
    return _snapshot(name, revision, "dataset", key, ", or set DATA=<a file or folder>", None)


def commit_of(folder: Path) -> str | None:
    """Return the commit of a snapshot in the Hub's cache (`…/snapshots/COMMIT`); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _snapshot(
    name: str, revision: str | None, kind: str, key: str, alternative: str, patterns: list[str] | None
) -> Path:
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        files = {"allow_patterns": patterns, "ignore_patterns": _IGNORED_FILES if kind == "model" else None}
        return Path(snapshot_download(name, repo_type=kind, revision=revision, **files))
    except (OSError, ValueError) as error:  # the Hub's errors are OSErrors
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        fix = f"Check the network, run `make download` beforehand, or set HF_TOKEN if {page} is gated"
        problem = {
            errors.RevisionNotFoundError: f"has no revision {revision} on the Hub. Name a commit of {page}",
            errors.GatedRepoError: f"is gated. Accept its license on {page} and set HF_TOKEN",
            errors.RepositoryNotFoundError: f"is no public {kind} on the Hub. Check the name, or set HF_TOKEN",
        }.get(type(error), f"at {revision or 'main'} is not in the Hub's cache and not downloadable ({reason}). {fix}")
        raise DataError(f"{key}: {name} {problem}{alternative}") from error
