"""Measure the cost of saves, verification, stop agreement and integrity checks, and the time to detect faults.

    .venv/bin/python benchmarks/saving.py [--device cuda] [--disk FOLDER] [--smoke]

All runs are started by `python -m sft_recipes train`; a `sitecustomize.py`, which Python imports first, times their
ranks. The baselines run on the same ranks and disk between two steps: each save is compared with a plain write and
fsync of the same number of bytes, and with the stock trainer's save of the same state (no sync, checksum or manifest),
so that noise of the machine affects all of them.
Writes `results/saving-HOST.json`, but not with `--smoke`, which does everything at a small size. About 8 minutes.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed")
HANG_SECONDS = 300

# Variables: the folder for the measurements of the ranks, and what they measure.
MEASUREMENTS, WATCHED = "BENCHMARK_MEASUREMENTS", "BENCHMARK_WATCHED"
PLANT = """
import sys
if "sft_recipes.training.main" in sys.orig_argv and "sft_recipes.training.rank_launcher" not in sys.orig_argv:
    from benchmarks import saving
    saving.watch_this_rank()
"""
PARTS = ("proving", "writing", "syncing", "hashing", "sealing", "agreeing", "forgetting")
PIECE_BYTES = 16 * 2**20

QUIET = ("generation.show=0", "generation.score=0", "trainer.eval_steps=100000")
# Rows that are prepared at once; a step over them is short compared with a save.
FEW_ROWS = ("batch.effective_batch_size=4", "batch.max_per_device_batch_size=2", "trainer.packing=false")


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        width: of the model whose checkpoints are saved; 512 makes 160 MB a checkpoint, 270 under ZeRO.
        saves: per strategy, after a first one that is left out.
        cycle: steps from one save of the tiny recipe to the next.
    """

    width: int = 512
    saves: int = 20
    reads: int = 3
    cycle: int = 150
    deaths: int = 4
    hangs: int = 3


SMOKE = Size(width=64, saves=2, reads=1, cycle=8, deaths=1, hangs=1)


