"""Traces of decoder layers (training/layer_trace.py) by architecture, for model types without a closed form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_recipes.runtime.code_hash import code_hash
from sft_recipes.runtime.run_dir import read_json, runs_root

SHIPPED = Path(__file__).with_name("traced_layers.json")  # of the recipes; tests/integration/test_layer_trace.py
_TRAINING = Path(__file__).parents[1] / "training"
_known: dict[Path, dict[str, Any]] = {}


def find(architecture: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the trace of an architecture; None if it has not been traced, or could not be."""
    if shipped := _shipped().get(key_of(architecture)):
        return shipped
    file = cache_file(architecture)
    if file not in _known and (trace := read_json(file)):
        _known[file] = trace
    trace = _known.get(file, {})
    return trace if trace.get("layers") else None


def forget(architecture: Mapping[str, Any]) -> None:
    """Read the file of an architecture again at the next `find`: it has been traced once more."""
    _known.pop(cache_file(architecture), None)


def cache_file(architecture: Mapping[str, Any]) -> Path:
    """Return the file of a trace by this code and these libraries; it has a `problem` if tracing failed."""
    return runs_root() / ".layer_traces" / f"{key_of(architecture)}-{_code()}.json"


def key_of(architecture: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an architecture's values, shortened."""
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    return read_json(SHIPPED)


@cache
def _code() -> str:
    """Hash the tracing code and the versions of the libraries that it runs."""
    code = [code_hash(_TRAINING / name) for name in ("layer_trace.py", "attention.py")]
    versions = [metadata.version(name) for name in ("torch", "transformers", "peft")]
    return hashlib.sha256("".join(code + versions).encode()).hexdigest()[:16]
