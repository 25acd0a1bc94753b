"""Measures the embedded recipe through the real command line: how well, how long, from which seed.

    .venv/bin/python benchmarks/tiny.py            two seeds, and what the recipe's choice of initializer is worth

Each row is one whole `train tiny`. Writes `results/tiny-HOST.json`, which names the machine, and prints its table.
Times are of this machine as it was; compare rows of one file, not files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "as shipped, seed 42": [],
    "seed 1": ["trainer.seed=1", "trainer.data_seed=1"],
    "initializer_range 0.02, Llama's own": [
        f"model.architecture={json.dumps({**ARCHITECTURE, 'initializer_range': 0.02})}"
    ],
}
KEPT = ("exact_match_before", "exact_match_after", "best_eval_loss", "steps", "training_seconds", "wall_seconds")


def main() -> None:
    """Runs every variant once and writes the results file."""
    rows = {}
    with tempfile.TemporaryDirectory() as runs:
        for number, (variant, overrides) in enumerate(VARIANTS.items()):
            rows[variant] = _measure(Path(runs), f"variant-{number}", overrides)
            print(f"{variant:38}", {key: rows[variant][key] for key in KEPT}, flush=True)
    first = next(iter(rows.values()))["starts"][0]
    result = {
        "machine": machine.described(),
        "versions": first["versions"],
        "commit": first["code"],
        "rows": {variant: {key: row[key] for key in KEPT} for variant, row in rows.items()},
    }
    file = HERE / "results" / f"tiny-{os.cpu_count()}-cores.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {file.relative_to(REPOSITORY)}")


def _measure(runs: Path, name: str, overrides: list[str]) -> dict:
    environment = {**os.environ, "RUNS_DIR": str(runs), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", name, *overrides]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    record = json.loads((runs / name / "manifest.json").read_text())
    found = record["held_out_metrics"]["exact_match"]
    return {**record, "exact_match_before": found["before"], "exact_match_after": found["after"]}


if __name__ == "__main__":
    main()
