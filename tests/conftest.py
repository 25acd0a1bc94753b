"""Fixtures: one small model, data set and run for many tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.workplace import (
    HELPERS,
    LONG,
    PLANTED_KEY,
    REPOSITORY,
    SHORT,
    SMALL_LLAMA,
    UNREACHABLE_WANDB,
    Workplace,
    simulated_device,
)

from sft_recipes import cli
from sft_recipes.runtime import env, log

env.limit_thread_spin()  # before any test imports torch


# A test process gets the next file when it has finished one: the slowest first, or at the end one core waits for the other.
# In tests/strategies, those that start runs of their own before those that use runs of test_trajectories.py.
FIRST = (
    "test_make_train.py", "test_watchdog.py", "test_train.py", "test_two_nodes.py", "test_checkpoint.py", "test_hub.py",
    "test_security.py", "test_lora.py", "test_fake_gpus.py", "test_benchmarks.py", "test_verify_resume.py",
    "test_nan_guard.py", "test_prepare_process.py", "test_weight_files.py",
    "test_trajectories.py", "test_step_memory.py", "test_traced_types.py", "test_chaos.py", "test_recipes_train.py",
    "test_sanity_strategies.py", "test_zero3_large_models.py", "test_hierarchical_partitioning.py",
    "test_nan_guard_strategies.py", "test_world_sizes.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that `make test` and `make test-strategies` use."""
    parser.addoption(
        "--preloaded",
        action="store_true",
        help="fork ranks and data preparation from processes with imported libraries",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the server that forks them, for all test processes: they inherit its address."""
    if not config.getoption("--preloaded") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="preload-")
    address = f"{folder.name}/server"
    path = os.pathsep.join(map(str, (REPOSITORY, HELPERS.parent, HELPERS / "at_start")))
    server = subprocess.Popen(
        [sys.executable, "-m", "helpers.preload_server", address, "-" * 4000], start_new_session=True, env={**os.environ, "PYTHONPATH": path}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    os.environ.update(PRELOAD_SERVER=address, PYTHONPATH=str(HELPERS / "at_start"))

    def stop() -> None:
        assert server.poll() is None, "the server of forked ranks has failed"
        server.terminate()
        server.wait()
        folder.cleanup()

    config.add_cleanup(stop)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files, and skip the tests that compile where there is nothing to compile with."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if shutil.which("c++") and Path(sysconfig.get_path("include"), "Python.h").is_file():
        return
    reason = "DeepSpeed compiles an operator at its first start: needs a C++ compiler and Python's headers"
    for item in items:
        if item.get_closest_marker("needs_compiler"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def no_gpu_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of machines with GPUs: a job's CUDA_VISIBLE_DEVICES would hide some of theirs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def workplace(tmp_path: Path, shared_workplace: Workplace) -> Workplace:
    store = shared_workplace.runs / ".prepared"
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Workplace(tmp_path, store)


@pytest.fixture(autouse=True)
def _remove_log_handlers() -> Iterator[None]:
    """Undo what the command line sets up for messages; pytest captures them by its own handlers."""
    yield
    log.ROOT.handlers.clear()
    log.ROOT.propagate = True


@pytest.fixture
def in_process(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Function that runs the command line in this process, as on a machine without GPUs unless PATH is given."""
    monkeypatch.chdir(workplace.path)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        for name, value in workplace.environment(**variables).items():
            monkeypatch.setenv(name, value)
        if "PATH" not in variables:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        return subprocess.CompletedProcess(arguments, cli.main(arguments), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def shared_workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """For runs that several tests look at, in whichever of pytest's processes; its prepared data is made once."""
    own = tmp_path_factory.getbasetemp()
    place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    place.mkdir(exist_ok=True)
    return Workplace(place)


@pytest.fixture(scope="session")
def short_run(shared_workplace: Workplace) -> Path:
    """The tiny recipe, eight steps, one process, after the sanity check on a device just large enough for one trainer."""
    counted = simulated_device(shared_workplace.path / "device.jsonl", size=1.05)
    return shared_workplace.trained_once("short", *SHORT, SANITY="", **counted)


@pytest.fixture(scope="session")
def tracked_run(shared_workplace: Workplace, short_run: Path) -> Path:
    """The same again, which finds the receipt, with both trackers."""
    trackers = {"REPORT_TO": "tensorboard,wandb", **UNREACHABLE_WANDB}
    keys = {"WANDB_API_KEY": PLANTED_KEY, "HF_TOKEN": PLANTED_KEY}
    return shared_workplace.trained_once("tracked", *SHORT, SANITY="", **trackers, **keys)


@pytest.fixture(scope="session")
def long_run(shared_workplace: Workplace, few_rows: Path) -> Path:
    """One process, thirty steps."""
    return shared_workplace.trained_once("long", f"data.train={few_rows}", *LONG)


@pytest.fixture(scope="session")
def long_ddp_run(shared_workplace: Workplace, few_rows: Path) -> Path:
    """The same on two ranks."""
    ranks = ("--gpus", "0", "--processes", "2")
    return shared_workplace.trained_once("long-ddp", *ranks, f"data.train={few_rows}", *LONG)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small Llama with a ChatML tokenizer, as `save_pretrained` writes one."""
    from sft_recipes.data.toy import toy_model

    folder = tmp_path_factory.mktemp("models") / "small"
    texts = ["Which letter is first?", "The first letter is a.", "Add 12 and 30.", "42"] * 50
    toy_model.build(SMALL_LLAMA, texts, folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def bf16_model_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model in bf16, as pretrained models are."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "bf16"
    shutil.copytree(model_folder, folder)
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


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


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """Print log messages as the command line does; `capsys`, to read them."""
    log.to_console()
    return capsys
