"""What is saved is whole or not there, and what is gone on from is what was saved."""

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from helpers.checkpoints import chosen
from helpers.saved_weights import same, weights
from helpers.workplace import SHORT, manifest, metrics

from sft_recipes.planner import plan as plans
from sft_recipes.runtime import append_line
from sft_recipes.runtime.run_dir import RunDir
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


HARMS = [flip, zero, cut, empty, Path.unlink]


def test_a_checkpoint_says_what_it_holds(short_run):
    record = checkpoint_format.read(short_run / "checkpoint-8")
    assert record["step"] == 8 and record["run_id"] == plans.read(short_run / "plan.json").run_id
    assert set(record["files"]) == {path.name for path in (short_run / "checkpoint-8").iterdir()} - {"complete.json"}
    assert "training_args.bin" not in record["files"], "pickled, and nothing here loads it"
    assert record["supervised_tokens_seen"] == manifest(short_run)["supervised_tokens_seen"]
    assert not (short_run / ".saving").exists() and not (short_run / ".removing").exists()


def test_every_harm_to_every_file_is_named_and_the_older_checkpoint_taken(run):
    """One flipped bit, a zeroed page, one byte less, nothing at all, no file: in each file in turn."""
    files = sorted(path.name for path in run.checkpoint(8).iterdir())
    keep = run.path / "keep"
    shutil.copytree(run.checkpoint(8), keep)
    tried = 0
    for name in files:
        for harm in HARMS:
            before = (keep / name).read_bytes()
            harm(run.checkpoint(8) / name)
            if (run.checkpoint(8) / name).is_file() and (run.checkpoint(8) / name).read_bytes() == before:
                continue  # the page was zero before
            point, said = chosen(run)
            assert point.path == run.checkpoint(4), (name, harm.__name__)
            assert len(said) == 1 and said[0].startswith("passing over checkpoint-8: ") and name in said[0], said
            for left in run.path.glob("*checkpoint-8*"):
                shutil.rmtree(left)
            shutil.copytree(keep, run.checkpoint(8))
            tried += 1
    assert tried >= 4 * len(files) >= 40
    assert chosen(run)[0].path == run.checkpoint(8)


def test_a_damaged_checkpoint_is_kept_under_another_name(run):
    flip(run.checkpoint(8) / "optimizer.pt")
    _, said = chosen(run)
    aside = run.path / "checkpoint-8.corrupt-1"
    assert said == [f"passing over checkpoint-8: optimizer.pt does not match its checksum; it is kept as {aside.name}"]
    assert (aside / "optimizer.pt").is_file() and not run.checkpoint(8).exists()


@pytest.mark.parametrize("harm", ["record", "other files", "a link", "a stranger"])
def test_what_is_not_as_it_was_saved_is_not_gone_on_from(run, harm):
    eight = run.checkpoint(8)
    if harm == "record":
        record = json.loads((eight / "complete.json").read_text())
        (eight / "complete.json").write_text(json.dumps({**record, "supervised_tokens_seen": 1}))
    elif harm == "other files":
        (eight / "optimizer.pt").write_bytes((run.checkpoint(4) / "optimizer.pt").read_bytes())
    elif harm == "a link":
        (eight / "optimizer.pt").unlink()
        (eight / "optimizer.pt").symlink_to(run.checkpoint(4) / "optimizer.pt")
    else:
        (eight / ".metadata").write_bytes(b"a pickle that nobody saved")
    point, said = chosen(run)
    assert point.step == 4
    expected = {
        "record": "complete.json is damaged: it does not match its own checksum",
        "other files": "optimizer.pt does not match its checksum",
        "a link": "optimizer.pt is missing",
        "a stranger": ".metadata was not saved with it",
    }
    assert expected[harm] in said[0]


def test_another_runs_checkpoint_is_passed_over_by_its_id_and_stays(run):
    shutil.copytree(run.checkpoint(8), run.checkpoint(900))
    record = checkpoint_format.read(run.checkpoint(900))
    checkpoint_format.seal(run.checkpoint(900), {**record, "run_id": "0123456789abcdef", "step": 900})
    point, said = chosen(run)
    assert point.step == 8 and run.checkpoint(900).is_dir()
    assert said == [
        f"passing over checkpoint-900: it is of another run (id 0123456789abcdef, this one's is {record['run_id']})"
    ]


def test_a_checkpoint_under_another_number_is_passed_over(run):
    run.checkpoint(8).rename(run.checkpoint(900))
    point, said = chosen(run)
    assert point.step == 4 and "checkpoint-900: it was saved at step 8" in said[0]


