"""Brings models and data sets from the Hub, once and whole, or finds them in its cache where there is no network.

One process a node does so before any rank starts, so that no GPU waits for a download and no rank asks the network.
"""

from __future__ import annotations

import re
from pathlib import Path

from sft_recipes.runtime.errors import DataError

# The same weights in other formats, and pickles, which nothing here reads.
_NOT_NEEDED = ["original/*", "consolidated*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.msgpack", "*.h5"]


def model(name: str, revision: str | None, open_alternative: str | None = None) -> Path:
    """The folder of a model's files in the Hub's cache, brought there where they are not.

    Raises:
        DataError: there is no such model, it is gated, or neither network nor cache has it.
    """
    return _snapshot(name, revision, "model", "model.name_or_path", _other(open_alternative))


def tokenizer(name: str, revision: str | None, open_alternative: str | None = None) -> Path:
    """The folder with a model's configuration, tokenizer and template alone.

    Raises:
        DataError: as `model`.
    """
    return _snapshot(
        name, revision, "model", "model.name_or_path", _other(open_alternative), ["*.json", "*.jinja", "*.model"]
    )


def dataset(name: str, revision: str | None, key: str) -> Path:
    """The folder of a data set's files in the Hub's cache, brought there where they are not.

    Raises:
        DataError: there is no such data set, it is gated, or neither network nor cache has it.
    """
    return _snapshot(name, revision, "dataset", key, "; or say DATA=<a file or folder>")


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache (`…/snapshots/COMMIT`); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _other(open_alternative: str | None) -> str:
    return (
        f"; or take {open_alternative}, which needs no permission: model.name_or_path={open_alternative}"
        if open_alternative
        else ""
    )


def _snapshot(
    name: str, revision: str | None, kind: str, key: str, other: str, wanted: list[str] | None = None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    ignored = _NOT_NEEDED if kind == "model" else None
    try:
        return Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=wanted, ignore_patterns=ignored)
        )
    except GatedRepoError as error:
        raise DataError(
            f"{key}: {name} is gated and may not be read with this token, or without one; accept its licence on {page} "
            f"and set HF_TOKEN{other}"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{key}: {name} has no revision {revision} on the Hub; name a commit of {page}") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{key}: no {kind} {name} on the Hub, or a private one; check the name, and HF_TOKEN if it is yours{other}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        raise DataError(
            f"{key}: {name}{f' at {revision[:8]}' if revision else ''} is neither in the Hub's cache nor to be had "
            f"({reason}); check the network, or run `make download` before; where it is gated, accept its "
            f"licence on {page} and set HF_TOKEN{other}"
        ) from error
