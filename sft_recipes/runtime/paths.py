"""Locations: this checkout, and the caches of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def hf_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of Hub files, as `huggingface_hub.constants.HF_HOME` does: HF_HOME, else XDG_CACHE_HOME."""
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return _absolute(environment.get("HF_HOME") or f"{cache}/huggingface")


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of downloaded models and datasets, as `huggingface_hub.constants.HF_HUB_CACHE` does."""
    folder = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return _absolute(folder) if folder else hf_home(environment) / "hub"


def _absolute(path: str) -> Path:
    """Return an absolute path without following links."""
    expanded = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111  keeps ~unknown, as huggingface_hub does
    return Path(os.path.normpath(Path(expanded).absolute()))
