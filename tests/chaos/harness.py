"""Starts real runs, harms them, starts them again, and compares what they come to with a run that nobody harmed."""

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

# Processes and parallelism of each engine that is tried.
ENGINES = {"single": (1, "ddp"), "ddp": (2, "ddp"), "zero2": (2, "zero2"), "zero3": (2, "zero3")}

# One layer, and rows of one kind: what a save writes is all there, a start is short.
SMALL = (
    "model.architecture={model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 512, max_position_embeddings: 512, "
    "tie_word_embeddings: true}",
    "batch.effective_batch_size=4",
    "batch.max_per_device_batch_size=2",
    "trainer.logging_steps=1",
    "generation.show=0",
    "generation.exact_match=0",
    "allow_out_of_range=[effective_batch_size]",
)


@dataclass
class Result:
    """One start: exit code and what it said."""

    code: int
    said: str

    def resumed_from(self) -> int:
        """The step that it went on from; 0 where it began."""
        found = re.search(r"going on from checkpoint-(\d+)", self.said)
        return int(found[1]) if found else 0


@dataclass
class State:
    """What a run has come to: bits, not numbers that are near."""

    rows: dict[int, int] = field(default_factory=dict)  # of each step: the digest of its supervised tokens
    losses: dict[int, float] = field(default_factory=dict)
    checkpoints: dict[int, dict[str, str]] = field(default_factory=dict)  # of each: SHA-256 of each file
    models: dict[str, str] = field(default_factory=dict)  # final/, last/ and best-N/

    def differences_at_the_end(self, whole: State) -> list[str]:
        """The same of a run that has ended, which must have each step, the newest checkpoint and both models."""
        missing = [f"loss of step {step} is missing" for step in whole.losses if step not in self.losses]
        newest = max(whole.checkpoints, default=0)
        missing += [f"checkpoint-{newest} is missing"] if newest and newest not in self.checkpoints else []
        return (
            self.differences(whole)
            + missing
            + [f"{name}/ is missing" for name in whole.models.keys() - self.models.keys()]
        )

    def differences(self, whole: State) -> list[str]:
        """Where this differs from an uninterrupted run; what this one has no longer, or not yet, is no difference."""
        wrong = [f"loss of step {step}" for step in self.losses if self.losses[step] != whole.losses.get(step)]
        wrong += [f"rows of step {step}" for step in self.rows if self.rows[step] != whole.rows.get(step)]
        for step, files in self.checkpoints.items():
            there = whole.checkpoints.get(step, {})
            wrong += [f"checkpoint-{step}/{name}" for name in files if files[name] != there.get(name)]
        return wrong + [name for name, digest in self.models.items() if digest != whole.models.get(name)]


def state_of(run: Path) -> State:
    """Reads a run's folder."""
    found = State()
    if (run / "metrics.jsonl").is_file():
        for text in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a kill cuts a line short
                line = json.loads(text)
                if "loss" in line:
                    found.losses[line["step"]] = line["loss"]
                    found.rows[line["step"]] = line["tokens_digest"]
    for sealed in run.glob("checkpoint-*/complete.json"):
        with contextlib.suppress(OSError, ValueError):  # it is being removed
            record = json.loads(sealed.read_text())
            # The Trainer's state and the proof hold times; all else is the run's own.
            found.checkpoints[record["step"]] = {
                name: of["sha256"] for name, of in record["files"].items() if name != "trainer_state.json"
            }
    for name in ("final", "last", *(path.name for path in run.glob("best-*"))):
        with contextlib.suppress(FileNotFoundError):  # not there, or being removed
            found.models[name] = hashlib.sha256((run / name / "model.safetensors").read_bytes()).hexdigest()
    return found


def newest_sealed(run: Path) -> int:
    """The step of the newest checkpoint that is sealed, which a start must go on from; 0 where there is none."""
    return max((int(path.parent.name.rpartition("-")[2]) for path in run.glob("checkpoint-*/complete.json")), default=0)


