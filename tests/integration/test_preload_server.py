"""Forked ranks do what ranks do that Python starts, and die with the process that asked for them."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import process_tree
from helpers.workplace import HANG_SECONDS, LONG, LONG_STEPS, REPOSITORY, metrics
from safetensors.torch import load_file

from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import RunDir

pytestmark = pytest.mark.skipif("PRELOAD_SERVER" not in os.environ, reason="needs pytest --preloaded")
RANKS = ("--gpus", "0", "--processes", "2")


def test_forked_ranks_train_to_the_same_weights(long_ddp_run, few_rows, shared_workplace):
    started = shared_workplace.trained_once(
        "long-ddp-started", *RANKS, f"data.train={few_rows}", *LONG, PYTHONPATH=str(REPOSITORY)
    )
    left, right = (load_file(run / "last" / "model.safetensors") for run in (long_ddp_run, started))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (long_ddp_run, started)]
    assert losses[0] == losses[1] and len(losses[0]) == LONG_STEPS


def test_forked_ranks_die_with_the_command(few_rows, shared_workplace):
    run, options = RunDir(shared_workplace.runs / "killed"), (*RANKS, f"data.train={few_rows}", *LONG)
    with subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", "killed", *options],
        cwd=shared_workplace.path, env=shared_workplace.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as command:  # fmt: skip

        def steps():
            return any(rank.step > 1 for rank in heartbeat.read_heartbeats(run.ranks).values())

        assert wait_until(steps, HANG_SECONDS, 0.1)
        ranks = [rank.pid for rank in heartbeat.read_heartbeats(run.ranks).values()]
        assert len(ranks) == 2 and not set(ranks) & set(process_tree(command.pid)), "they are forks of the server"
        command.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(map(heartbeat.process_state, ranks)), 30, 0.1)


def test_server_outlives_programs_that_fail(tmp_path, shared_workplace):
    for content in (b"", b"\x0f", b"{}"):  # ended before its request, signalled before it, and no request
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as program:
            program.connect(os.environ["PRELOAD_SERVER"])
            if content:
                program.send(content)
    environment = shared_workplace.environment()

    def run(program, file, **more):
        return subprocess.run(
            [sys.executable, "-m", f"sft_recipes.training.{program}", str(file)], input="{}", env=environment,
            capture_output=True, text=True, check=False, timeout=HANG_SECONDS, **more,
        )  # fmt: skip

    failed = run("rank_launcher", tmp_path / "absent" / "plan.json")
    assert failed.returncode == 1 and "sitecustomize.py" in failed.stderr
    traced = run("layer_trace", tmp_path / "forked.json")
    limit = (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    limited = run(
        "layer_trace", tmp_path / "started.json", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    )
    assert (traced.returncode, traced.stdout, traced.stderr) == (0, "", "") and limited.returncode == 0, limited.stderr
    forked, started = ((tmp_path / f"{name}.json").read_text() for name in ("forked", "started"))
    assert forked == started and "problem" in forked


def test_launcher_that_is_killed_is_named(few_rows, shared_workplace):
    """The exit code of a fork reaches the process that asked."""
    run, options = RunDir(shared_workplace.runs / "no-launcher"), (*RANKS, f"data.train={few_rows}", *LONG)
    with subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", "no-launcher", *options], text=True,
        cwd=shared_workplace.path, env=shared_workplace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as command:  # fmt: skip
        assert wait_until(lambda: len(heartbeat.read_heartbeats(run.ranks)) == 2, HANG_SECONDS, 0.1)
        parent = (
            Path(f"/proc/{heartbeat.read_heartbeats(run.ranks)[0].pid}/stat").read_text().rpartition(")")[2].split()[1]
        )
        assert b"rank_launcher" in Path(f"/proc/{parent}/cmdline").read_bytes()
        os.kill(int(parent), signal.SIGKILL)
        output = command.communicate(timeout=HANG_SECONDS)[0]
    assert command.returncode == 1 and "launcher of the ranks: killed by SIGKILL" in output, output
