"""A GPU's peak memory beside the plan's forecast: recipes trained a few steps on one GPU, from random weights.

    .venv/bin/python benchmarks/gpu_memory.py [RECIPE …]      # default: 1b 3b 8b-lora; needs one NVIDIA GPU

Each row is one `train RECIPE` through the real road: the recipe's architecture, length, micro-batch and engine; its
model is built from its configuration, its data the embedded. Writes `results/gpu-memory-CARD.json`, which names card
and versions.
Not run yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import from_scratch

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path.insert(0, str(REPOSITORY))

from sft_recipes.launching.topology import card_of, visible_gpus  # noqa: E402

DEFAULT = ("1b", "3b", "8b-lora")


def main(names: list[str]) -> int:
    """Measures each recipe and writes the results; 2 where there is no GPU."""
    card = card_of(visible_gpus())
    if card is None:
        print("error: no NVIDIA GPU here", file=sys.stderr)
        return 2
    rows = {}
    with tempfile.TemporaryDirectory() as runs:
        for name in names or DEFAULT:
            rows[name] = measure(name, card, Path(runs))
            print(name, {key: value for key, value in rows[name].items() if key != "versions"}, flush=True)
    target = HERE / "results" / f"gpu-memory-{card}.json"
    target.write_text(json.dumps({"card": card, "rows": rows}, indent=2) + "\n")
    return 0


def measure(name: str, card: str, runs: Path) -> dict:
    """Six steps of a recipe: forecast and peak in bytes, and their ratio."""
    words = [
        *from_scratch(name, 4096), "trainer.max_steps=6",
        "trainer.eval_steps=3", "trainer.save_steps=1000", "answers.show=0",
    ]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "sft_recipes",
        "train",
        name,
        "--name",
        name,
        "--gpus",
        "1",
        "--card",
        card,
        *words,
    ]
    environment = {**os.environ, "RUNS_DIR": str(runs), "PYTHONPATH": str(REPOSITORY), "REPORT_TO": "none"}
    subprocess.run(command, check=True, cwd=runs, env=environment)
    plan, manifest = (json.loads((runs / name / f"{kind}.json").read_text()) for kind in ("plan", "manifest"))
    planned, peak = plan["memory_bytes_per_gpu"]["total"], manifest["peak_memory_bytes"]
    return {
        "planned_bytes": planned,
        "peak_bytes": peak,
        "peak_over_planned": round(peak / planned, 3),
        "parts": plan["memory_bytes_per_gpu"],
        "versions": manifest["starts"][0]["versions"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