@pytest.mark.parametrize("left", ["damaged", "none"])
def test_a_run_that_lost_all_it_saved_never_starts_from_step_0(run, left):
    for step in (4, 8):
        if left == "damaged":
            cut(run.checkpoint(step) / "model.safetensors")
        else:
            shutil.rmtree(run.checkpoint(step))
    with pytest.raises(
        resume.NoValidCheckpointError, match="no checkpoint of this run is whole.*nothing was started from step 0"
    ):
        chosen(run)
    run.manifest.write_text(json.dumps({**manifest(run.path), "saved_step": None}))  # as where a kill came before it
    if left == "damaged":
        with pytest.raises(resume.NoValidCheckpointError, match="checkpoint-8.corrupt-1 is all there is"):
            chosen(run)


def test_an_unfinished_run_goes_on_from_the_older_checkpoint_to_the_same_weights(shared_workplace, short_run):
    """The real start, with the newest damaged; and with both, an error and no step."""
    run = RunDir(shared_workplace.runs / "damaged")
    shutil.copytree(short_run, run.path, ignore=shutil.ignore_patterns("final", "last", ".lock", "best-8"))
    run.manifest.write_text(json.dumps({**manifest(run.path), "state": "running"}))
    flip(run.checkpoint(8) / "model.safetensors")
    done = shared_workplace.sft("train", "tiny", "--name", "damaged", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "passing over checkpoint-8: model.safetensors does not match its checksum" in done.stdout
    assert "going on from checkpoint-4" in done.stdout
    assert same(weights(run.last), weights(short_run / "last")) and same(
        weights(run.final), weights(short_run / "final")
    )
    assert (run.path / "checkpoint-8.corrupt-1").is_dir() and run.checkpoint(8).is_dir()

    run.manifest.write_text(json.dumps({**manifest(run.path), "state": "running"}))
    for step in (4, 8):
        (run.checkpoint(step) / "complete.json").unlink()
    done = shared_workplace.sft("train", "tiny", "--name", "damaged", *SHORT)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {run.path}: no checkpoint of this run is whole (checkpoint-8: it has no complete.json: it was cut off, "
        f"or is not this version's; checkpoint-4: it has no complete.json: it was cut off, or is not this version's); "
        f"nothing was started from step 0: bring one back, or begin a run of its own: NAME=…"
    ]
    assert run.checkpoint(8).is_dir() and run.checkpoint(4).is_dir() and "Traceback" not in done.stderr


def small(folder, content=b"weights", run_id="a"):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    checkpoint_format.seal(
        folder, {"run_id": run_id, "step": 4, "files": checkpoint_format.checksums(folder, ["model.safetensors"])}
    )
    return folder


def test_where_the_last_rename_fails_what_was_there_comes_back(tmp_path, monkeypatch):
    target, removing = tmp_path / "final", tmp_path / ".removing"
    checkpoint_format.publish(small(tmp_path / ".saving" / "one"), target, removing)
    replace = Path.replace

    def refuse(path, to):
        if path.name == "two":
            raise OSError(28, "No space left on device")
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        checkpoint_format.publish(small(tmp_path / ".saving" / "two", b"newer"), target, removing)
    assert (target / "model.safetensors").read_bytes() == b"weights"


def test_what_cannot_be_removed_or_renamed_stops_no_start(run, monkeypatch):
    (run.removing / "checkpoint-2").mkdir(parents=True)
    flip(run.checkpoint(8) / "optimizer.pt")
    said, refused = [], PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(shutil, "rmtree", lambda *_a, **_k: (_ for _ in ()).throw(refused))
    monkeypatch.setattr(checkpoint_format, "quarantine", lambda _folder: (_ for _ in ()).throw(refused))
    resume.clear(run, said.append)
    point, more = chosen(run)
    assert point.step == 4 and "could not be renamed (Operation not permitted)" in more[0]
    assert said[-1] == f"{run.removing} could not be removed (Operation not permitted)"


def test_what_a_disk_does_not_give_back_is_passed_over_and_stays_where_it_is(run, monkeypatch):
    """It may give it back the next time."""
    read = checkpoint_format.sha256

    def unreadable(path):
        if path == run.checkpoint(8) / "optimizer.pt":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checkpoint_format, "sha256", unreadable)
    point, said = chosen(run)
    assert point.step == 4 and said == ["passing over checkpoint-8: optimizer.pt cannot be read (Input/output error)"]
    monkeypatch.undo()
    assert chosen(run)[0].step == 8


