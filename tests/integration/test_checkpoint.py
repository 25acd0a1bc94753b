"""Checkpoints are written atomically, and a run resumes only from what was saved."""

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import OneRank, find_checkpoint
from helpers.saved_weights import same, weights
from helpers.workplace import SHORT, manifest, metrics

from sft_recipes.planner import plan as plans
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.callbacks.metrics import append
from sft_recipes.training.checkpoint import checkpoint_format, resume, writer


@pytest.fixture
def run(short_run, tmp_path):
    """A copy of a real run with checkpoints of steps 4 and 8."""
    shutil.copytree(short_run, tmp_path / "run")
    return RunDir(tmp_path / "run")


def flip(path, bit=None):
    content = bytearray(path.read_bytes())
    place = len(content) * 8 // 2 if bit is None else bit
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def zero(path):
    content = bytearray(path.read_bytes())
    page = min(4096, len(content))
    middle = (len(content) - page) // 2
    content[middle : middle + page] = bytes(page)
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


CORRUPTIONS = [flip, zero, cut, empty, Path.unlink]


def test_commit_marker_lists_all_files(short_run):
    record = checkpoint_format.read_commit_marker(short_run / "checkpoint-8")
    assert record["step"] == 8 and record["run_id"] == plans.read(short_run / "plan.json").run_id
    assert set(record["files"]) == {path.name for path in (short_run / "checkpoint-8").iterdir()} - {"complete.json"}
    assert "training_args.bin" not in record["files"], "pickled, and never loaded"
    assert record["supervised_tokens_seen"] == manifest(short_run)["supervised_tokens_seen"]
    assert not (short_run / ".saving").exists() and not (short_run / ".removing").exists()


def test_resume_skips_a_checkpoint_with_any_corrupt_file(run):
    """In each file in turn: one flipped bit, a zeroed page, one byte less, an empty file, no file."""
    files = sorted(path.name for path in run.checkpoint(8).iterdir())
    keep = run.path / "keep"
    shutil.copytree(run.checkpoint(8), keep)
    tried = 0
    for name in files:
        for corrupt in CORRUPTIONS:
            before = (keep / name).read_bytes()
            corrupt(run.checkpoint(8) / name)
            if (run.checkpoint(8) / name).is_file() and (run.checkpoint(8) / name).read_bytes() == before:
                continue  # the page was zero already
            point, lines = find_checkpoint(run)
            assert point.path == run.checkpoint(4), (name, corrupt.__name__)
            assert lines[0].startswith("skipping checkpoint-8: ") and name in lines[0], lines
            assert lines[1:] in ([], ["checkpoint-8 quarantined as checkpoint-8.corrupt-1"])
            for left in run.path.glob("*checkpoint-8*"):
                shutil.rmtree(left)
            shutil.copytree(keep, run.checkpoint(8))
            tried += 1
    assert tried >= 4 * len(files) >= 40
    assert find_checkpoint(run)[0].path == run.checkpoint(8)


def test_corrupt_checkpoint_is_quarantined(run):
    flip(run.checkpoint(8) / "optimizer.pt")
    _, lines = find_checkpoint(run)
    assert lines == [
        "skipping checkpoint-8: checksum mismatch in optimizer.pt",
        "checkpoint-8 quarantined as checkpoint-8.corrupt-1",
    ]
    assert (run.path / "checkpoint-8.corrupt-1" / "optimizer.pt").is_file() and not run.checkpoint(8).exists()


@pytest.mark.parametrize("change", ["commit marker", "other file", "symlink", "additional file"])
def test_resume_skips_a_changed_checkpoint(run, change):
    eight = run.checkpoint(8)
    if change == "commit marker":
        record = json.loads((eight / "complete.json").read_text())
        (eight / "complete.json").write_text(json.dumps({**record, "supervised_tokens_seen": 1}))
    elif change == "other file":
        (eight / "optimizer.pt").write_bytes((run.checkpoint(4) / "optimizer.pt").read_bytes())
    elif change == "symlink":
        (eight / "optimizer.pt").unlink()
        (eight / "optimizer.pt").symlink_to(run.checkpoint(4) / "optimizer.pt")
    else:
        (eight / ".metadata").write_bytes(b"a pickle that was not saved")
    point, lines = find_checkpoint(run)
    assert point.step == 4
    expected = {
        "commit marker": "checksum mismatch in complete.json",
        "other file": "checksum mismatch in optimizer.pt",
        "symlink": "optimizer.pt is missing",
        "additional file": ".metadata was not saved with it",
    }
    assert lines[0] == f"skipping checkpoint-8: {expected[change]}"


