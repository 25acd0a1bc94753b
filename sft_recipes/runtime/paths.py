"""Locations: this checkout, and the caches of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sft_recipes.runtime.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


def hf_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of Hub files, as `huggingface_hub.constants.HF_HOME` does: HF_HOME, else XDG_CACHE_HOME."""
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return absolute(environment.get("HF_HOME") or f"{cache}/huggingface")


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of downloaded models and datasets, as `huggingface_hub.constants.HF_HUB_CACHE` does."""
    folder = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return absolute(folder) if folder else hf_home(environment) / "hub"


def absolute(path: str, folder: Path | None = None) -> Path:
    """Return an absolute path, relative to `folder` or the current one, without following links."""
    expanded = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111  keeps ~unknown, as huggingface_hub does
    return Path(os.path.normpath(Path(folder or Path.cwd(), expanded)))


def mount_hint() -> str:
    """Return what to do in a container about a path that does not exist; empty outside."""
    return ". In a container: add its folder to MOUNTS=" if os.environ.get("SFT_RECIPES_IMAGE") else ""


def check_links(folder: Path, key: str) -> None:
    """Reject a folder with a broken link: its file would be left out silently.

    Raises:
        DataError: the target of a link does not exist, or is not mounted in this container.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in sorted((*folders, *files))):
            if path.is_symlink() and not path.exists():
                raise DataError(f"{key}: {path}: the target of this link does not exist{mount_hint()}")
