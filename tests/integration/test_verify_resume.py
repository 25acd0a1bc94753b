"""`verify-resume` on real runs that resume exactly, and on altered ones."""

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
    """First three rows of the table, and the last line."""
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("step  "))
    return [line.rstrip() for line in lines[first + 1 : first + 4]], lines[-1]


def test_finished_run_resumes_exactly(shared_workplace, short_run, tmp_path):
    """Also if Python aborts at its exit. Each strategy: tests/strategies/test_integrity_strategies.py."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "if sys.orig_argv[1:3] == ['-m', 'sft_recipes.tools.replay_worker']:\n    atexit.register(os.abort)"
    )
    before = files(short_run)
    python_path = f"{tmp_path}:{shared_workplace.environment()['PYTHONPATH']}"
    done = shared_workplace.sft("verify-resume", short_run.name, PYTHONPATH=python_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed short from checkpoint-4 (single on 1 rank, CPU), repeated steps 5 to 6" in done.stdout
    (loaded, *steps), result = table(done)
    assert loaded == "4 (loaded)  equal    equal      equal      equal"
    assert steps == [f"{step}           {EQUAL}" for step in (5, 6)]
    assert result == "exact: bit for bit equal to the uninterrupted run"
    assert files(short_run) == before, "the run directory is only read"


def test_run_of_several_nodes_needs_as_many(short_run, tmp_path):
    """On two nodes: tests/slurm."""
    folder = RunDir(tmp_path)
    plans.write(dataclasses.replace(plans.read(RunDir(short_run).plan), nodes=2), folder.plan)
    with pytest.raises(UserError, match="was trained on 2 nodes.*: found 1. Start it with srun on that many nodes"):
        verify_resume.run(folder)


def test_altered_optimizer_state_with_valid_checksums_is_found(shared_workplace, short_run):
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
    (loaded, fifth, _sixth), result = table(done)
    assert loaded.split() == ["4", "(loaded)", "equal", "differs", "equal", "equal"]
    assert fifth.split() == ["5", "differs", "differs", "equal", "equal", "equal", "equal"]
    assert result == "not exact: different weights, optimizer, loss"


def test_run_in_use_is_rejected(shared_workplace, short_run):
    run = shared_workplace.runs / "held"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns(".lock"))
    with run_lock.lock(RunDir(run)):
        done = shared_workplace.sft("verify-resume", run.name)
    assert (done.returncode, done.stdout) == (2, "") and "is in use by" in done.stderr


def test_latest_checkpoint_with_recorded_steps_comes_first(tmp_path):
    folder, recorded = RunDir(tmp_path), {step: {} for step in (4, 5, 6, 7, 8, 9, 11, 12)}
    with pytest.raises(UserError, match="has no checkpoint to resume from"):
        verify_resume._find_candidates(folder, recorded)
    for step in (4, 8, 10, 12):
        folder.checkpoint(step).mkdir()
    assert verify_resume._find_candidates(folder, recorded) == [(10, 12), (8, 9), (4, 6), (12, 12)]


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
    return Replay(4, [state(), state()], list(loaded) or [state(), state()], [], steps)


@pytest.mark.parametrize(
    ("first", "second", "within"),
    [
        (lines(2.0, 1.5, weights="x"), lines(2.0, 1.5 + 2e-7, weights="y"), True),
        (lines(2.0, 1.5 + 9e-7, weights="x"), lines(2.0, 1.5 + 8e-7, weights="y"), False),
        (lines(2.0, 1.5 + 1e-7, weights="x"), lines(2.0, 1.5 + 1e-7, weights="x"), False),
        (lines(2.0, 1.5, weights="x"), lines(2.0, 1.5, weights="x"), False),
    ],
    ids=["as close as two replays", "further away", "equal replays", "other weights, equal replays"],
)
def test_differing_losses_must_be_within_measured_tolerance(console, first, second, within):
    recorded = lines(2.0, 1.5)
    assert verify_resume.differs_in_sums_only(verify_resume.compare(replayed(first), recorded))
    assert verify_resume.check_tolerance(replayed(first), replayed(second), recorded) == (0 if within else 1)
    result = console.readouterr().out.splitlines()[-1]
    assert ("but within the measured tolerance" in result) is within
    assert ("two replays from each other by" in result) is (first != second)
    assert result.startswith("not exact: different weights") is (first == second)


def test_differing_rows_random_numbers_or_loaded_state_are_not_tolerated():
    recorded = lines(2.0, 1.5)
    assert verify_resume.find_differing(verify_resume.compare(replayed(recorded), recorded)) == set()
    for key, value in (("rows_hash", "d"), ("fingerprints", [state(), state(rng="q")])):
        replay = replayed({**recorded, 6: {**recorded[6], key: value}})
        assert not verify_resume.differs_in_sums_only(verify_resume.compare(replay, recorded))
    loaded = replayed(lines(2.0, 1.5, weights="x"), loaded=[state(weights="x"), state()])
    assert not verify_resume.differs_in_sums_only(verify_resume.compare(loaded, recorded))


def test_comparison_names_the_rank_that_differs():
    recorded = lines(2.0, 1.5)
    states = verify_resume.compare(
        replayed(lines(2.0, 1.5, weights="x"), loaded=[state(), state(optimizer="p")]), recorded
    )
    assert states["4 (loaded)"]["optimizer"] == "differs (rank 1)" and states["5"]["weights"] == "differs (rank 0)"
