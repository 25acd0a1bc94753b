"""Runs that end early or out of memory."""

import resource
import subprocess
import sys

from helpers.workplace import SHORT, manifest, metrics


def test_out_of_memory_reports_usage_and_cheaper_changes(shared_workplace):
    """On the CPU host memory is device memory; a limit on the process makes it small."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", "too-large", "batch.max_per_device_batch_size=64",
         "batch.effective_batch_size=64", "trainer.max_length=2048", "model.attention=eager", "generation.score=0",
         "generation.show=0", "allow_out_of_range=[effective_batch_size]"],
        cwd=shared_workplace.path, env=shared_workplace.environment(), capture_output=True, text=True, timeout=900, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: rank 0 ran out of memory: " in done.stderr and "forecast " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("to reduce memory, cheapest first: ")


def test_run_stopped_early_is_finished(workplace, few_rows):
    """The learning rate is so high that the validation loss rises from the first evaluation."""
    run = workplace.trained(
        "tiny", f"data.train={few_rows}", *SHORT, "trainer.max_steps=60", "trainer.eval_steps=2",
        "trainer.learning_rate=1.0", "trainer.warmup_ratio=0", "allow_out_of_range=[learning_rate, warmup_ratio]",
        "monitor.early_stopping_patience=1",
    )  # fmt: skip
    content = manifest(run)
    assert content["state"] == "finished" and content["steps"] < 60
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    assert content["best_step"] == min(losses, key=losses.get) and (run / "final" / "model.safetensors").is_file()
    assert metrics(run)[-1]["final/total_steps"] == content["steps"]
    assert "early_stopping" in (run / "warnings.jsonl").read_text()
