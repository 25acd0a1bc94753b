"""Ends of runs that take a whole run to see: early, and for want of memory."""

import resource
import subprocess
import sys

from helpers.workplace import SHORT, manifest, metrics


def test_running_out_of_memory_says_what_was_held_and_what_takes_less(workplace):
    """The host's memory is the device here; a limit on the process stands for a small one."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_recipes", "train", "tiny", "batch.max_per_device_batch_size=64",
         "batch.effective_batch_size=64", "trainer.max_length=2048", "model.attention=eager", "generation.exact_match=0",
         "generation.show=0", "allow_out_of_range=[effective_batch_size]"],
        cwd=workplace.path, env=workplace.environment(), capture_output=True, text=True, timeout=900, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: rank 0 ran out of memory: " in done.stderr and "the plan said" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("the cheapest changes that take less: ")


def test_a_run_that_stops_early_is_a_finished_one(workplace, few_rows):
    """The rate is so high that validation rises from the first evaluation on."""
    run = workplace.trained(
        "tiny", f"data.train={few_rows}", *SHORT, "trainer.max_steps=60", "trainer.eval_steps=2",
        "trainer.learning_rate=1.0", "trainer.warmup_ratio=0", "allow_out_of_range=[learning_rate, warmup_ratio]",
        "monitor.early_stopping_patience=1",
    )  # fmt: skip
    found = manifest(run)
    assert found["state"] == "finished" and found["steps"] < 60
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    assert found["best_step"] == min(losses, key=losses.get) and (run / "final" / "model.safetensors").is_file()
    assert metrics(run)[-1]["final/total_steps"] == found["steps"]
    assert "early_stopping" in (run / "warnings.jsonl").read_text()
