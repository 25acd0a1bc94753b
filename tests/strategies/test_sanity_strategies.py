"""The sanity gate as a user starts it: under each engine, and stopped by what is wrong."""

import resource
import signal
import subprocess
import sys

import pytest
from helpers.workplace import assert_one_trainer_at_a_time, needs_compiler, simulated_device

SMALL = ("trainer.max_length=128", "generation.show=2", "generation.exact_match=0", "generation.max_new_tokens=4")


def lines_of(done, word):
    return {line[6:22].strip(): line for line in done.stdout.splitlines() if line.startswith(word)}


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("single", "fp32"),
        ("ddp", "fp32"),
        pytest.param("zero2", "fp32", marks=needs_compiler),
        pytest.param("zero3", "bf16", marks=needs_compiler),
        pytest.param("zero3_offload", "bf16", marks=needs_compiler),
        ("fsdp2", "bf16"),
    ],
)
def test_the_trial_passes_under_every_engine_where_one_trainer_fits(workplace, few_rows, engine, precision):
    """Each engine saves a checkpoint and resumes from it on a device just large enough for the trial."""
    log, ranks = workplace.path / "device.jsonl", 1 if engine == "single" else 2
    done = workplace.sft(
        "sanity", "tiny", "--gpus", "0", "--processes", str(ranks), f"parallelism={engine}", f"precision={precision}",
        f"data.train={few_rows}", *SMALL, **simulated_device(log, size=1.05),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"loss falls", "numbers", "evaluation", "checkpoint"} <= set(lines_of(done, "PASS"))
    assert "answers" in lines_of(done, "  - "), "of a model that began with random weights"
    assert_one_trainer_at_a_time(log, ranks)


def test_a_reload_that_runs_out_of_memory_fails_for_it(workplace, few_rows):
    log = workplace.path / "device.jsonl"
    done = workplace.sft("sanity", "tiny", f"data.train={few_rows}", *SMALL, **simulated_device(log, size=0.5))
    assert done.returncode == 1, done.stdout + done.stderr
    failed = lines_of(done, "FAIL")
    assert set(failed) == {"checkpoint"} and "resuming from checkpoint-10: rank 0 ran out of memory" in done.stdout
    assert "what to do: " in done.stdout and "Traceback" not in done.stderr
    assert list((workplace.runs / ".sanity").iterdir()) == [], "no receipt"


def test_a_stop_while_the_checkpoint_is_reloaded_leaves_nothing(workplace, few_rows):
    command = [sys.executable, "-m", "sft_recipes", "sanity", "tiny", f"data.train={few_rows}", *SMALL]
    environment = workplace.environment(PYTHONUNBUFFERED="1")
    with subprocess.Popen(command, cwd=workplace.path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("PASS  evaluation"):  # the trial has ended
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 75 and said[-1].startswith("stopped while the plan was tried"), said
    assert not any("checkpoint-10" in line for line in said)
    assert list((workplace.runs / ".sanity").iterdir()) == []


def failing(workplace, *overrides):
    """The lines of what failed; and that no run began."""
    done = workplace.sft("train", "tiny", *overrides, SANITY="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing was trained" in done.stdout and "what to do: " in done.stdout
    assert [path for path in workplace.runs.iterdir() if not path.name.startswith(".")] == []
    assert list((workplace.runs / ".sanity").iterdir()) == [], "no receipt"
    return lines_of(done, "FAIL")


def test_train_stops_before_it_begins_where_the_trial_fails(workplace, few_rows):
    found = failing(
        workplace, f"data.train={few_rows}", *SMALL, "trainer.learning_rate=2.0", "allow_out_of_range=[learning_rate]"
    )
    assert "loss falls" in found and "the fall is -" in found["loss falls"]


def test_rows_longer_than_memory_allows_fail_for_memory(workplace):
    """The host's memory is the device here; a limit on the processes stands for a small one."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_recipes", "sanity", "tiny", "batch.max_per_device_batch_size=64",
         "batch.effective_batch_size=64", "trainer.max_length=2048", "model.attention=eager"],
        cwd=workplace.path, env=workplace.environment(SANITY=""), capture_output=True, text=True, timeout=900,
        check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(lines_of(done, "FAIL")) == {"peak memory"} and "ran out of memory" in done.stdout
    assert "Traceback" not in done.stderr
