"""A run that does not fit after all."""

import resource
import subprocess
import sys


def test_running_out_of_memory_says_what_was_held_and_what_takes_less(workplace):
    """The host's memory is the device here; a limit on the process stands for a small one."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_recipes", "train", "tiny", "batch.per_device_at_most=64",
         "batch.effective_batch_size=64", "trainer.max_length=2048", "model.attention=eager", "answers.exact_match=0",
         "answers.show=0", "outside_range=[effective_batch_size]"],
        cwd=workplace.path, env=workplace.environment(), capture_output=True, text=True, timeout=900, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: rank 0 ran out of memory: " in done.stderr and "the plan said" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("the cheapest changes that take less: ")
