"""The command line as a user has it, in an empty directory, and readers of a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.make_variables import GIVEN_BY_MAKE

REPOSITORY = Path(__file__).resolve().parents[2]

HELPERS = REPOSITORY / "tests" / "helpers"

# A hang is a failure, a slow machine is not: many times the duration of the slowest call.
HANG_SECONDS = 900

PLANTED_KEY = "f" * 40  # a secret: must not appear in any output

# Nothing listens on port 9, so it logs offline. It would try again for 20 seconds.
UNREACHABLE_WANDB = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}

# For runs of which there are many, or in bf16, which a CPU without bf16 instructions computes ten to thirty times slower
# than fp32. The sizes are multiples of 64, the block size of 4-bit weights.
SMALL_ARCHITECTURE = (
    "model.architecture={model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 512, max_position_embeddings: 512, "
    "tie_word_embeddings: true, initializer_range: 0.08}"
)

# A shorter tiny recipe: steps for two evaluations and two checkpoints. SHORT is too fast to be interrupted at a step.
FEW_STEPS = (
    "data.max_eval_samples=60",
    "batch.effective_batch_size=8",
    "batch.max_per_device_batch_size=4",
    "trainer.max_length=128",
    "trainer.max_steps=8",
    "trainer.eval_steps=4",
    "trainer.save_steps=4",
    "trainer.logging_steps=1",
    "generation.show=2",
    "generation.score=8",
    "generation.max_new_tokens=4",
)
SHORT = (SMALL_ARCHITECTURE, *FEW_STEPS)

# More steps of the tiny model: long enough to be interrupted at one.
LONG_STEPS = 30
LONG = (*FEW_STEPS, f"trainer.max_steps={LONG_STEPS}", "trainer.eval_steps=15", "generation.show=0")

SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

needs_compiler = pytest.mark.needs_compiler


@dataclass(frozen=True)
class Workplace:
    """An empty directory with its own runs, and the command line in it."""

    path: Path
    prepared: Path | None = None  # a store of prepared data that several workplaces share: each data set is made once

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def names(self) -> list[str]:
        """Return the names in the runs directory, without the prepared data."""
        return sorted(path.name for path in self.runs.glob("*") if path.name != ".prepared")

    def environment(self, **variables: str) -> dict[str, str]:
        # Those given to `make test` are not meant for the commands under test.
        kept = {key: value for key, value in os.environ.items() if key not in GIVEN_BY_MAKE}
        path = [REPOSITORY, HELPERS / "at_start"] if "PRELOAD_SERVER" in os.environ else [REPOSITORY]
        return {
            **kept,
            "RUNS_DIR": str(self.runs),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "REPORT_TO": "none",
            "SANITY": "skip",
            **variables,
        }

    def sft(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m sft_recipes` and wait for it."""
        store = self.runs / ".prepared"
        if self.prepared and not store.exists():
            self.runs.mkdir(exist_ok=True)
            store.symlink_to(self.prepared)
        return subprocess.run(
            [sys.executable, "-m", "sft_recipes", *arguments],
            cwd=self.path,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )

    def trained(self, *arguments: str, **variables: str) -> Path:
        """Run `train`, require exit code 0, and return the run directory.

        Give `--name` if other tests share the workplace: without it, the latest run is returned.
        """
        done = self.sft("train", *arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        if "--name" in arguments:
            return self.runs / arguments[arguments.index("--name") + 1]
        return max(self.runs.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime).parent

    def trained_once(self, name: str, *arguments: str, **variables: str) -> Path:
        """Return the run of this name: the first caller trains it, the others wait for it."""
        run = self.runs / name
        with FileLock(self.path / f"{name}.lock"):
            # Read the manifest instead of starting it again: another test process may hold the run (verify-resume).
            if not (run / "manifest.json").is_file() or manifest(run)["state"] != "finished":
                done = self.sft("train", "tiny", "--name", name, *arguments, **variables)
                assert done.returncode == 0, done.stdout + done.stderr
        return run


def simulated_device(log: Path, size: float = math.inf) -> dict[str, str]:
    """Return variables under which each rank of the sanity check logs the bytes its tensors hold, on a device of `size`
    times the peak of the trial's trainer (at_start/simulated_device.py)."""
    path = os.pathsep.join([str(REPOSITORY), str(HELPERS / "at_start")])
    return {"PYTHONPATH": path, "SIMULATED_DEVICE": str(log), "SIMULATED_DEVICE_SIZE": str(size)}


def assert_one_trainer_at_a_time(log: Path, ranks: int) -> None:
    """Each rank builds its second trainer in another process than its first; that process holds at most 2% of the first
    peak before, and at most 1.05 times that peak until it exits."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for rank in range(ranks):
        rank_lines = [line for line in lines if line["rank"] == rank]
        assert [line["event"] for line in rank_lines] == ["build", "exit", "build", "exit"]
        _, trial, second, reload = rank_lines
        assert trial["process"] != second["process"] == reload["process"]
        assert second["held"] <= 0.02 * trial["peak"]
        assert 0.1 * trial["peak"] < reload["peak"] <= 1.05 * trial["peak"]


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
