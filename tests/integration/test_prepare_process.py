"""The process that prepares data before any rank starts."""

import json
import subprocess
import sys
from dataclasses import asdict

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology

ROWS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]


def test_prepare_imports_no_heavy_library_for_cached_rows(tmp_path, write_rows, monkeypatch):
    """Importing them would delay every later start by seconds."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    overrides = [f"data.train={write_rows(ROWS)}", "trainer.max_length=128"]
    (tmp_path / "plan.json").write_text(json.dumps(asdict(plans.make(loader.load("tiny", overrides), Topology(0, 1)))))
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
    (tmp_path / "plan.json").write_text(json.dumps(asdict(plans.make(loader.load("tiny", overrides), Topology(0, 1)))))
    command = [sys.executable, "-m", "sft_recipes.data.prepare", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/rows.jsonl:61: row keys: found text, expected messages")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "prepared.json").exists()