class Bench:
    """A folder on the disk that is measured, the ranks that there are to measure with, and what could not be."""

    def __init__(self, place: Path, device: str, size: Size):
        self.place = place
        self.device = device
        self.size = size
        self.most_ranks = 2 if device == "cpu" else min(_gpus(), 2)
        self.not_measured: list[str] = []
        self.rows = place / "few.jsonl"
        self.plant = place / "plant"
        self.plant.mkdir()
        (self.plant / "sitecustomize.py").write_text(PLANT)
        from sft_recipes.data.toy import toy_dataset

        self.rows.write_text("".join(json.dumps(row) + "\n" for row in toy_dataset.rows(300, False)), encoding="utf-8")

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.place / "runs" / name

    def start(self, name: str, ranks: int, *overrides: str, watched: str = "") -> subprocess.Popen[bytes]:
        """Start a run as a user does; its output goes to `NAME.txt`."""
        import machine  # in this folder, which is not on the path of the ranks

        hardware = ["--gpus", "0", "--processes", str(ranks)] if self.device == "cpu" else ["--gpus", str(ranks)]
        measurements = self.place / f"{name}-measurements"
        measurements.mkdir()
        planted = [self.plant] if watched else []
        environment = {
            **os.environ, "RUNS_DIR": str(self.place / "runs"), "REPORT_TO": "none", "SANITY": "skip",
            "PYTHONPATH": machine.python_path(REPOSITORY, *planted), MEASUREMENTS: str(measurements), WATCHED: watched,
        }  # fmt: skip
        with self.said(name).open("w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", name, *hardware, *QUIET, *overrides],
                cwd=self.place, env=environment, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def said(self, name: str) -> Path:
        """What a run has said so far."""
        return self.place / f"{name}.txt"

    def watch(self, name: str, ranks: int, *overrides: str, watched: str) -> list[dict[str, Any]]:
        """Carries a run out; what rank 0 measured in it."""
        process = self.start(name, ranks, *overrides, watched=watched)
        if process.wait():
            raise RuntimeError(f"{name} left with {process.returncode}: {self.said(name).read_text()}")
        lines = (self.place / f"{name}-measurements" / "0.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def cannot(self, what: str, why: str) -> None:
        """Says it, here and in the results."""
        self.not_measured.append(f"{what}: {why}")
        print(f"not measured: {self.not_measured[-1]}", flush=True)

    def lacks_ranks(self, what: str, ranks: int) -> bool:
        """Whether there are too few, which is said."""
        if ranks > self.most_ranks:
            self.cannot(what, f"{ranks} ranks need as many GPUs, {self.most_ranks} are here")
        return ranks > self.most_ranks


def main() -> None:
    """Measures all, and writes the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--smoke", action="store_true")
    parsed = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=parsed.disk, prefix="sft-saving-") as place:
        bench = Bench(Path(place), parsed.device, SMOKE if parsed.smoke else Size())
        sections = {
            **_saves_and_verification(bench),
            "agreement_and_proof": _agreement(bench),
            "deaths": _faults(bench, "death", bench.size.deaths),
            "hangs": _faults(bench, "hang", bench.size.hangs),
        }
        result = {**_circumstances(parsed), **sections, "not_measured": bench.not_measured}
    result["seconds"] = round(time.monotonic() - began)
    print(json.dumps(result, indent=2))
    if not parsed.smoke:
        name = f"saving-{os.cpu_count()}-cores{'' if parsed.device == 'cpu' else '-gpu'}.json"
        (HERE / "results" / name).write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: benchmarks/results/{name}")


# What is measured from outside.


def _saves_and_verification(bench: Bench) -> dict[str, Any]:
    """Of each engine, in turn, so that the disk holds the checkpoints of one."""
    saves, verification = [], []
    for engine, ranks in (("ddp", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)):
        what = f"saves of {engine} with {ranks} processes"
        if bench.lacks_ranks(what, ranks):
            continue
        if engine != "ddp" and shutil.which("c++") is None:
            bench.cannot(what, "DeepSpeed compiles an operator, and there is no C++ compiler")
            continue
        name = f"{engine}-{ranks}"
        saves.append({"engine": engine, "processes": ranks, **_saves(bench, name, engine, ranks)})
        print(json.dumps(saves[-1]), flush=True)
        if ranks == 2:
            verification.append({"engine": engine, "processes": ranks, **_verification(bench, bench.run(name))})
            print(json.dumps(verification[-1]), flush=True)
        shutil.rmtree(bench.run(name))
    return {"saves": saves, "verification": verification}


def _saves(bench: Bench, name: str, engine: str, ranks: int) -> dict[str, Any]:
    """The stall of each save, its parts, and the baselines."""
    steps = bench.size.saves + 1
    saves = bench.watch(
        name, ranks, f"parallelism={engine}", f"data.train={bench.rows}", *FEW_ROWS, _larger(bench.size.width),
        f"trainer.max_steps={steps}", "trainer.save_steps=1", watched="saves",
    )  # fmt: skip
    recorded = [json.loads(line) for line in (bench.run(name) / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in recorded if "save_seconds" in line}
    if len(saves) != steps or by_step.keys() != {one["step"] for one in saves}:
        raise RuntimeError(f"{name}: found {len(saves)} watched and {len(by_step)} recorded saves, expected {steps}")
    measured = [(one, by_step[one["step"]]["save_seconds"]) for one in saves[1:]]  # the first one warms up
    saved_bytes = by_step[steps]["save_bytes"]
    return {
        "saves": len(measured),
        "bytes": saved_bytes,
        "save_seconds": _spread([seconds for _, seconds in measured]),
        "stall_seconds": _spread([sum(one["parts"].values()) for one, _ in measured]),
        "parts_of_the_stall_seconds_p50": {
            part: _median([one["parts"][part] for one, _ in measured]) for part in PARTS
        },
        "plain_write_and_fsync_seconds": _spread([one["plain"] for one, _ in measured]),
        "plain_bytes_per_second": round(statistics.median(saved_bytes / one["plain"] for one, _ in measured)),
        "share_of_the_disk": _spread([one["plain"] / seconds for one, seconds in measured]),
        "stock_save_seconds": _spread([one["stock"] for one, _ in measured]),
        "times_stock": _spread([seconds / one["stock"] for one, seconds in measured]),
        "stock_and_sync_seconds": _spread([one["stock"] + one["stock_sync"] for one, _ in measured]),
        "times_stock_and_sync": _spread([seconds / (one["stock"] + one["stock_sync"]) for one, seconds in measured]),
    }


def _larger(width: int) -> str:
    """The tiny recipe's architecture, so wide."""
    from sft_recipes.config import loader

    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    wide = {"hidden_size": width, "intermediate_size": width * 11 // 4, **heads}
    return f"model.architecture={json.dumps({**loader.load('tiny').model.architecture, **wide})}"


def _verification(bench: Bench, run: Path) -> dict[str, Any]:
    """Seconds per gigabyte to verify a checkpoint before it is loaded, by one process and by two as in a resume, from
    the page cache and from the disk."""
    from sft_recipes.runtime.run_dir import RunDir
    from sft_recipes.training.checkpoint import checkpoint_format

    folder = RunDir(run)
    path = folder.checkpoint(folder.latest_complete())
    files = checkpoint_format.read_commit_marker(path)["files"]
    gigabytes = sum(file["bytes"] for file in files.values()) / 1e9
    found: dict[str, Any] = {"bytes": round(gigabytes * 1e9), "seconds_per_gb": {}}
    for temperature in ("warm", "cold"):
        for processes in (1, 2):
            with ProcessPoolExecutor(processes) as pool:
                list(pool.map(time.sleep, [0.2] * processes))  # all of them are there before the clock runs
                times = []
                for _ in range(bench.size.reads):
                    if (_warm(path) if temperature == "warm" else _cold(path)) is False:
                        break
                    began = time.perf_counter()
                    said = list(pool.map(_look_through, [(path, rank, processes) for rank in range(processes)]))
                    times.append((time.perf_counter() - began) / gigabytes)
                    if any(said):
                        raise RuntimeError(f"{path}: {said}")
            if times:
                found["seconds_per_gb"][f"{temperature}, {processes} process{'es' * (processes > 1)}"] = _spread(times)
            else:
                bench.cannot(f"verification of {run.name}, {temperature}", "the system keeps files in its page cache")
    sizes = sorted((file["bytes"] for file in files.values()), reverse=True)
    found["largest_share_of_two"] = round(sum(sizes[::2]) / sum(sizes), 3)
    return found


def _look_through(task: tuple[Path, int, int]) -> str | None:
    """One process's part in `resume.verify_on_all_ranks`; what is wrong."""
    from sft_recipes.training.checkpoint import checkpoint_format

    path, rank, ranks = task
    return checkpoint_format.verify_checksums(path, checkpoint_format.read_commit_marker(path), rank, ranks)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _warm(folder: Path) -> bool:
    for path in _files(folder):
        with path.open("rb") as file:
            while file.read(PIECE_BYTES):
                pass
    return True


def _cold(folder: Path) -> bool:
    """Whether the files have left this system's page cache; a hypervisor below it may keep them all the same."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in _files(folder):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(opened)
    largest = max(_files(folder), key=lambda path: path.stat().st_size)
    return not _is_cached(largest)


def _is_cached(path: Path) -> bool:
    """Whether any of a few places of a file can be read without waiting for the disk (RWF_NOWAIT, preadv2(2))."""
    opened = os.open(path, os.O_RDONLY)
    try:
        size = path.stat().st_size
        return any(_reads_at_once(opened, size * place // 5) for place in range(1, 5))
    finally:
        os.close(opened)


def _reads_at_once(opened: int, at: int) -> bool:
    try:
        return os.preadv(opened, [bytearray(1)], at, os.RWF_NOWAIT) > 0
    except (BlockingIOError, OSError):
        return False


def _agreement(bench: Bench) -> dict[str, Any] | None:
    """What a step of the tiny recipe pays for the ranks' agreement and for its proofs, over one cycle of saving."""
    if bench.lacks_ranks("the agreement of all ranks", 2):
        return None
    first, cycle = 3, bench.size.cycle
    notes = bench.watch(
        "agreement", 2, "parallelism=ddp", "data.max_eval_samples=60", f"trainer.save_steps={cycle}",
        f"trainer.max_steps={cycle + first + 1}", watched="agreement",
    )  # fmt: skip
    met = [one for one in notes if "asked" in one and one["step"] >= first]
    steps = [after["began"] - now["began"] - now["aligned"] for now, after in itertools.pairwise(met)]
    step = statistics.median(steps)
    in_cycle = [one for one in notes if "proof" in one and first <= one["step"] < first + cycle]
    proof = sum(one["proof"] for one in in_cycle) / cycle
    digests = [one["digest"] for one in notes if "digest" in one]
    parts: dict[str, float] = defaultdict(float)
    for one in in_cycle:
        parts[one["part"]] += one["proof"] / cycle
    return {
        "steps": len(steps),
        "step_milliseconds_p50": _milliseconds(step),
        "agreement_milliseconds": _spread([one["aligned"] * 1000 for one in met]),
        "agreement_share_of_a_step_p50": round(statistics.median(one["aligned"] for one in met) / step, 5),
        "agreement_and_waiting_for_the_slower_rank_milliseconds": _spread([one["asked"] * 1000 for one in met]),
        "digests_of_a_rank": len(digests),
        "digest_milliseconds": _spread([one * 1000 for one in digests]),
        "proof_milliseconds_a_step": _milliseconds(proof),
        "proof_share_of_a_step": round(proof / step, 5),
        "proof_parts_milliseconds_a_step": {part: _milliseconds(spent) for part, spent in sorted(parts.items())},
        "steps_of_the_cycle": cycle,
    }


def _faults(bench: Bench, kind: str, repeats: int) -> dict[str, Any]:
    """Seconds from a rank's death, or from its last move where it hangs, until the parent says so, and until no process
    is left."""
    ranks = bench.most_ranks
    found = []
    for number in range(repeats):
        found.append(_fault(bench, kind, f"{kind}-{number}", ranks, (ranks - 1 - number) % ranks))
        print(kind, json.dumps(found[-1]), flush=True)
    seconds_by_key = {key: [one[key] for one in found] for key in found[0] if key != "rank"}
    worst = {key: {"median": _median(seconds), "worst": max(seconds)} for key, seconds in seconds_by_key.items()}
    return {"processes": ranks, "repeats": repeats, **worst}


def _fault(bench: Bench, kind: str, name: str, ranks: int, rank: int) -> dict[str, Any]:
    """One rank is killed, or stopped, in a step of a run of the tiny recipe."""
    heartbeat_timeout_seconds = 3
    began_with = [
        f"data.train={bench.rows}", *FEW_ROWS, "trainer.max_steps=100000", "trainer.save_steps=100000",
        f"monitor.heartbeat_timeout_seconds={heartbeat_timeout_seconds}",
    ]  # fmt: skip
    process = bench.start(name, ranks, *began_with)
    try:
        victim = _await_step(bench, name, process, ranks, 5)[rank]
        os.kill(victim, signal.SIGKILL if kind == "death" else signal.SIGSTOP)
        struck = time.monotonic()
        seen, gone = _await_end(bench, name, struck)
        process.wait(HANG_SECONDS)
    finally:
        process.kill()
        process.wait()
    said = bench.said(name).read_text()
    wanted = rf"rank {rank} on \S+: {'killed by SIGKILL' if kind == 'death' else 'no heartbeat'}"
    if process.returncode != 1 or not re.search(wanted, said):
        raise RuntimeError(f"{name} left with {process.returncode} and did not say what was wrong: {said}")
    times = {"seconds_until_said": seen, "seconds_until_no_process_was_left": gone}
    if kind == "hang":
        allowed = re.search(r"(\d+) s are allowed", said)
        if allowed is None:
            raise RuntimeError(f"{name}: no limit was said: {said}")
        times = {"limit_seconds": float(allowed[1]), "seconds_beyond_the_limit": round(seen - float(allowed[1]), 2)}
        times |= {"seconds_beyond_until_no_process_was_left": round(gone - float(allowed[1]), 2)}
    return {"rank": rank, **times}


def _await_step(bench: Bench, name: str, process: subprocess.Popen[bytes], ranks: int, step: int) -> dict[int, int]:
    """The process ids of the ranks, once each is in this step."""
    from sft_recipes.runtime import heartbeat
    from sft_recipes.runtime.run_dir import RunDir

    folder, until = RunDir(bench.run(name)), time.monotonic() + HANG_SECONDS
    while time.monotonic() < until and process.poll() is None:
        there = {rank: beat.pid for rank, beat in heartbeat.read_heartbeats(folder.ranks).items() if beat.step >= step}
        if len(there) == ranks:
            return there
        time.sleep(0.01)
    raise RuntimeError(f"{name} did not come to step {step}: {bench.said(name).read_text()}")


def _await_end(bench: Bench, name: str, struck: float) -> tuple[float, float]:
    """Seconds until the parent has said what was wrong, and until no process of the run's ranks and launcher lives."""
    seen = gone = None
    plan = str(bench.run(name) / "plan.json").encode()
    while seen is None or gone is None:
        passed = round(time.monotonic() - struck, 2)
        if passed > HANG_SECONDS:
            raise RuntimeError(f"{name} has not ended {HANG_SECONDS} s after: {bench.said(name).read_text()}")
        if seen is None and re.search(r"^error: ", bench.said(name).read_text(), re.MULTILINE):
            seen = passed
        if gone is None and not any(plan in command for command in _commands()):
            gone = passed
        time.sleep(0.02)
    return seen, gone


def _commands() -> Iterator[bytes]:
    """The command line of every living process that this user can see; a zombie has none."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield path.read_bytes()


# What is measured in the ranks.

NOTES: list[dict[str, Any]] = []
SPENT: dict[str, float] = defaultdict(float)


def watch_this_rank() -> None:
    """Called in each rank before its program runs; notes are written when it ends."""
    from sft_recipes.training.library_logging import silence_libraries

    silence_libraries()
    {"saves": _clock_saves, "agreement": _clock_agreement}[os.environ[WATCHED]]()
    atexit.register(_write_notes, Path(os.environ[MEASUREMENTS]) / f"{os.environ.get('RANK', '0')}.jsonl")


def _write_notes(file: Path) -> None:
    file.write_text("".join(json.dumps(note) + "\n" for note in NOTES))


def _clocked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def clocked(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            SPENT[part] += time.perf_counter() - began

    return clocked


def _clock_saves() -> None:
    """Time each part of a save, and the baselines after each save."""
    from sft_recipes.training import trainer
    from sft_recipes.training.callbacks.integrity_log import IntegrityCallback
    from sft_recipes.training.callbacks.keep_best import RetentionCallback
    from sft_recipes.training.checkpoint import checkpoint_format
    from sft_recipes.training.checkpoint.writer import CheckpointWriter

    checkpoint_format.compute_checksums = _clocked(checkpoint_format.compute_checksums, "syncing and hashing")
    checkpoint_format.sha256 = _clocked(checkpoint_format.sha256, "hashing")
    checkpoint_format.write_commit_marker = _clocked(checkpoint_format.write_commit_marker, "sealing")
    checkpoint_format.publish = _clocked(checkpoint_format.publish, "sealing")
    IntegrityCallback.check_before_save = _clocked(IntegrityCallback.check_before_save, "proving")
    whole, save, forget = (
        CheckpointWriter.write_atomically,
        trainer.RecipeTrainer._save_checkpoint,
        RetentionCallback.on_save,
    )

    def whole_clocked(self: Any, target: Path, write: Callable[[], None], *more: Any) -> str | None:
        return whole(self, target, _clocked(write, "writing"), *more)

    def save_and_compare(self: Any, model: Any, trial: Any) -> None:
        SPENT.clear()
        began = time.perf_counter()
        save(self, model, trial)
        stall = time.perf_counter() - began
        if self.checkpoint_writer.retry_at_step is not None:
            raise RuntimeError("a save was refused; what the run said before tells why")
        parts = {part: SPENT[part] for part in PARTS}
        parts["syncing"] = SPENT["syncing and hashing"] - SPENT["hashing"]
        parts["agreeing"] = stall - sum(parts.values())
        NOTES.append({"step": self.state.global_step, "parts": parts, **_beside(self, model, trial)})

    def forget_clocked(self: Any, *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        forget(self, *arguments, **named)
        NOTES[-1]["parts"]["forgetting"] = time.perf_counter() - began

    CheckpointWriter.write_atomically, trainer.RecipeTrainer._save_checkpoint = whole_clocked, save_and_compare
    RetentionCallback.on_save = forget_clocked


def _beside(trainer: Any, model: Any, trial: Any) -> dict[str, float]:
    """Seconds that all ranks take for a plain write of as many bytes, for the stock trainer's save of this state, and
    for syncing what that wrote; which of both is first changes from save to save."""
    ways = [("plain", lambda folder: _write_plainly(trainer, folder)),
            ("stock", lambda folder: _save_as_stock(trainer, model, trial, folder))]  # fmt: skip
    seconds = {}
    for name, way in ways if trainer.state.global_step % 2 else reversed(ways):
        folder = Path(trainer.args.output_dir) / f".{name}"
        folder.mkdir(exist_ok=True)
        seconds[name] = _together(trainer, functools.partial(way, folder))
        seconds[f"{name}_sync"] = _together(trainer, functools.partial(_sync_mine, trainer, folder))
        if trainer.accelerator.is_main_process:
            shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()
    return seconds


def _together(trainer: Any, work: Callable[[], None]) -> float:
    trainer.accelerator.wait_for_everyone()
    began = time.perf_counter()
    work()
    trainer.accelerator.wait_for_everyone()
    return time.perf_counter() - began


def _write_plainly(trainer: Any, folder: Path) -> None:
    """As many bytes as this rank has just saved, in one file, and fsync."""
    from sft_recipes.training.checkpoint import checkpoint_format

    rank = trainer.accelerator.process_index
    saved = checkpoint_format.read_commit_marker(
        trainer.checkpoint_writer.folder.checkpoint(trainer.state.global_step)
    )["files"]
    left = sum(file["bytes"] for name, file in saved.items() if checkpoint_format.writing_rank(name) == rank)
    piece = memoryview(_noise())
    with (folder / f"plain-{rank}").open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(piece[: min(left, PIECE_BYTES)])
        os.fsync(file.fileno())


@functools.cache
def _noise() -> bytes:
    """Bytes that a disk cannot make fewer."""
    return os.urandom(PIECE_BYTES)


def _save_as_stock(trainer: Any, model: Any, trial: Any, folder: Path) -> None:
    """The stock trainer's own save of this very state: under DeepSpeed without the file `latest` and the script that
    `CheckpointWriter` leaves out."""
    from trl import SFTTrainer

    own, place = type(trainer), trainer.args.output_dir
    trainer.__class__, trainer.args.output_dir = SFTTrainer, str(folder)
    try:
        trainer._save_checkpoint(model, trial)
    finally:
        trainer.__class__, trainer.args.output_dir = own, place


def _sync_mine(trainer: Any, folder: Path) -> None:
    """Each rank has the system write its own files to the disk."""
    from sft_recipes.runtime.atomic_write import sync
    from sft_recipes.training.checkpoint import checkpoint_format

    for path in _files(folder):
        if checkpoint_format.writing_rank(path.name) == trainer.accelerator.process_index:
            sync(path)


def _clock_agreement() -> None:
    """Time the ranks' agreement, once more when no rank waits for another, and the integrity checks. Rank 0's clock."""
    from sft_recipes.training.callbacks.graceful_stop import GracefulStopCallback
    from sft_recipes.training.callbacks.integrity_log import IntegrityCallback
    from sft_recipes.training.integrity import fingerprint
    from sft_recipes.training.integrity.data_order import DataOrderCheck

    on_step_end, step = GracefulStopCallback.on_step_end, [0]

    def agree_twice(self: Any, args: Any, state: Any, *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        on_step_end(self, args, state, *arguments, **named)
        met = time.perf_counter()
        self.stop_requested()
        aligned = time.perf_counter() - met
        step[0] = state.global_step
        NOTES.append({"step": step[0], "began": began, "asked": met - began, "aligned": aligned})

    def noted(function: Callable[..., Any], key: str, part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def clocked(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = function(*arguments, **named)
            NOTES.append({"step": step[0], key: time.perf_counter() - began, "part": part})
            return found

        return clocked

    GracefulStopCallback.on_step_end = agree_twice
    fingerprint.of_rank = noted(fingerprint.of_rank, "digest", "of_rank")
    for owner, name in (
        (IntegrityCallback, "check_before_save"),
        (IntegrityCallback, "on_step_end"),
        (DataOrderCheck, "record_batches"),
    ):
        setattr(owner, name, noted(getattr(owner, name), "proof", f"{owner.__name__}.{name}"))


# Summaries.


def _spread(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile, by nearest rank."""
    return {"p50": _median(values), "p95": round(sorted(values)[math.ceil(0.95 * len(values)) - 1], 4)}


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 4)


def _gpus() -> int:
    from sft_recipes.launch.topology import visible_gpus

    return len(visible_gpus())


def _circumstances(parsed: argparse.Namespace) -> dict[str, Any]:
    import machine  # in this folder, which is not on the path of the ranks

    return {
        "machine": machine.described(),
        "device": parsed.device,
        "disk": _file_system(parsed.disk.resolve()),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "commit": machine.commit(),
        "recipe": "tiny; for saves with a wider architecture",
    }


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    table = Path("/proc/mounts")
    mounts = [line.split() for line in table.read_text().splitlines()] if table.is_file() else []
    holds = [(point, kind) for _, point, kind, *_ in mounts if folder.is_relative_to(point)]
    return max(holds, key=lambda one: len(one[0]), default=("", "not known"))[1]


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
