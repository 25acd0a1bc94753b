"""Compares how short and full runs rank learning rates: `sweep` of the tiny recipe at several fractions of an epoch.

    .venv/bin/python benchmarks/sweep.py [--runs FOLDER]

The last fraction is the recipe's own two epochs. FOLDER keeps the runs, so that an interrupted benchmark continues.
Writes `results/sweep-MACHINE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

REPOSITORY = Path(__file__).resolve().parent.parent
RATES, FRACTIONS = ("1e-4", "2e-3", "1e-2"), (0.1, 0.25, 0.5, 2)


def main() -> None:
    """Run every sweep and write the validation losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = {f"{fraction:g}": _sweep(given.runs or Path(temporary), fraction) for fraction in FRACTIONS}
    content = machine.begun(machine.results("sweep", None), again=True)
    content |= {"commit": machine.commit(), "rows": rows}
    machine.write(machine.results("sweep", None), content)
    print(table(content))


def _sweep(runs: Path, fraction: float) -> dict[str, float]:
    """Return the validation loss of each learning rate."""
    environment = {**os.environ, "RUNS_DIR": str(runs), "PYTHONPATH": str(REPOSITORY)}
    name = f"s{fraction:g}"
    command = [sys.executable, "-m", "sft_recipes", "sweep", "tiny", "--name", name, "--lr", ",".join(RATES)]
    subprocess.run([*command, "--fraction", f"{fraction:g}"], env=environment, check=True)
    losses = json.loads((runs / ".sweeps" / name / "results.json").read_text())["eval_loss"]
    return {rate: losses[rate][0] for rate in RATES}


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown; the lowest loss of each is bold."""
    lines = [f"| epochs | {' | '.join(RATES)} |", "|---|" + "---|" * len(RATES)]
    for fraction, losses in content["rows"].items():
        lowest = min(losses.values())
        cells = (f"**{loss:.4f}**" if loss == lowest else f"{loss:.4f}" for loss in losses.values())
        lines.append(f"| {fraction} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
