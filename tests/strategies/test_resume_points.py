"""A run that resumes in an epoch, at its end or after the last step ends bit for bit equal."""

import json

import pytest
from helpers.stopped_run import stopped
from helpers.trajectories import arguments, data, differences, follow, trained_weights
from helpers.workplace import manifest, metrics

__all__ = ["data", "follow"]  # fixtures
NOTHING = {"loss": 0.0, "eval_loss": 0.0, "weight": 0.0}
WORKERS = "trainer.dataloader_num_workers"


@pytest.fixture(scope="module")
def padded(follow):
    """Twenty steps, checkpoints at the end of each epoch."""
    return follow("single", 1)


@pytest.fixture(scope="module")
def packed(follow):
    """24 steps, a checkpoint in the middle of the second epoch and one at the end; four micro-batches per step."""
    return follow("single", 1, True, "bf16")


def options(data, name, packing, *more):
    precision = "bf16" if packing else "fp32"
    return ["tiny", "--name", name, *arguments(data, "single", 1, packing, precision), *more]


def resume(workplace, run, step, *arguments):
    folder = stopped(run, arguments[2], step)
    done = workplace.sft("train", *arguments)
    assert done.returncode == 0 and f"resuming from checkpoint-{step}" in done.stdout, done.stdout + done.stderr
    assert manifest(folder.path)["best_step"] == manifest(run)["best_step"]
    return folder.path


def test_resume_at_epoch_end_with_data_workers(shared_workplace, padded, data):
    more = options(data, "padded-10", False, f"{WORKERS}=2")
    run = resume(shared_workplace, padded, 10, *more, "--allow-change", "dataloader_num_workers")
    assert differences(padded, run) == NOTHING


def test_resume_within_epoch_of_packed_rows_with_data_workers(shared_workplace, packed, data):
    more = options(data, "packed-20", True, f"{WORKERS}=2")
    run = resume(shared_workplace, packed, 20, *more, "--allow-change", "dataloader_num_workers")
    assert json.loads((run / "plan.json").read_text())["packing"] and differences(packed, run) == NOTHING


def test_resume_after_last_step_publishes_the_model(shared_workplace, padded, data):
    run = resume(shared_workplace, padded, 20, *options(data, "padded-20", False))
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 20
    assert metrics(run)[-1] == metrics(padded)[-1] and "final/total_steps" in metrics(run)[-1], "the summary is written"
    for name in ("last", "final"):
        ours, theirs = (trained_weights(folder / name) for folder in (padded, run))
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)
