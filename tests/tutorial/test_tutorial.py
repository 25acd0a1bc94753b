"""Every command of docs/tutorial.md, from top to bottom, as a user types them: `make test-tutorial`."""

import json
import os
import re
import subprocess

from helpers.workplace import REPOSITORY, manifest

COMMANDS = re.findall(r"^    (make .*)$", (REPOSITORY / "docs" / "tutorial.md").read_text(), re.MULTILINE)


def test_every_command_of_the_page_works(tmp_path):
    outputs = {}
    for command in COMMANDS:
        done = subprocess.run(
            ["bash", "-c", command], cwd=REPOSITORY, env={**os.environ, "RUNS_DIR": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        outputs[command.split()[1]] = done.stdout
    run = tmp_path / "first"
    assert len(outputs) == 9 and manifest(run)["state"] == "finished"
    sweep = json.loads((tmp_path / ".sweeps" / "first-sweep" / "results.json").read_text())
    losses = {value: sum(found) for value, found in sweep["eval_loss"].items()}
    assert min(losses, key=losses.get) == "2e-3" and (tmp_path / ".sweeps" / "first-sweep" / "sweep.svg").is_file()
    assert "8172" in outputs["generate"]
    (comparison,) = (run / "eval").glob("*.json")
    (row,) = json.loads(comparison.read_text())["rows"]
    assert row["trained"] > 0.8 > row["base"] and row["p_value"] < 0.05 and not row["worse"]
    assert (run / "report.html").is_file()
    card = (run / "final" / "README.md").read_text()
    assert "reverse_digits" in card and "exact_match (" in card and str(tmp_path) not in card
