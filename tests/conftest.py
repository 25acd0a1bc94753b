"""What the tests share: the command line as a user has it, and one small model, data set and run for many tests."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from sft_recipes.runtime import env

env.limit_thread_spin()  # before any test imports torch

REPOSITORY = Path(__file__).resolve().parents[1]

# A hang is a failure, but a slow machine is not: many times what the slowest call takes.
HANG_SECONDS = 900

# What `make test` itself was given reaches the tests' environment, and is not meant for the commands that they try.
VARIABLES = set(re.findall(r"^VARIABLES := (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)[0].split())
GIVEN_BY_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", *VARIABLES}

PLANTED_KEY = "f" * 40  # must be found again nowhere

# The tiny recipe in small: enough steps for two evaluations and two checkpoints.
SHORT = (
    "data.validation_at_most=60",
    "batch.effective_batch_size=8",
    "batch.per_device_at_most=4",
    "trainer.max_length=128",
    "trainer.max_steps=8",
    "trainer.eval_steps=4",
    "trainer.save_steps=4",
    "trainer.logging_steps=1",
    "answers.show=2",
    "answers.exact_match=8",
    "answers.max_new_tokens=4",
)

needs_compiler = pytest.mark.needs_compiler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that compile where there is nothing to compile with."""
    if shutil.which("c++") and Path(sysconfig.get_path("include"), "Python.h").is_file():
        return
    reason = "DeepSpeed compiles an operator at its first start: needs a C++ compiler and Python's headers"
    for item in items:
        if item.get_closest_marker("needs_compiler"):
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Workplace:
    """An empty folder with runs of its own, and the command line in it."""

    path: Path

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in GIVEN_BY_MAKE}
        return {
            **kept,
            "RUNS_DIR": str(self.runs),
            "PYTHONPATH": str(REPOSITORY),
            "REPORT_TO": "none",
            "SANITY": "skip",
            **variables,
        }

    def sft(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs `python -m sft_recipes` and waits for it."""
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
        """Runs `train` to a good end and returns the run's folder.

        Where other tests share the workplace, give `--name`: without it, the newest run is returned.
        """
        done = self.sft("train", *arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        if "--name" in arguments:
            return self.runs / arguments[arguments.index("--name") + 1]
        return max(self.runs.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime).parent

    def trained_once(self, name: str, *arguments: str, **variables: str) -> Path:
        """The run of this name: whoever comes first trains it, the others wait, and find it finished."""
        run = self.runs / name
        with FileLock(self.path / f"{name}.lock"):
            # Not by another start of it: a test in another process may be at `verify-resume`, which holds the run.
            if not (run / "manifest.json").is_file() or manifest(run)["state"] != "finished":
                done = self.sft("train", "tiny", "--name", name, *arguments, **variables)
                assert done.returncode == 0, done.stdout + done.stderr
        return run


def simulated_device(log: Path, size: float = math.inf) -> dict[str, str]:
    """Variables under which each rank of the sanity check writes to `log` what its tensors hold, and has a device of
    `size` times what the trial's trainer holds at its peak (simulated_device/sitecustomize.py)."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "simulated_device")])
    return {"PYTHONPATH": path, "SIMULATED_DEVICE": str(log), "SIMULATED_DEVICE_SIZE": str(size)}


def assert_one_trainer_at_a_time(log: Path, ranks: int) -> None:
    """Each rank builds its second trainer in another process than its first, which holds at most 2% of the first one's
    peak by then, and no more than 1.05 times that peak until it exits."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for rank in range(ranks):
        of_rank = [line for line in lines if line["rank"] == rank]
        assert [line["event"] for line in of_rank] == ["build", "exit", "build", "exit"]
        _, trial, second, reload = of_rank
        assert trial["process"] != second["process"] == reload["process"]
        assert second["held"] <= 0.02 * trial["peak"]
        assert 0.1 * trial["peak"] < reload["peak"] <= 1.05 * trial["peak"]


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def no_gpu_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of machines with GPUs: a job's CUDA_VISIBLE_DEVICES would hide some of theirs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(scope="session")
def shared_workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """For runs that several tests look at, in whichever of pytest's processes; its prepared data is made once."""
    own = tmp_path_factory.getbasetemp()
    place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    place.mkdir(exist_ok=True)
    return Workplace(place)


@pytest.fixture(scope="session")
def short_run(shared_workplace: Workplace) -> Path:
    """The tiny recipe, eight steps, one process; the sanity gate goes before it, as for a user."""
    counted = simulated_device(shared_workplace.path / "device.jsonl")
    return shared_workplace.trained_once("short", *SHORT, SANITY="", **counted)


@pytest.fixture(scope="session")
def tracked_run(shared_workplace: Workplace, short_run: Path) -> Path:
    """The same again, which finds the receipt, with both trackers: nothing listens on port 9, so W&B's go offline."""
    trackers = {"REPORT_TO": "tensorboard,wandb", "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    keys = {"WANDB_API_KEY": PLANTED_KEY, "HF_TOKEN": PLANTED_KEY}
    return shared_workplace.trained_once("tracked", *SHORT, SANITY="", **trackers, **keys)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small Llama with a ChatML tokenizer, as `save_pretrained` writes one."""
    from sft_recipes.data.toy import toy_model

    folder = tmp_path_factory.mktemp("models") / "small"
    texts = ["Which letter is first?", "The first letter is a.", "Add 12 and 30.", "42"] * 50
    toy_model.build(SMALL_LLAMA, texts, folder, seed=0)
    return folder


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


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path):
    from sft_recipes.data.tokenizer import load_tokenizer

    return load_tokenizer(str(model_folder), None, False)


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred of the embedded rows, which are prepared in a moment."""
    from sft_recipes.data.toy import toy_dataset

    path = tmp_path_factory.mktemp("rows") / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_dataset.rows(300, False)), encoding="utf-8")
    return path


@pytest.fixture
def write_rows(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes rows to a JSONL file and returns it."""

    def write(rows: list, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    yield write
