"""Differences of each parallelism strategy from one process with the same batch, as tests/strategies measures them.

    .venv/bin/python benchmarks/engines.py

Runs the trajectories of `make test-strategies`; writes `results/engines-N-cores.json` with machine and versions,
and prints its table for docs/strategies.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import machine

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed")


def main() -> int:
    """Run the tests, write the results, print the table; return the tests' exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        tests = [sys.executable, "-m", "pytest", "tests/strategies/test_trajectories.py", "-k", "fp32 or bf16"]
        environment = {**os.environ, "STRATEGIES_REPORT": str(report)}
        code = subprocess.run(tests, cwd=machine.HERE.parent, env=environment, check=False).returncode
        rows = [json.loads(line) for line in report.read_text().splitlines()]
    content = {
        "machine": machine.described(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "commit": machine.commit(),
        "rows": rows,
    }
    machine.write(machine.results("engines", None), content)
    print(table(rows))
    return code


def table(rows: list[dict]) -> str:
    """The table of docs/strategies.md."""
    lines = [
        "| strategy | processes | rows | precision | loss | validation loss | a weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        packed = "packed" if row["packing"] else "padded"
        differences = " | ".join(f"{row[key]:.1e}" for key in ("loss", "eval_loss", "weight"))
        lines.append(f"| {row['engine']} | {row['processes']} | {packed} | {row['precision']} | {differences} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
