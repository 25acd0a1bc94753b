"""Wherever a run was cut off, in an epoch, at its end, behind the last step, the next start ends with the same bits."""

import json

import pytest
from helpers.stopped_run import stopped
from helpers.trajectories import arguments, data, differences, follow, trained_weights
from helpers.workplace import manifest, metrics

from sft_recipes.runtime.run_dir import RunDir

__all__ = ["data", "follow"]  # fixtures
NOTHING = {"loss": 0.0, "eval_loss": 0.0, "weight": 0.0}
WORKERS = "trainer.dataloader_num_workers"


@pytest.fixture(scope="module")
def padded(follow):
    """Twenty steps, checkpoints at the end of each epoch."""
    return follow("single", 1)


@pytest.fixture(scope="module")
def packed(follow):
    """24 steps, a checkpoint in the middle of the second epoch and one at the end; four micro-batches a step."""
    return follow("single", 1, True, "fp32", "trainer.save_steps=18")


def words(data, name, packing, *more):
    return ["tiny", "--name", name, *arguments(data, "single", 1, packing, "fp32"), *more]


def gone_on_with(workplace, run, step, *arguments):
    folder = stopped(run, arguments[2], step)
    done = workplace.sft("train", *arguments)
    assert done.returncode == 0 and f"resuming from checkpoint-{step}" in done.stdout, done.stdout + done.stderr
    assert manifest(folder.path)["best_step"] == manifest(run)["best_step"]
    return folder.path


def test_at_an_epochs_end_and_with_data_workers_the_rows_are_the_same(shared_workplace, padded, data):
    more = words(data, "padded-10", False, f"{WORKERS}=2")
    run = gone_on_with(shared_workplace, padded, 10, *more, "--allow-change", "dataloader_num_workers")
    assert differences(padded, run) == NOTHING


def test_in_the_middle_of_an_epoch_of_packed_rows_with_data_workers_too(shared_workplace, packed, data):
    more = words(data, "packed-18", True, "trainer.save_steps=18", f"{WORKERS}=2")
    run = gone_on_with(shared_workplace, packed, 18, *more, "--allow-change", "dataloader_num_workers")
    assert json.loads((run / "plan.json").read_text())["packing"] and differences(packed, run) == NOTHING


def test_behind_the_last_step_only_the_model_is_published(shared_workplace, padded, data):
    run = gone_on_with(shared_workplace, padded, 20, *words(data, "padded-20", False))
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 20
    assert metrics(run)[-1] == metrics(padded)[-1] and "final/total_steps" in metrics(run)[-1], "it is summed up"
    for name in ("last", "final"):
        ours, theirs = (trained_weights(folder / name) for folder in (padded, run))
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)


def test_a_finished_run_does_nothing(shared_workplace, padded, data):
    before = {path: path.stat().st_mtime_ns for path in padded.rglob("*") if path.name != ".lock"}
    done = shared_workplace.sft("train", *words(data, padded.name, False))
    assert done.returncode == 0 and "is finished" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in padded.rglob("*") if path.name != ".lock"}
    assert RunDir(padded).state() == "finished"
