"""Durations, escaping, flattening and cache paths of the runtime package."""

import subprocess
import sys
from pathlib import Path

import pytest

from sft_recipes.runtime import paths
from sft_recipes.runtime.text import escape_unprintable, flatten
from sft_recipes.runtime.units import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.6, "1 h 0 min"),
        (93_784, "26 h 3 min"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_escape_unprintable_removes_control_sequences():
    assert escape_unprintable("\x1b[2Jä\n") == "\\x1b[2Jä\\x0a"
    assert escape_unprintable("a\nb\t\x07", keep="\n\t") == "a\nb\t\\x07"


def test_flatten_names_nested_values():
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}
    assert flatten(3, "x") == {"x": 3}
    assert flatten({"a": {}}) == {} and flatten({"a": {}}, keep_empty=True) == {"a": {}}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "/data/hf"},
        {"HF_HOME": "~/hf"},
        {"XDG_CACHE_HOME": "/data/cache"},
        {"XDG_CACHE_HOME": "/data/cache", "HF_HOME": "/data/hf"},
        {"HF_HUB_CACHE": "/data/hub"},
        {"HUGGINGFACE_HUB_CACHE": "/data/old"},
        {"HF_HUB_CACHE": "/data/hub", "HUGGINGFACE_HUB_CACHE": "/data/old"},
        {"HF_HOME": "$HOME/hf"},
    ],
    ids=str,
)
def test_cache_paths_equal_those_of_huggingface_hub(variables):
    code = "from huggingface_hub import constants; print(constants.HF_HOME); print(constants.HF_HUB_CACHE)"
    environment = {"HOME": str(Path.home()), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [str(paths.hf_home(variables)), str(paths.hub_cache(variables))] == done.stdout.splitlines()