def test_resume_skips_another_runs_checkpoint_in_place(run):
    shutil.copytree(run.checkpoint(8), run.checkpoint(900))
    record = checkpoint_format.read_commit_marker(run.checkpoint(900))
    checkpoint_format.write_commit_marker(run.checkpoint(900), {**record, "run_id": "0123456789abcdef", "step": 900})
    point, lines = find_checkpoint(run)
    assert point.step == 8 and run.checkpoint(900).is_dir()
    assert lines == [f"skipping checkpoint-900: run_id mismatch: found 0123456789abcdef, expected {record['run_id']}"]


def test_resume_skips_a_checkpoint_under_another_number(run):
    run.checkpoint(8).rename(run.checkpoint(900))
    point, lines = find_checkpoint(run)
    assert point.step == 4 and lines == ["skipping checkpoint-900: step mismatch: found 8, expected 900"]


@pytest.mark.parametrize("left", ["corrupt", "none"])
def test_run_without_a_valid_checkpoint_never_restarts_from_step_0(run, left):
    for step in (4, 8):
        if left == "corrupt":
            cut(run.checkpoint(step) / "model.safetensors")
        else:
            shutil.rmtree(run.checkpoint(step))
    with pytest.raises(resume.NoValidCheckpointError, match="no valid checkpoint of this run"):
        find_checkpoint(run)
    run.manifest.write_text(
        json.dumps({**manifest(run.path), "saved_step": None})
    )  # as after a kill before it was written
    if left == "corrupt":
        with pytest.raises(resume.NoValidCheckpointError, match="no valid checkpoint of this run"):
            find_checkpoint(run)


def test_resume_from_the_older_checkpoint_gives_the_same_weights(shared_workplace, short_run):
    """A real run whose latest checkpoint is corrupt; with both corrupt, an error and no step."""
    run = RunDir(shared_workplace.runs / "corrupt")
    shutil.copytree(short_run, run.path, ignore=shutil.ignore_patterns("final", "last", ".lock", "best-8"))
    run.manifest.write_text(json.dumps({**manifest(run.path), "state": "running"}))
    flip(run.checkpoint(8) / "model.safetensors")
    done = shared_workplace.sft("train", "tiny", "--name", "corrupt", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "skipping checkpoint-8: checksum mismatch in model.safetensors" in done.stdout
    assert "resuming from checkpoint-4" in done.stdout
    assert same(weights(run.last), weights(short_run / "last")) and same(
        weights(run.final), weights(short_run / "final")
    )
    assert (run.path / "checkpoint-8.corrupt-1").is_dir() and run.checkpoint(8).is_dir()

    run.manifest.write_text(json.dumps({**manifest(run.path), "state": "running"}))
    for step in (4, 8):
        (run.checkpoint(step) / "complete.json").unlink()
    done = shared_workplace.sft("train", "tiny", "--name", "corrupt", *SHORT)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {run.path}: no valid checkpoint of this run (checkpoint-8: no valid complete.json: incomplete, or written "
        f"by another version; checkpoint-4: no valid complete.json: incomplete, or written by another version). Restore "
        f"one, or start another run: NAME=…"
    ]
    assert run.checkpoint(8).is_dir() and run.checkpoint(4).is_dir() and "Traceback" not in done.stderr


def small(folder, content=b"weights", run_id="a"):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    checkpoint_format.write_commit_marker(
        folder,
        {"run_id": run_id, "step": 4, "files": checkpoint_format.compute_checksums(folder, ["model.safetensors"])},
    )
    return folder


def test_resume_continues_if_a_checkpoint_cannot_be_quarantined(run, monkeypatch):
    flip(run.checkpoint(8) / "optimizer.pt")
    refused = PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(checkpoint_format, "quarantine", lambda _folder: (_ for _ in ()).throw(refused))
    point, lines = find_checkpoint(run)
    assert point.step == 4 and lines[1] == f"{run.checkpoint(8)} could not be renamed (Operation not permitted)"


def test_resume_skips_an_unreadable_checkpoint_in_place(run, monkeypatch):
    """A disk error may be temporary."""
    read = checkpoint_format.sha256

    def unreadable(path):
        if path == run.checkpoint(8) / "optimizer.pt":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checkpoint_format, "sha256", unreadable)
    point, lines = find_checkpoint(run)
    assert point.step == 4 and lines == ["skipping checkpoint-8: optimizer.pt cannot be read (Input/output error)"]
    monkeypatch.undo()
    assert find_checkpoint(run)[0].step == 8


