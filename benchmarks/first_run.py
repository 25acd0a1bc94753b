"""Runs what a user runs first, stage by stage: the sanity check, training with a save, the published model's answer.

    .venv/bin/python benchmarks/first_run.py

On a GPU recipe 1b from random weights (bench.py), on a CPU the tiny recipe. Every stage is a command of the project; a
stage that fails is reported with its last lines, and the exit code is 1. Writes `results/first_run-MACHINE.json`:
seconds per stage, losses, and the peak memory of training next to the plan's forecast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from bench import REPOSITORY, Case, from_scratch, write_rows

from sft_recipes.launch.topology import gpu_type_of, visible_gpus

STEPS, NAME = 20, "first"
WORDS = (
    f"trainer.max_steps={STEPS}", f"trainer.eval_steps={STEPS}", f"trainer.save_steps={STEPS}",
    "trainer.logging_steps=1", "data.max_eval_samples=50", "batch.min_optimizer_steps=1",
    "generation.show=1", "generation.score=0",
)  # fmt: skip


def case(on_gpu: bool) -> Case:
    """The recipe, and what is changed of it."""
    return Case("1b", ("--gpus", "1"), (*from_scratch("1b"), *WORDS)) if on_gpu else Case("tiny", words=WORDS)


def main() -> int:
    """Run all stages; 1 if one failed."""
    card = gpu_type_of(visible_gpus())
    if card:
        write_rows()
    ours, target = case(card is not None), machine.results("first_run", card)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        commands = {
            "sanity check": ["sanity", ours.recipe, *ours.options, *ours.words],
            "training, with a save": ["train", ours.recipe, "--name", NAME, *ours.options, *ours.words],
            "answer": ["generate", NAME, "--prompt", "Reverse these digits: 2718"],
        }
        stages: dict[str, dict[str, Any]] = {}
        for name, command in commands.items():
            stages[name] = run(command, runs)
            print(f"{name:24} {stages[name]}", flush=True)
            if stages[name]["exit_code"]:
                break
        content = {
            "machine": machine.described(), "card": card, "commit": machine.commit(), "recipe": ours.recipe,
            "stages": stages, **measured(runs / NAME),
        }  # fmt: skip
    machine.write(target, content)
    print(f"written: {target.relative_to(REPOSITORY)}")
    return int(any(stage["exit_code"] for stage in stages.values()))


def run(words: list[str], runs: Path) -> dict[str, Any]:
    """Seconds, exit code and the last line of one command; where it failed, its last lines are printed."""
    environment = {
        **os.environ, "RUNS_DIR": str(runs), "REPORT_TO": "none", "PYTHONPATH": machine.python_path(REPOSITORY),
    }  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sft_recipes", *words], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    seconds, lines = time.monotonic() - began, done.stdout.strip().splitlines()
    if done.returncode:
        print(*lines[-30:], sep="\n")
    return {"seconds": round(seconds, 1), "exit_code": done.returncode, "last line": (lines or [""])[-1][:300]}


def measured(folder: Path) -> dict[str, Any]:
    """Losses and memory of the run; nothing where it took no step."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return {}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    planned = json.loads((folder / "plan.json").read_text())["memory_bytes_per_gpu"] or {}
    return {
        "first loss": losses[0],
        "last loss": losses[-1],
        "peak_bytes": max((line.get("memory_peak_bytes", 0) for line in lines), default=0) or None,
        "planned_bytes": planned.get("total"),
    }


if __name__ == "__main__":
    sys.exit(main())
