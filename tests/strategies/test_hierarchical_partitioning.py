"""ZeRO-3 on two nodes of two ranks each: every node holds a copy of the weights (DeepSpeed's `zero_hpz_partition_size`).

Earlier versions of DeepSpeed computed with outdated copies, also after a checkpoint was loaded
(https://github.com/deepspeedai/DeepSpeed/issues/4851, 7606), so a run that is killed and resumed is compared with one
node.
"""

import contextlib
import json
import os
import subprocess
import sys
import time

from helpers.workplace import HANG_SECONDS, SHORT, metrics, needs_compiler

pytestmark = needs_compiler
PORT = 15000 + os.getpid() % 1500 * 10
COMMAND = ("tiny", "--gpus", "0", "--processes", "4", *SHORT, "trainer.max_steps=16", "parallelism=zero3")


@contextlib.contextmanager
def launched(workplace, name):
    place = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(PORT)}
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "sft_recipes", "train", *COMMAND, "--nodes", "2", "--name", name],
            cwd=workplace.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=workplace.environment(**place, PET_NODE_RANK=str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield launchers
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


def test_copy_of_the_weights_per_node_changes_no_step_also_after_a_resume(shared_workplace):
    reference = shared_workplace.trained_once("four-ranks", *COMMAND[1:])
    name, run = "copies", shared_workplace.runs / "copies"
    prepare = ("prepare", *COMMAND, "--nodes", "2", "--name", name)
    assert shared_workplace.sft(*prepare).returncode == 0
    until = time.monotonic() + HANG_SECONDS
    with launched(shared_workplace, name) as launchers:
        while not ((run / "checkpoint-4").is_dir() and len(metrics(run)) > 5):
            assert time.monotonic() < until and launchers[0].poll() is None, launchers[0].communicate()[0]
            time.sleep(0.1)
    assert shared_workplace.sft(*prepare).returncode == 0
    with launched(shared_workplace, name) as launchers:
        outputs = [launcher.communicate(timeout=HANG_SECONDS)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "resuming from checkpoint-" in outputs[0]
    configured = json.loads((run / "deepspeed.json").read_text())["zero_optimization"]
    assert configured["zero_hpz_partition_size"] == 2
    found, expected = (
        {line["step"]: line["loss"] for line in metrics(of) if "loss" in line} for of in (run, reference)
    )
    assert found == expected
