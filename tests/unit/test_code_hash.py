"""Cache keys of prepared data and sanity results ignore edits of docstrings and comments, but not of code."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.config import loader
from sft_recipes.data import prepare
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.code_hash import code_hash
from sft_recipes.sanity import trial

MODULE = '''"""What it does."""

class One:
    """Of a kind."""

    def call(self, count: int = 3) -> int:
        """Counts."""
        return count + 1  # and no more

    def known(self, name):
        return name in {"b", "a", "c", ("d", 1)}
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""What it does."""', '"""What it\n\ndoes, said at length."""', True),
        ('    """Of a kind."""\n', '    """Another."""\n', True),
        ('"""Counts."""', '"""Counts, and\n        raises nothing."""', True),
        ("  # and no more", "", True),
        ("    def call", "\n\n    # Called often.\n    def call", True),
        ("count + 1", "count + 2", False),
        ("count: int = 3", "count: int = 4", False),
        ("def call", "def calls", False),
        ('"a", "c", (', '"a", "e", (', False),
        ('("d", 1)', '("d", 1.0)', False),
        ('{"b", "a", "c"', '{"c", "a", "b"', True),
        ('"""Counts."""', 'print("""Counts.""")', False),
    ],
)
def test_code_hash_ignores_docstrings_and_comments(tmp_path, old, new, same):
    assert MODULE.count(old) == 1
    hashes = []
    for name, text in (("before.py", MODULE), ("after.py", MODULE.replace(old, new))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        hashes.append(code_hash(tmp_path / name))
    assert (hashes[0] == hashes[1]) is same


def test_code_hash_is_the_same_in_each_process(tmp_path):
    """Sets of strings have another order under each hash seed."""
    (tmp_path / "module.py").write_text(MODULE, encoding="utf-8")
    script = "import sys, pathlib; from sft_recipes.runtime.code_hash import code_hash; print(code_hash(pathlib.Path(sys.argv[1])))"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "module.py")], env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=REPOSITORY, capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(hashes) == 1


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose code the keys depend on."""
    for folder in ("sft_recipes", "accelerate_configs", "deepspeed_configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(trial, "REPOSITORY", tmp_path)
    monkeypatch.setattr(trial, "code_hashes", trial.code_hashes.__wrapped__)  # it hashes once per process
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "sft_recipes" / "data" / "prepare.py"))
    return tmp_path


def test_cache_keys_ignore_docstring_edits(package):
    plan = dataclasses.replace(plans.resolve(loader.load("tiny"), Topology(0, 1)), data_fingerprint="a")

    def keys():
        return prepare._cache_key(plan, {"train": {}, "validation": {}}, None), trial.cache_key(plan)

    edited = package / "sft_recipes" / "data" / "packing.py"
    text, before = edited.read_text(encoding="utf-8"), keys()
    assert text.startswith('"""')
    edited.write_text(text.replace('"""', '"""Edited. ', 1) + "# edited\n", encoding="utf-8")
    assert keys() == before
    edited.write_text(text + "\nEDITED = True\n", encoding="utf-8")
    assert all(now != earlier for now, earlier in zip(keys(), before, strict=True))


def test_cache_key_depends_on_strategy_files(package):
    plan = plans.resolve(loader.load("tiny"), Topology(0, 1))
    before = trial.cache_key(plan)
    file = next(Path(package / "deepspeed_configs").glob("*.json"))
    file.write_text(file.read_text() + "\n")
    assert trial.cache_key(plan) != before