def test_publish_replaces_the_same_runs_directory_and_quarantines_others(tmp_path):
    target, removing = tmp_path / "checkpoint-4", tmp_path / ".removing"
    checkpoint_format.publish(small(tmp_path / ".saving" / "one"), target, removing)
    checkpoint_format.publish(small(tmp_path / ".saving" / "two", b"newer"), target, removing)
    assert (target / "model.safetensors").read_bytes() == b"newer"
    assert not list(tmp_path.glob("*.corrupt-*")) and not removing.exists()
    checkpoint_format.publish(small(tmp_path / ".saving" / "three", b"other", "b"), target, removing)
    assert (tmp_path / "checkpoint-4.corrupt-1" / "model.safetensors").read_bytes() == b"newer"


@pytest.mark.parametrize(
    "state",
    [
        {"optimizer.pt"},
        {"optimizer.bin", "pytorch_model_fsdp.bin"},
        {"latest", "global_step4/mp_rank_00_model_states.pt"},
    ],
)
def test_copy_model_copies_the_model_without_training_state(tmp_path, state):
    model = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "modeling_own.py"}
    model.add("additional_chat_templates/tool_use.jinja")
    for name in model | state | {"complete.json", "trainer_state.json", "scheduler.pt", "rng_state_1.pth"}:
        (tmp_path / "complete" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "complete" / name).write_text(name)
    checkpoint_format.copy_model(tmp_path / "complete", tmp_path / "copy")
    assert (
        set(checkpoint_format.list_files(tmp_path / "copy")) == model
        and not (tmp_path / "copy" / "complete.json").exists()
    )


def test_wait_until_visible_has_a_timeout(tmp_path):
    """A rename on another node becomes visible late over NFS."""
    late = threading.Timer(0.5, (tmp_path / "checkpoint-4").mkdir)
    late.start()
    assert checkpoint_format.wait_until_visible(tmp_path / "checkpoint-4", 30)
    started = time.monotonic()
    assert not checkpoint_format.wait_until_visible(tmp_path / "checkpoint-8", 0.3)
    assert time.monotonic() - started >= 0.3


def test_each_file_is_verified_by_one_rank(run):
    eight, record = run.checkpoint(8), checkpoint_format.read_commit_marker(run.checkpoint(8))
    for name in record["files"]:
        content = (eight / name).read_bytes()
        flip(eight / name)
        for ranks in (1, 2, 3, 20):
            problems = [checkpoint_format.verify_checksums(eight, record, rank, ranks) for rank in range(ranks)]
            assert [problem for problem in problems if problem] == [f"checksum mismatch in {name}"]
        (eight / name).write_bytes(content)


@pytest.mark.parametrize(
    ("parallelism", "ranks", "names"),
    [
        ("single", 1, {"rng_state.pth", "optimizer.pt"}),
        ("ddp", 2, {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"}),
        ("fsdp2", 2, {"rng_state_0.pth", "rng_state_1.pth", "optimizer.bin"}),
        ("zero3", 2, {"rng_state_0.pth", "rng_state_1.pth", *(
            f"global_step4/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))}),
    ],
)  # fmt: skip
def test_files_of_every_rank_are_required(short_run, parallelism, ranks, names):
    plan = dataclasses.replace(plans.read(short_run / "plan.json"), parallelism=parallelism, world_size=ranks)
    names |= {"model.safetensors", "trainer_state.json", "scheduler.pt"}
    assert checkpoint_format.find_missing(plan, names) is None
    for name in names:
        assert "was not written" in checkpoint_format.find_missing(plan, names - {name}), name


def test_append_warns_if_the_file_cannot_be_written(tmp_path, console):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    append(path, {"step": 1})
    assert "warning: " in (printed := console.readouterr().out) and "cannot be written" in printed
    path.rmdir()
    append(path, {"step": 2})
    assert path.read_text() == '{"step": 2}\n'


def test_any_error_fails_the_save_except_out_of_memory(short_run):
    subject = writer.CheckpointWriter(plans.read(short_run / "plan.json"), RunDir(short_run), OneRank())
    for error in (OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672]")):
        with subject.collect_write_errors():
            raise error
        assert str(error) in subject._any_error()
        subject._error = None
    with pytest.raises(torch.OutOfMemoryError), subject.collect_write_errors():
        raise torch.OutOfMemoryError


def test_metrics_have_time_and_size_of_each_save(short_run):
    saves = [line for line in metrics(short_run) if "save_seconds" in line]
    assert [line["step"] for line in saves] == [4, 8]
    size = sum(path.stat().st_size for path in (short_run / "checkpoint-8").iterdir() if path.name != "complete.json")
    assert saves[-1]["save_bytes"] == size
