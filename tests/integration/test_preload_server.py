"""Forked ranks do what ranks do that Python starts, and die with the process that asked for them."""

import os
import signal
import subprocess
import sys

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
