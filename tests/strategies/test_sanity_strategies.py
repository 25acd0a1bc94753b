"""The sanity check as a user starts it: under each strategy, and with failures."""

import resource
import signal
import subprocess
import sys

import pytest
from helpers.workplace import SMALL_ARCHITECTURE, assert_one_trainer_at_a_time, needs_compiler, simulated_device

SMALL = ("trainer.max_length=128", "generation.show=2", "generation.score=0", "generation.max_new_tokens=4")


def lines_of(done, label):
    return {line[6:20].strip(): line for line in done.stdout.splitlines() if line.startswith(label)}


@pytest.mark.parametrize(
    ("parallelism", "precision"),
    [
        pytest.param("zero2", "fp32", marks=needs_compiler),  # language: ok, pytest
        pytest.param("zero3", "bf16", marks=needs_compiler),  # language: ok, pytest
        ("fsdp2", "bf16"),
    ],
)
def test_trial_passes_under_each_strategy(workplace, few_rows, parallelism, precision):
    """It saves a checkpoint and resumes from it on a device just large enough for one trainer. One process:
    tests/integration/test_sanity.py; DDP, on a device of any size: tests/slurm/test_jobs.py."""
    log = workplace.path / "device.jsonl"
    done = workplace.sft(
        "sanity", "tiny", "--gpus", "0", "--processes", "2", f"parallelism={parallelism}", f"precision={precision}",
        f"data.train={few_rows}", *SMALL, *([SMALL_ARCHITECTURE] if precision == "bf16" else []),
        **simulated_device(log, size=1.05),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"loss falls", "finite values", "evaluation", "checkpoint"} <= set(lines_of(done, "PASS"))
    assert "completions" in lines_of(done, "SKIP"), "the initial weights were random"
    assert_one_trainer_at_a_time(log, ranks=2)


def test_reload_out_of_memory_fails_memory_check(workplace, few_rows):
    log = workplace.path / "device.jsonl"
    done = workplace.sft("sanity", "tiny", f"data.train={few_rows}", *SMALL, **simulated_device(log, size=0.5))
    assert done.returncode == 1, done.stdout + done.stderr
    failed = lines_of(done, "FAIL")
    assert set(failed) == {"peak memory"} and "rank 0 ran out of memory" in done.stdout
    assert "fix: " in done.stdout and "Traceback" not in done.stderr
    assert list((workplace.runs / ".sanity").iterdir()) == [], "no cached result"


def test_stop_during_reload_leaves_no_files(workplace, few_rows):
    command = [sys.executable, "-m", "sft_recipes", "sanity", "tiny", f"data.train={few_rows}", *SMALL]
    environment = workplace.environment(PYTHONUNBUFFERED="1")
    with subprocess.Popen(command, cwd=workplace.path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("PASS  evaluation"):  # the trial has ended
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 75 and lines[-1].startswith("stopped during the sanity check"), lines
    assert not any("checkpoint-10" in line for line in lines)
    assert list((workplace.runs / ".sanity").iterdir()) == []


def failing(workplace, *overrides):
    """Lines of the failed checks; no run must start."""
    done = workplace.sft("train", "tiny", *overrides, SANITY="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "training not started" in done.stdout and "fix: " in done.stdout
    assert [path for path in workplace.runs.iterdir() if not path.name.startswith(".")] == []
    assert list((workplace.runs / ".sanity").iterdir()) == [], "no cached result"
    return lines_of(done, "FAIL")


def test_train_does_not_start_after_a_failed_check(workplace, few_rows):
    failed = failing(
        workplace, f"data.train={few_rows}", *SMALL, "trainer.learning_rate=2.0", "allow_out_of_range=[learning_rate]"
    )
    assert "(fall -" in failed["loss falls"]


def test_rows_too_long_fail_memory_check(shared_workplace):
    """On the CPU host memory is device memory; a limit on the processes makes it small."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_recipes", "sanity", "tiny", "batch.max_per_device_batch_size=64",
         "batch.effective_batch_size=64", "trainer.max_length=2048", "model.attention=eager"],
        cwd=shared_workplace.path, env=shared_workplace.environment(SANITY=""), capture_output=True, text=True, timeout=900,
        check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(lines_of(done, "FAIL")) == {"peak memory"} and "ran out of memory" in done.stdout
    assert "Traceback" not in done.stderr
