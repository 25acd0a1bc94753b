"""The sanity gate as a user starts it: under each engine, and stopped by what is wrong."""

import resource
import subprocess
import sys

import pytest
from conftest import needs_compiler

SMALL = ("trainer.max_length=128", "answers.show=2", "answers.exact_match=0", "answers.max_new_tokens=4")


def lines_of(done, word):
    return {line[6:22].strip(): line for line in done.stdout.splitlines() if line.startswith(word)}


@needs_compiler
@pytest.mark.parametrize(
    ("engine", "precision"),
    [("ddp", "fp32"), ("zero2", "fp32"), ("zero3", "bf16"), ("zero3_offload", "bf16"), ("fsdp2", "bf16")],
)
def test_the_trial_passes_under_every_engine(workplace, few_rows, engine, precision):
    """Its checkpoint is saved, loaded and gone on from by that engine, in one process with the first trainer."""
    done = workplace.sft(
        "sanity", "tiny", "--gpus", "0", "--processes", "2", f"parallelism={engine}", f"precision={precision}",
        f"data.train={few_rows}", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"loss falls", "numbers", "evaluation", "checkpoint"} <= set(lines_of(done, "PASS"))
    assert "answers" in lines_of(done, "  - "), "of a model that began with random weights"


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
        workplace, f"data.train={few_rows}", *SMALL, "trainer.learning_rate=2.0", "outside_range=[learning_rate]"
    )
    assert "loss falls" in found and "the fall is -" in found["loss falls"]


def test_rows_longer_than_memory_allows_fail_for_memory(workplace):
    """The host's memory is the device here; a limit on the processes stands for a small one."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_recipes", "sanity", "tiny", "batch.per_device_at_most=64",
         "batch.effective_batch_size=64", "trainer.max_length=2048", "model.attention=eager"],
        cwd=workplace.path, env=workplace.environment(SANITY=""), capture_output=True, text=True, timeout=900,
        check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(lines_of(done, "FAIL")) == {"peak memory"} and "ran out of memory" in done.stdout
    assert "Traceback" not in done.stderr
