"""Start real runs, inject faults, restart them, and compare the result with an uninterrupted run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.processes import commands

from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
HANG_SECONDS = 300
SECONDS_TO_BE_GONE = 15

# Processes and parallelism of each setup.
SETUPS = {"single": (1, "ddp"), "ddp": (2, "ddp"), "zero2": (2, "zero2"), "zero3": (2, "zero3")}

# One layer: a checkpoint has all of its files, and a start is short.
SMALL = (
    "model.architecture={model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 512, max_position_embeddings: 512, "
    "tie_word_embeddings: true}",
    "batch.effective_batch_size=4",
    "batch.max_per_device_batch_size=2",
    "trainer.logging_steps=1",
    "generation.show=0",
    "generation.score=0",
    "allow_out_of_range=[effective_batch_size]",
)


@dataclass
class Result:
    """One start: exit code and output."""

    code: int
    output: str

    def resumed_from(self) -> int:
        """Return the step it resumed from; 0 if it started from the beginning."""
        found = re.search(r"resuming from checkpoint-(\d+)", self.output)
        return int(found[1]) if found else 0


@dataclass
class State:
    """The state of a run, compared bit for bit."""

    rows: dict[int, str] = field(default_factory=dict)  # step: hash of the rows up to it
    losses: dict[int, float] = field(default_factory=dict)
    checkpoints: dict[int, dict[str, str]] = field(default_factory=dict)  # step: SHA-256 of each file
    models: dict[str, str] = field(default_factory=dict)  # final/, last/ and best-N/

    def differences_at_the_end(self, reference: State) -> list[str]:
        """Return the differences of a finished run, which must have each step, the latest checkpoint and both models."""
        missing = [f"loss of step {step} is missing" for step in reference.losses if step not in self.losses]
        newest = max(reference.checkpoints, default=0)
        missing += [f"checkpoint-{newest} is missing"] if newest and newest not in self.checkpoints else []
        return (
            self.differences(reference)
            + missing
            + [f"{name}/ is missing" for name in reference.models.keys() - self.models.keys()]
        )

    def differences(self, reference: State) -> list[str]:
        """Return where this differs from an uninterrupted run; what is removed already, or not saved yet, is no difference."""
        wrong = [f"loss of step {step}" for step in self.losses if self.losses[step] != reference.losses.get(step)]
        wrong += [f"rows of step {step}" for step in self.rows if self.rows[step] != reference.rows.get(step)]
        for step, files in self.checkpoints.items():
            expected = reference.checkpoints.get(step, {})
            wrong += [f"checkpoint-{step}/{name}" for name in files if files[name] != expected.get(name)]
        return wrong + [name for name, digest in self.models.items() if digest != reference.models.get(name)]


def state_of(run: Path) -> State:
    """Read a run directory."""
    found = State(checkpoints=checkpoints_of(run, {}))
    if (run / "metrics.jsonl").is_file():
        for text in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a kill cuts a line short
                line = json.loads(text)
                if "loss" in line:
                    found.losses[line["step"]] = line["loss"]
                    found.rows[line["step"]] = line["rows_hash"]
    for name in ("final", "last", *(path.name for path in run.glob("best-*"))):
        with contextlib.suppress(FileNotFoundError):  # missing, or being removed
            found.models[name] = hashlib.sha256((run / name / "model.safetensors").read_bytes()).hexdigest()
    return found


def checkpoints_of(run: Path, known: dict[int, dict[str, str]]) -> dict[int, dict[str, str]]:
    """Return the complete checkpoints of a run: step: SHA-256 of each file; `known` ones are not read again."""
    found = dict(known)
    for marker in run.glob("checkpoint-*/complete.json"):
        if int(marker.parent.name.rpartition("-")[2]) in known:
            continue
        with contextlib.suppress(OSError, ValueError):  # it is being removed
            record = json.loads(marker.read_text())
            # The Trainer's state holds times.
            found[record["step"]] = {
                name: file["sha256"] for name, file in record["files"].items() if name != "trainer_state.json"
            }
    return found


def latest_complete(run: Path) -> int:
    """Return the step of the latest complete checkpoint, from which a start must resume; 0 if there is none."""
    return max((int(path.parent.name.rpartition("-")[2]) for path in run.glob("checkpoint-*/complete.json")), default=0)


@dataclass
class Chaos:
    """A directory of runs and the faults injected into them; `seed` decides everything random."""

    place: Path
    seed: int | str = 0

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        self.random = random.Random(self.seed)
        self._references: dict[tuple[str, tuple[str, ...]], State] = {}
        self.data = self.place / "rows.jsonl"
        if not self.data.is_file():
            from sft_recipes.data.toy import toy_dataset

            self.data.write_text("".join(json.dumps(row) + "\n" for row in toy_dataset.rows(200, False)))

    @property
    def runs(self) -> Path:
        """The directory of all runs."""
        return self.place / "runs"

    def run(self, name: str) -> Path:
        """The directory of one run."""
        return self.runs / name

    def command(self, name: str, setup: str, arguments: tuple[str, ...]) -> list[str]:
        """The command as a user types it."""
        processes, parallelism = SETUPS[setup]
        hardware = ["--gpus", "0", "--processes", str(processes), f"parallelism={parallelism}"]
        options = ["--name", name, *(argument for argument in arguments if argument.startswith("--"))]
        values = [
            f"data.train={self.data}",
            *SMALL,
            *(argument for argument in arguments if not argument.startswith("--")),
        ]
        return [sys.executable, "-m", "sft_recipes", "train", "tiny", *hardware, *options, *values]

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment of a start, without sanity check and trackers."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CHAOS_", "MAKE", "MFLAGS"))}
        # Starts without faults are forked where pytest has a server for that (helpers/preload_server.py).
        path = (
            f"{REPOSITORY}:{REPOSITORY}/tests/helpers/at_start" if "PRELOAD_SERVER" in os.environ else str(REPOSITORY)
        )
        ours = {"RUNS_DIR": str(self.runs), "PYTHONPATH": path, "REPORT_TO": "none", "SANITY": "skip"}
        return {**kept, "OMP_NUM_THREADS": "1", **ours, **variables}

    def start(self, name: str, setup: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start a run in the background; its output goes to a file next to the run."""
        with (self.place / f"{name}.output").open("w") as output:
            return subprocess.Popen(
                self.command(name, setup, arguments),
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def wait_for_exit(self, name: str, process: subprocess.Popen[str]) -> Result:
        """Wait until a start and all of its processes have exited."""
        try:
            code = process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{name} hangs: {self.output(name)[-2000:]}") from None
        until = time.monotonic() + SECONDS_TO_BE_GONE
        while left := self.processes(name):
            assert time.monotonic() < until, f"{name} left processes behind: {left}"
            time.sleep(0.05)
        return Result(code, self.output(name))

    def output(self, name: str) -> str:
        """The output of the latest start of a run so far."""
        return (self.place / f"{name}.output").read_text(errors="replace")

    def run_to_end(self, name: str, setup: str, *arguments: str, **variables: str) -> Result:
        """Start a run without faults; it must finish."""
        result = self.wait_for_exit(name, self.start(name, setup, *arguments, **variables))
        assert result.code == 0, f"{name}: exit code {result.code}: {result.output[-3000:]}"
        return result

    def uninterrupted(self, setup: str, *arguments: str, **variables: str) -> State:
        """Return the state of an uninterrupted run, with every checkpoint it ever had; trained once."""
        key = (setup, arguments)
        if key not in self._references:
            name = f"reference-{setup}-{len(self._references)}"
            shutil.rmtree(self.run(name), ignore_errors=True)
            process, seen = self.start(name, setup, *arguments, **variables), {}
            while process.poll() is None:
                seen = checkpoints_of(self.run(name), seen)
                time.sleep(0.01)
            result = self.wait_for_exit(name, process)
            assert result.code == 0, result.output
            reference = state_of(self.run(name))
            reference.checkpoints = seen | reference.checkpoints
            self._references[key] = reference
        return self._references[key]

    def processes(self, name: str) -> list[int]:
        """Every process with the run's plan in its command line: launcher, ranks, data workers."""
        return [pid for pid, command in commands() if str(self.run(name) / "plan.json").encode() in command]

    def ranks(self, name: str) -> dict[int, int]:
        """Process id of each live rank."""
        found = {}
        for pid, command in commands():
            if b"sft_recipes.training.main" in command and b"training.rank_launcher" not in command:
                if str(self.run(name) / "plan.json").encode() not in command:
                    continue
                with contextlib.suppress(OSError):
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    rank = next((entry[5:] for entry in variables if entry.startswith(b"RANK=")), b"0")
                    found[int(rank)] = pid
        return found

    def wait_for_step(self, name: str, process: subprocess.Popen[str], step: int) -> None:
        """Wait until a start has logged a step."""
        self.wait_for(name, process, lambda: step in state_of(self.run(name)).losses)

    def wait_for_new_step(self, name: str, process: subprocess.Popen[str], after: int) -> None:
        """Wait until a rank of this start is past a step, or the start has exited."""
        ranks, until = RunDir(self.run(name)).ranks, time.monotonic() + HANG_SECONDS

        def steps() -> list[int]:
            return [
                beat.step for beat in heartbeat.read_heartbeats(ranks).values() if heartbeat.process_state(beat.pid)
            ]

        while process.poll() is None and max(steps(), default=0) <= after:
            assert time.monotonic() < until, f"{name} hangs: {self.output(name)[-3000:]}"
            time.sleep(0.01)

    def wait_for(self, name: str, process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
        """Wait until a condition holds."""
        until = time.monotonic() + HANG_SECONDS
        while not condition():
            assert process.poll() is None, f"{name} ended: {self.output(name)[-3000:]}"
            assert time.monotonic() < until, f"{name} hangs: {self.output(name)[-3000:]}"
            time.sleep(0.01)

    def interposer(self) -> Path:
        """The library that counts file operations and makes them fail (interposer.c), compiled on first use."""
        built = self.place / "interposer.so"
        if not built.is_file():
            source = Path(__file__).with_name("interposer.c")
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"], check=True)
        return built

    def with_faults(self, name: str, setup: str, rank: int, **faults: object) -> dict[str, str]:
        """Variables that count a rank's file operations and make some of them fail."""
        log = self.place / f"{name}.operations"
        log.unlink(missing_ok=True)
        ranks = "none" if SETUPS[setup][0] == 1 else str(rank)
        chosen = {f"CHAOS_{key.upper()}": str(value) for key, value in faults.items()}
        return {
            "LD_PRELOAD": str(self.interposer()),
            "CHAOS_FOLDER": str(self.run(name)) + "/",
            "CHAOS_RANK": ranks,
            "CHAOS_LOG": str(log),
            **chosen,
        }

    def operations(self, name: str) -> list[tuple[int, str, str, int]]:
        """File operations of the latest start: number, call, path in the run directory, errno."""
        log = self.place / f"{name}.operations"
        lines = log.read_text().splitlines() if log.is_file() else []
        return [(int(n), call, path, int(failed)) for n, call, path, failed in (line.split(" ") for line in lines)]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have exited."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