@dataclass
class Chaos:
    """A folder for runs and what is done to them; `seed` decides all that is random."""

    place: Path
    seed: int | str = 0

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        self.random = random.Random(self.seed)
        self._whole: dict[tuple[str, tuple[str, ...]], State] = {}
        self.data = self.place / "rows.jsonl"
        if not self.data.is_file():
            from sft_recipes.data.toy import toy_dataset

            self.data.write_text("".join(json.dumps(row) + "\n" for row in toy_dataset.rows(200, False)))

    @property
    def runs(self) -> Path:
        """Where the runs lie."""
        return self.place / "runs"

    def run(self, name: str) -> Path:
        """A run's folder."""
        return self.runs / name

    def command(self, name: str, engine: str, words: tuple[str, ...]) -> list[str]:
        """The command that a user would type."""
        processes, parallelism = ENGINES[engine]
        hardware = ["--gpus", "0", "--processes", str(processes), f"parallelism={parallelism}"]
        options = ["--name", name, *(word for word in words if word.startswith("--"))]
        values = [f"data.train={self.data}", *SMALL, *(word for word in words if not word.startswith("--"))]
        return [sys.executable, "-m", "sft_recipes", "train", "tiny", *hardware, *options, *values]

    def environment(self, **variables: str) -> dict[str, str]:
        """Nothing is tried beforehand and nothing tracked: neither is what is looked at here."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CHAOS_", "MAKE", "MFLAGS"))}
        ours = {"RUNS_DIR": str(self.runs), "PYTHONPATH": str(REPOSITORY), "REPORT_TO": "none", "SANITY": "skip"}
        return {**kept, "OMP_NUM_THREADS": "1", **ours, **variables}

    def start(self, name: str, engine: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        """A start, to be harmed while it lives; what it says goes to a file beside the run."""
        with (self.place / f"{name}.said").open("w") as said:
            return subprocess.Popen(
                self.command(name, engine, words),
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def ended(self, name: str, process: subprocess.Popen[str]) -> Result:
        """Waits for a start, and until none of its processes is left."""
        try:
            code = process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{name} hangs: {self.said(name)[-2000:]}") from None
        until = time.monotonic() + SECONDS_TO_BE_GONE
        while left := self.processes(name):
            assert time.monotonic() < until, f"{name} left processes behind: {left}"
            time.sleep(0.05)
        return Result(code, self.said(name))

    def said(self, name: str) -> str:
        """What the newest start of a run has said so far."""
        return (self.place / f"{name}.said").read_text(errors="replace")

    def complete(self, name: str, engine: str, *words: str, **variables: str) -> Result:
        """A start that is left alone, and must come to its end."""
        result = self.ended(name, self.start(name, engine, *words, **variables))
        assert result.code == 0, f"{name}: exit code {result.code}: {result.said[-3000:]}"
        return result

    def uninterrupted(self, engine: str, *words: str, **variables: str) -> State:
        """What a run comes to that nobody harms, with every checkpoint that it ever had; made once."""
        key = (engine, words)
        if key not in self._whole:
            name = f"whole-{engine}-{len(self._whole)}"
            shutil.rmtree(self.run(name), ignore_errors=True)
            process, seen = self.start(name, engine, *words, **variables), {}
            while process.poll() is None:
                seen |= state_of(self.run(name)).checkpoints
                time.sleep(0.01)
            result = self.ended(name, process)
            assert result.code == 0, result.said
            whole = state_of(self.run(name))
            whole.checkpoints = seen | whole.checkpoints
            self._whole[key] = whole
        return self._whole[key]

    def processes(self, name: str) -> list[int]:
        """Every process whose command line names the run's plan: launcher, ranks, data workers."""
        return [pid for pid, command in commands() if str(self.run(name) / "plan.json").encode() in command]

    def ranks(self, name: str) -> dict[int, int]:
        """Process of each rank that runs."""
        found = {}
        for pid, command in commands():
            if b"sft_recipes.training.main" in command and b"training.rank_launcher" not in command:
                if str(self.run(name) / "plan.json").encode() not in command:
                    continue
                with contextlib.suppress(OSError):
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    rank = next((one[5:] for one in variables if one.startswith(b"RANK=")), b"0")
                    found[int(rank)] = pid
        return found

    def wait_for_step(self, name: str, process: subprocess.Popen[str], step: int) -> None:
        """Until a start has logged a step."""
        self.wait_for(name, process, lambda: step in state_of(self.run(name)).losses)

    def wait_for_new_step(self, name: str, process: subprocess.Popen[str], behind: int) -> None:
        """Until a rank of this start is at a step behind that one, or the start has ended."""
        ranks, until = RunDir(self.run(name)).ranks, time.monotonic() + HANG_SECONDS

        def steps() -> list[int]:
            return [one.step for one in heartbeat.pulses(ranks).values() if heartbeat.state(one.process)]

        while process.poll() is None and max(steps(), default=0) <= behind:
            assert time.monotonic() < until, f"{name} hangs: {self.said(name)[-3000:]}"
            time.sleep(0.01)

    def wait_for(self, name: str, process: subprocess.Popen[str], what: Callable[[], object]) -> None:
        """Until something is so."""
        until = time.monotonic() + HANG_SECONDS
        while not what():
            assert process.poll() is None, f"{name} ended: {self.said(name)[-3000:]}"
            assert time.monotonic() < until, f"{name} hangs: {self.said(name)[-3000:]}"
            time.sleep(0.01)

    def interposer(self) -> Path:
        """The library that counts and harms file operations (interposer.c), built where there is a compiler."""
        built = self.place / "interposer.so"
        if not built.is_file():
            source = Path(__file__).with_name("interposer.c")
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"], check=True)
        return built

    def harmed(self, name: str, engine: str, rank: int, **harm: object) -> dict[str, str]:
        """The variables with which a rank's own file operations are counted, and harmed."""
        log = self.place / f"{name}.operations"
        log.unlink(missing_ok=True)
        whose = "none" if ENGINES[engine][0] == 1 else str(rank)
        chosen = {f"CHAOS_{key.upper()}": str(value) for key, value in harm.items()}
        return {
            "LD_PRELOAD": str(self.interposer()),
            "CHAOS_FOLDER": str(self.run(name)) + "/",
            "CHAOS_RANK": whose,
            "CHAOS_LOG": str(log),
            **chosen,
        }

    def operations(self, name: str) -> list[tuple[int, str, str, int]]:
        """What the newest start did to its folder: number, call, path in it, the errno that it got."""
        log = self.place / f"{name}.operations"
        lines = log.read_text().splitlines() if log.is_file() else []
        return [(int(n), call, path, int(failed)) for n, call, path, failed in (line.split(" ") for line in lines)]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
