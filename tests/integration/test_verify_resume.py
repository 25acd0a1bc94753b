"""`verify-resume` on real runs: what resumes exactly, and what does not."""

import dataclasses
import shutil

import pytest
import torch

from sft_recipes.launch import run_lock
from sft_recipes.planner import plan as plans
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.tools import verify_resume
from sft_recipes.tools.verify_resume import Replay
from sft_recipes.training.checkpoint import checkpoint_format

EQUAL = "equal    equal      equal      equal  equal  equal"


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.name != ".lock"}


def table(done):
    """The lines of the table behind their steps, and the verdict."""
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("step  "))
    return [line.rstrip() for line in lines[first + 1 : first + 4]], lines[-1]


def test_a_finished_run_is_shown_to_resume_exactly_however_python_ends(shared_workplace, short_run, tmp_path):
    """Under each engine: tests/strategies/test_integrity_strategies.py. A rank may be aborted when its work is done."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "if sys.orig_argv[1:3] == ['-m', 'sft_recipes.tools.replay_worker']:\n    atexit.register(os.abort)"
    )
    before = files(short_run)
    python_path = f"{tmp_path}:{shared_workplace.environment()['PYTHONPATH']}"
    done = shared_workplace.sft("verify-resume", short_run.name, PYTHONPATH=python_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (loaded, *steps), verdict = table(done)
    assert loaded == "4, as loaded  equal    equal      equal      equal"
    assert steps == [f"{step}             {EQUAL}" for step in (5, 6)]
    assert verdict == "exact: this run resumes as if it had not stopped, bit for bit"
    assert files(short_run) == before, "it is only read"


def test_a_run_of_several_nodes_is_tried_on_as_many(short_run, tmp_path):
    """What becomes of it there: tests/slurm."""
    folder = RunDir(tmp_path)
    plans.write(dataclasses.replace(plans.read(RunDir(short_run).plan), nodes=2), folder.plan)
    with pytest.raises(UserError, match="was trained on 2 nodes.*here there are 1: salloc --nodes=2"):
        verify_resume.carry_out(folder, print)


def test_an_optimizer_that_is_not_the_one_that_was_saved_is_found_though_its_checksums_match(
    shared_workplace, short_run
):
    run = shared_workplace.runs / "altered"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns(".lock"))
    altered = RunDir(run).checkpoint(4)
    state = torch.load(altered / "optimizer.pt", weights_only=True)
    momentum = state["state"][0]["exp_avg"].view(-1)
    momentum[momentum.abs().argmax()] *= 2  # one bit
    torch.save(state, altered / "optimizer.pt")
    record = checkpoint_format.read_commit_marker(altered)
    checkpoint_format.write_commit_marker(
        altered, {**record, "files": checkpoint_format.compute_checksums(altered, record["files"])}
    )
    done = shared_workplace.sft("verify-resume", "altered")
    assert done.returncode == 1, done.stdout + done.stderr
    (loaded, fifth, _sixth), verdict = table(done)
    assert loaded.split() == ["4,", "as", "loaded", "equal", "differs", "equal", "equal"]
    assert fifth.split() == ["5", "differs", "differs", "equal", "equal", "equal", "equal"]
    assert verdict.startswith("not exact: step 4 as loaded: optimizer; step 5: weights, optimizer; step 6: ")


def test_a_run_that_is_being_carried_out_is_left_alone(shared_workplace, short_run):
    run = shared_workplace.runs / "held"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns(".lock"))
    with run_lock.held(RunDir(run)):
        done = shared_workplace.sft("verify-resume", run.name)
    assert (done.returncode, done.stdout) == (2, "") and "is being carried out by" in done.stderr


def test_the_newest_checkpoint_with_a_recorded_step_behind_it_comes_first(tmp_path):
    folder, recorded = RunDir(tmp_path), {step: {} for step in (4, 5, 6, 7, 8, 9, 11, 12)}
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        verify_resume._candidates(folder, recorded)
    for step in (4, 8, 10, 12):
        folder.checkpoint(step).mkdir()
    assert verify_resume._candidates(folder, recorded) == [(10, 12), (8, 9), (4, 6), (12, 12)]


def state(weights="w", optimizer="o", rng="r"):
    return {"weights": weights, "optimizer": optimizer, "scheduler": "s", "rng": rng}


def lines(*losses, weights="w"):
    return {
        step: {
            "step": step,
            "loss": loss,
            "rows_hash": "c",
            "fingerprints": [state(weights), state()],
            "resumed_from": None,
        }
        for step, loss in enumerate(losses, start=5)
    }


def replayed(steps, loaded=()):
    return Replay(4, {"fingerprints": [state(), state()]}, list(loaded) or [state(), state()], steps, [], {})


@pytest.mark.parametrize(
    ("first", "second", "within"),
    [
        (lines(2.0, 1.5, weights="x"), lines(2.0, 1.5 + 2e-7, weights="y"), True),
        (lines(2.0, 1.5 + 9e-7, weights="x"), lines(2.0, 1.5 + 8e-7, weights="y"), False),
        (lines(2.0, 1.5 + 1e-7, weights="x"), lines(2.0, 1.5 + 1e-7, weights="x"), False),
        (lines(2.0, 1.5, weights="x"), lines(2.0, 1.5, weights="x"), False),
    ],
    ids=["as near as two replays", "further away", "two replays are the same", "other weights, the same each time"],
)
def test_where_kernels_differ_from_time_to_time_the_losses_must_lie_within_what_was_measured(first, second, within):
    said = []
    recorded = lines(2.0, 1.5)
    assert verify_resume._only_bits(replayed(first), recorded)
    found = verify_resume._is_within_the_tolerance(replayed(first), replayed(second), recorded, said.append)
    assert found is within
    assert ("within the tolerance that was measured" in said[-1]) is within and "two replays differ by up to" in said[
        -1
    ]


def test_other_rows_or_random_numbers_are_never_explained_by_kernels():
    recorded = lines(2.0, 1.5)
    assert not verify_resume._only_bits(replayed(recorded), recorded)
    for key, value in (("rows_hash", "d"), ("fingerprints", [state(), state(rng="q")])):
        assert not verify_resume._only_bits(replayed({**recorded, 6: {**recorded[6], key: value}}), recorded)


def test_the_rank_that_differs_is_named(tmp_path):
    recorded = lines(2.0, 1.5)
    found = replayed(lines(2.0, 1.5, weights="x"), loaded=[state(), state(optimizer="p")])
    assert verify_resume._table(found, recorded)[1][2] == "differs (rank 1)"
    assert verify_resume._table(found, recorded)[2][1] == "differs (rank 0)"
