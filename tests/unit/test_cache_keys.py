"""Cache keys of prepared data and sanity results depend on the code."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.config import loader
from sft_recipes.data import prepare
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.sanity import trial


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose code the keys depend on."""
    for folder in ("sft_recipes", "accelerate_configs", "deepspeed_configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(trial, "REPOSITORY", tmp_path)
    monkeypatch.setattr(trial, "code_hashes", trial.code_hashes.__wrapped__)  # it hashes once per process
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "sft_recipes" / "data" / "prepare.py"))
    return tmp_path


def test_cache_keys_depend_on_code(package):
    plan = dataclasses.replace(plans.resolve(loader.load("tiny"), Topology(0, 1)), data_fingerprint="a")

    def keys():
        return prepare._cache_key(plan, {"train": {}, "validation": {}}, None), trial.cache_key(plan)

    edited, before = package / "sft_recipes" / "data" / "packing.py", keys()
    edited.write_text(edited.read_text(encoding="utf-8") + "\nEDITED = True\n", encoding="utf-8")
    assert all(now != earlier for now, earlier in zip(keys(), before, strict=True))


def test_cache_key_depends_on_strategy_files(package):
    plan = plans.resolve(loader.load("tiny"), Topology(0, 1))
    before = trial.cache_key(plan)
    file = next(Path(package / "deepspeed_configs").glob("*.json"))
    file.write_text(file.read_text() + "\n")
    assert trial.cache_key(plan) != before
