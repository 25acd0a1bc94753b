"""Preparation in its own process before any rank starts, and in several worker processes."""

import datetime
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from helpers.bad_input import IN_SEVERAL_PROCESSES

from sft_recipes.config import loader
from sft_recipes.data import prepare, sources, tokenize_rows
from sft_recipes.data.tokenize import ConversationTokenizer
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError

ROWS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]


def test_prepare_imports_no_heavy_library_for_cached_rows(tmp_path, write_rows, monkeypatch):
    """Importing them would delay every later start by seconds."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    overrides = [f"data.train={write_rows(ROWS)}", "trainer.max_length=128"]
    (tmp_path / "plan.json").write_text(
        json.dumps(asdict(plans.resolve(loader.load("tiny", overrides), Topology(0, 1))))
    )
    script = (
        "import sys; from sft_recipes.data import prepare; assert not prepare.main(sys.argv[1]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "plan.json")]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [output.splitlines()[-1] for output in outputs] == ["True True", "False False"]


def test_prepare_reports_error_in_one_line(tmp_path, write_rows, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    overrides = [f"data.train={write_rows([*ROWS, {'text': 'x'}])}", "trainer.max_length=128"]
    (tmp_path / "plan.json").write_text(
        json.dumps(asdict(plans.resolve(loader.load("tiny", overrides), Topology(0, 1))))
    )
    command = [sys.executable, "-m", "sft_recipes.data.prepare", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/rows.jsonl:61: row keys: found text, expected messages")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "prepared.json").exists()


def prepare_rows(rows, store, write_rows, model_folder):
    overrides = [f"data.train={write_rows(rows)}", f"model.name_or_path={model_folder}", "model.from_scratch=false"]
    plan = plans.resolve(
        loader.load("tiny", [*overrides, "data.validation=", "trainer.max_length=128"]), Topology(0, 1)
    )
    return prepare.prepare(plan, store)


def test_prepare_in_several_processes_gives_same_rows(tmp_path, write_rows, model_folder, monkeypatch):
    single = prepare_rows(ROWS, tmp_path / "single", write_rows, model_folder)
    monkeypatch.setattr(tokenize_rows, "_ROWS_PER_CHUNK", 7)
    several = prepare_rows(ROWS, tmp_path / "several", write_rows, model_folder)
    assert several.folder != single.folder and several.fingerprint == single.fingerprint


def test_prepare_names_first_bad_row_in_several_processes(tmp_path, write_rows, model_folder, monkeypatch):
    monkeypatch.setattr(tokenize_rows, "_ROWS_PER_CHUNK", 5)
    rows = [*ROWS[:33], {"prompt": "a", "completion": " "}, *ROWS[33:50], {"prompt": "b"}]
    with pytest.raises(UserError, match=r"rows.jsonl:34: turn 2: assistant content: found no text"):
        prepare_rows(rows, tmp_path / "store", write_rows, model_folder)


def test_tokenize_source_names_first_bad_row_of_thousands(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = IN_SEVERAL_PROCESSES
    (tmp_path / case.name).write_bytes(case.content)
    source = sources.resolve(case.name, "data.train", tmp_path / "toy")
    conversation_tokenizer = ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21))
    with pytest.raises(UserError) as raised:
        tokenize_rows.tokenize_source(source, conversation_tokenizer, 128, "data.train", "rows")
    assert re.match(case.message, str(raised.value))