def test_publishing_replaces_this_runs_own_and_puts_all_else_aside(tmp_path):
    target, removing = tmp_path / "checkpoint-4", tmp_path / ".removing"
    checkpoint_format.publish(small(tmp_path / ".saving" / "one"), target, removing)
    checkpoint_format.publish(small(tmp_path / ".saving" / "two", b"newer"), target, removing)
    assert (target / "model.safetensors").read_bytes() == b"newer"
    assert not list(tmp_path.glob("*.corrupt-*")) and not list(removing.iterdir())
    checkpoint_format.publish(small(tmp_path / ".saving" / "three", b"other", "b"), target, removing)
    assert (tmp_path / "checkpoint-4.corrupt-1" / "model.safetensors").read_bytes() == b"newer"


@pytest.mark.parametrize("engine", ["single", "fsdp2", "zero3"])
def test_of_a_checkpoint_all_that_a_model_may_need_is_copied_and_nothing_else(short_run, tmp_path, engine):
    plan = dataclasses.replace(plans.read(short_run / "plan.json"), parallelism=engine, precision="fp32")
    model = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "modeling_own.py"}
    model.add("additional_chat_templates/tool_use.jinja")
    state = checkpoint_format.needed(plan, 4)
    for name in model | state | {"complete.json", "global_step4/mp_rank_00_model_states.pt", "pytorch_model_fsdp.bin"}:
        (tmp_path / "whole" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "whole" / name).write_text(name)
    checkpoint_format.copy_model(tmp_path / "whole", tmp_path / "copy")
    assert (
        set(checkpoint_format.names(tmp_path / "copy")) == model and not (tmp_path / "copy" / "complete.json").exists()
    )


def test_a_folder_named_on_another_node_is_waited_for_and_not_for_ever(tmp_path):
    """As a rename is seen late over NFS."""
    late = threading.Timer(0.5, (tmp_path / "checkpoint-4").mkdir)
    late.start()
    assert checkpoint_format.await_seen(tmp_path / "checkpoint-4", 30)
    began = time.monotonic()
    assert not checkpoint_format.await_seen(tmp_path / "checkpoint-8", 0.3)
    assert time.monotonic() - began >= 0.3


def test_ranks_share_a_checkpoints_files_so_that_each_is_looked_through_once():
    files = {"model.safetensors": {"bytes": 900}, "rng_state_0.pth": {"bytes": 1}, "rng_state_1.pth": {"bytes": 1}}
    files |= {f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": {"bytes": 500} for rank in (0, 1)}
    record = {"files": files, "world_size": 2}
    for ranks in (1, 2, 3, 8):
        shares = [checkpoint_format.share(record, rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(files)
    assert (
        checkpoint_format.share(record, 0, 2)[0] == "model.safetensors"
        and len(checkpoint_format.share(record, 1, 2)) >= 2
    )


@pytest.mark.parametrize(
    ("engine", "ranks", "some"),
    [
        ("single", 1, {"rng_state.pth", "optimizer.pt"}),
        ("ddp", 2, {"rng_state_1.pth", "optimizer.pt"}),
        ("fsdp2", 2, {"optimizer.bin", "rng_state_0.pth"}),
        ("zero3", 3, {"global_step4/zero_pp_rank_2_mp_rank_00_optim_states.pt", "latest", "rng_state_2.pth"}),
    ],
)
def test_every_ranks_files_are_needed(short_run, engine, ranks, some):
    plan = dataclasses.replace(plans.read(short_run / "plan.json"), parallelism=engine, world_size=ranks)
    assert some | {"trainer_state.json", "scheduler.pt"} <= checkpoint_format.needed(plan, 4)


def test_lines_that_the_disk_refuses_wait_for_it(tmp_path, capfd):
    """A folder stands where the file should be; then it is gone, as when room was made."""
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    append_line.add(path, "one")
    append_line.add(path, "two")
    assert "takes no line" in capfd.readouterr().err
    path.rmdir()
    append_line.add(path, "three")
    assert path.read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("error", "is_the_disks"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("Connection closed by peer"), False),
    ],
)
def test_only_what_a_disk_refused_fails_a_save_alone(error, is_the_disks):
    assert writer.refused_by_the_disk(error) == is_the_disks


def test_the_stall_of_each_save_is_in_the_metrics(short_run):
    saves = [line for line in metrics(short_run) if "save_seconds" in line]
    assert [line["step"] for line in saves] == [4, 8]
    held = sum(path.stat().st_size for path in (short_run / "checkpoint-8").iterdir() if path.name != "complete.json")
    assert saves[-1]["save_bytes"] == held
