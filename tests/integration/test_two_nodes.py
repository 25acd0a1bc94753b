"""Two nodes by torchrun's variables, without a scheduler: each launcher is a process of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.workplace import HANG_SECONDS, SHORT, Workplace, manifest, metrics

from sft_recipes.launch import outcome
from sft_recipes.runtime import heartbeat

# Below the ports that the kernel gives to connections; each test process has its own ten.
FIRST_PORT = 15000 + os.getpid() % 1500 * 10
TWO = ("--gpus", "0", "--processes", "2", "--nodes", "2", *SHORT, "parallelism=ddp")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


@contextmanager
def launched(workplace: Workplace, name: str, *arguments: str, **variables: str) -> Iterator[list[subprocess.Popen]]:
    """Start `train` on both nodes. The ranks of another launcher around this one are inherited."""
    place = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(FIRST_PORT)}
    inherited = {"RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "5", "PET_NPROC_PER_NODE": "auto"}
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", name, *TWO, *arguments],
            cwd=workplace.path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=workplace.environment(**place, **inherited, PET_NODE_RANK=str(rank), **variables),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield launchers
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


def wait_for_lines(run: Path, lines: int) -> None:
    until = time.monotonic() + HANG_SECONDS
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < lines:
        assert time.monotonic() < until, "the run takes no step"
        time.sleep(0.1)


def ended(launchers: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Wait for both launchers; return their exit codes and outputs."""
    outputs = [launcher.communicate(timeout=HANG_SECONDS)[0] for launcher in launchers]
    return [launcher.returncode for launcher in launchers], outputs


def test_two_nodes_match_a_single_process(shared_workplace: Workplace, short_run: Path) -> None:
    """The all-reduce test and the sanity check on two nodes: tests/slurm, whose jobs run the same code."""
    done = shared_workplace.sft("prepare", "tiny", "--name", "two", *TWO)
    assert done.returncode == 0, done.stderr
    run = shared_workplace.runs / "two"
    assert not (run / "checkpoint-4").exists() and (run / "prepared.json").is_file()
    with launched(shared_workplace, "two") as launchers:
        codes, (first, second) = ended(launchers)
    assert codes == [0, 0], first + second
    assert "trained " in first
    # c10d of node 1 may warn that the store of node 0, which ends first, is gone.
    printed = [text for text in ("starting", "step 1/", "trained", "warning:") if text in second]
    assert printed == [], "node 0 prints what is the same on all nodes"
    assert losses(run) == pytest.approx(losses(short_run), rel=2e-4)
    records = outcome.read_records(outcome.record_folder(run, "manual"))
    assert [(record.node, record.code, record.error) for record in records] == [(0, 0, None), (1, 0, None)]
    with launched(shared_workplace, "two") as launchers:
        codes, (first, second) = ended(launchers)
    assert codes == [0, 0] and "is finished; its model is in" in first
    assert len(manifest(run)["starts"]) == 1


def test_unprepared_or_changed_run_is_rejected_with_the_command(
    shared_workplace: Workplace, in_process: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert shared_workplace.sft("prepare", "tiny", "--name", "other", *TWO).returncode == 0
    place = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}
    done = in_process("train", "tiny", *TWO, **place)
    assert done.returncode == 2 and "NAME: not set" in done.stderr
    done = shared_workplace.sft("train", "tiny", "--name", "none", *TWO, **place)
    assert done.returncode == 2 and not (shared_workplace.runs / "none").exists()
    assert "is not prepared" in done.stderr and "sft_recipes prepare tiny --name none --gpus 0" in done.stderr
    done = shared_workplace.sft("train", "tiny", "--name", "other", *TWO, "trainer.learning_rate=1.0e-3", **place)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "with arguments tiny --name other --gpus 0" in done.stderr
    assert (shared_workplace.runs / "other" / "plan.next.json").is_file(), "the prepared attempt is still there"


def test_killed_rank_of_another_node_is_named(shared_workplace: Workplace) -> None:
    """A stop on several nodes: tests/slurm; by a signal to one rank: test_watchdog.py."""
    run, longer = (
        shared_workplace.runs / "cut",
        ("trainer.max_steps=400", "trainer.save_steps=200", "trainer.eval_steps=200"),
    )
    done = shared_workplace.sft("prepare", "tiny", "--name", "cut", *TWO, *longer)
    assert done.returncode == 0, done.stderr
    with launched(shared_workplace, "cut", *longer) as launchers:
        wait_for_lines(run, 3)
        (heartbeat,) = (run / ".ranks").glob("*-1")
        os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGKILL)
        codes, (first, second) = ended(launchers)
    assert codes == [1, 1], first + second
    assert "rank 1 on " in first and "killed by SIGKILL in step" in first and "out-of-memory killer" in first
    first_failure = outcome.first_failure(outcome.read_records(outcome.record_folder(run, "manual")))
    assert first_failure is not None and first_failure.node == 1


def test_exit_codes_of_two_nodes_on_one_host_are_separate(tmp_path: Path) -> None:
    heartbeat.write_exit_codes(tmp_path, {1: -9}, node=1)
    assert heartbeat.read_exit_codes(tmp_path) is None, "that of node 0 recorded none yet"
    heartbeat.write_exit_codes(tmp_path, {})
    assert [heartbeat.read_exit_codes(tmp_path, node) for node in (0, 1)] == [{}, {1: -9}]
