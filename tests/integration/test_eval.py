"""`eval` rejects bad input. With the real harness: tests/environments/test_harness.py."""

from __future__ import annotations

import json
import shutil
import sys

from helpers.cli_errors import check_refused


def test_an_unfinished_run_is_refused(short_run, tmp_path, in_process):
    run = tmp_path / "unfinished"
    shutil.copytree(short_run, run)
    content = json.loads((run / "manifest.json").read_text()) | {"state": "stopped"}
    (run / "manifest.json").write_text(json.dumps(content))
    check_refused(
        in_process("eval", str(run), EVAL_VENV=sys.prefix), "RUN: .*unfinished is stopped, expected a finished run"
    )


def test_a_missing_environment_is_refused_with_its_command(short_run, in_process):
    done = in_process("eval", str(short_run), EVAL_VENV="/nowhere")
    check_refused(done, r"EVAL_VENV: found no /nowhere/bin/python.*make setup-eval")
