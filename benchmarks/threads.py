"""Measures what a bound on the spinning of OpenMP threads costs on an idle machine and saves next to a busy process.

    .venv/bin/python benchmarks/threads.py [--rounds 3] [--steps 40]

Trains the tiny recipe with each value of GOMP_SPINCOUNT, alone and next to one process that keeps a core busy, in turn,
so that the ratios are of one machine in one hour. Run it on an otherwise idle machine. Writes
`results/threads-HOST.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

from sft_recipes.runtime.env import SPIN_COUNT

REPOSITORY = Path(__file__).resolve().parent.parent
# The first is libgomp's own default, where OMP_WAIT_POLICY is not set (GCC's manual of libgomp, GOMP_SPINCOUNT).
SPIN_COUNTS = ("300000", "5000", SPIN_COUNT, "1000", "0")
BUSY = "while True: pass"


def main() -> None:
    """Measures each value in turn and writes medians, spreads and ratios to the default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=machine.at_least_one, default=3)
    parser.add_argument("--steps", type=machine.at_least_one, default=40)
    given = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as runs:
        _train(runs, 1, SPIN_COUNT)  # prepares the data
        for _ in range(given.rounds):
            for count in SPIN_COUNTS:
                seconds.setdefault((count, "idle"), []).append(_train(runs, given.steps, count))
                busy = subprocess.Popen([sys.executable, "-c", BUSY])
                try:
                    seconds.setdefault((count, "next to a busy process"), []).append(_train(runs, given.steps, count))
                finally:
                    busy.kill()
                    busy.wait()
    content = machine.begun(machine.results("threads", None), again=True, steps=given.steps, rounds=given.rounds)
    content |= {"commit": machine.commit(), "chosen": SPIN_COUNT, "rows": _rows(seconds)}
    machine.write(machine.results("threads", None), content)
    print(json.dumps(content["rows"], indent=2))


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| GOMP_SPINCOUNT | seconds (median) | spread | ratio |", "|---|---|---|---|"]
    for name, row in content["rows"].items():
        chosen = " (chosen)" if name.startswith(f"GOMP_SPINCOUNT={content['chosen']},") else ""
        spread = f"{min(row['seconds'])} to {max(row['seconds'])}"
        lines.append(
            f"| {name.removeprefix('GOMP_SPINCOUNT=')}{chosen} | {row['median']} | {spread} | {row['ratio']} |"
        )
    return "\n".join(lines)


def _rows(seconds: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, Any]]:
    """For each value and condition: seconds of training, and their ratio to libgomp's default on the idle machine."""
    default = statistics.median(seconds[SPIN_COUNTS[0], "idle"])
    return {
        f"GOMP_SPINCOUNT={count}, {condition}": {
            "seconds": [round(value, 2) for value in values],
            "median": round(statistics.median(values), 2),
            "ratio": round(statistics.median(values) / default, 2),
        }
        for (count, condition), values in seconds.items()
    }


def _train(runs: str, steps: int, spin_count: str) -> float:
    """Seconds of training for `steps` steps of the tiny recipe, without the start."""
    words = ["train", "tiny", "--name", "threads", f"trainer.max_steps={steps}", f"trainer.eval_steps={steps}"]
    words += [f"trainer.save_steps={steps}", "generation.show=0", "generation.score=0"]
    variables = {"RUNS_DIR": runs, "REPORT_TO": "none", "SANITY": "skip", "GOMP_SPINCOUNT": spin_count}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    subprocess.run(
        [sys.executable, "-m", "sft_recipes", *words],
        cwd=REPOSITORY, env={**kept, **variables}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    run = Path(runs) / "threads"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((run / "manifest.json").read_text())
    shutil.rmtree(run)
    assert any(line["step"] == steps for line in lines)
    return float(manifest["training_seconds"])


if __name__ == "__main__":
    main()
