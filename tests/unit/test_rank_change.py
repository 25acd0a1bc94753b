"""Resuming on other ranks: which may, which plan changes follow without consent, what resharding fixes."""

import dataclasses

import pytest
import torch

from sft_recipes.config import loader
from sft_recipes.launch import run_selection
from sft_recipes.launch.run_selection import RunRequest
from sft_recipes.planner import plan as plans
from sft_recipes.planner import rank_change
from sft_recipes.planner.rank_change import Ranks
from sft_recipes.runtime import run_dir
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.checkpoint import reshard


def plan(strategy="ddp", processes=2, *more):
    arguments = [f"parallelism={strategy}", "batch.effective_batch_size=8", *more]
    return plans.resolve(loader.load("tiny", arguments), plans.Topology(0, processes))


def refusal(old, new):
    return rank_change.incompatibility(rank_change.ranks_of(old), new)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 4)])
def test_other_world_size_of_same_strategy_needs_no_consent(strategy, old, new):
    assert refusal(plan(strategy, old), plan(strategy, new)) is None
    assert (
        rank_change.implied_changes(plan(strategy, old), plan(strategy, new))
        == plans.find_differences(plan(strategy, old), plan(strategy, new)).keys()
    )


def test_only_zero_state_needs_resharding():
    assert rank_change.needs_resharding(Ranks("zero2", 2), Ranks("zero2", 4))
    assert not rank_change.needs_resharding(Ranks("zero2", 2), Ranks("zero2", 2))
    assert not rank_change.needs_resharding(Ranks("fsdp2", 2), Ranks("fsdp2", 4))


@pytest.mark.parametrize(
    ("old", "new", "remedy"),
    [
        (("zero2", 2), ("ddp", 1), "parallelism=zero2"),
        (("zero2", 2), ("zero3", 2), "parallelism=zero2"),
        (("ddp", 1), ("zero2", 2), "parallelism=ddp"),
        (("fsdp2", 2), ("ddp", 2), "parallelism=fsdp2"),
        (("zero3_offload", 2), ("zero3", 4), "parallelism=zero3_offload"),
    ],
)
def test_other_strategy_is_refused_with_fix(old, new, remedy):
    reason = refusal(plan(*old), plan(*new))
    assert f"on {old[1]} rank" in reason and f"on {new[1]} rank" in reason and remedy in reason
    assert rank_change.implied_changes(plan(*old), plan(*new)) == set()


def test_optimizer_that_cannot_be_resharded_keeps_its_ranks():
    eight_bit = "trainer.optim=adamw_8bit"
    reason = refusal(plan("zero2", 2, eight_bit), plan("zero2", 4, eight_bit))
    assert "adamw_8bit" in reason and "on 2 ranks" in reason and "on 4 ranks" in reason
    assert refusal(plan("ddp", 2, eight_bit), plan("ddp", 4, eight_bit)) is None


def test_other_batch_or_device_needs_consent():
    assert rank_change.implied_changes(plan("zero2", 2), plan("zero2", 4, "batch.effective_batch_size=16")) == set()
    on_gpus = dataclasses.replace(plan("zero2", 4), gpus=4)
    assert rank_change.implied_changes(plan("zero2", 2), on_gpus) == set()
    assert rank_change.implied_changes(plan("zero2", 2), plan("zero2", 2)) == set()


def a_run(place, stored, *steps):
    folder = RunDir(place / "runs" / "one")
    folder.path.mkdir(parents=True)
    plans.write(dataclasses.replace(stored, run_id="one"), folder.plan)
    for step in steps:
        folder.checkpoint(step).mkdir()
    return folder


def test_resume_on_other_ranks_is_logged_and_recorded(tmp_path, monkeypatch, console):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    a_run(tmp_path, plan("zero2", 2), 4)
    start = run_selection.select(plan("zero2", 4), RunRequest("one"), {})
    assert start.resumes and start.plan.run_id == "one" and "world_size" in start.plan.allowed_changes
    assert "world_size 2 -> 4" in console.readouterr().out
    with pytest.raises(UserError, match=r"learning_rate"):
        run_selection.select(plan("zero2", 4, "trainer.learning_rate=1e-3"), RunRequest("one"), {})


def test_allow_change_does_not_permit_other_strategy(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    folder = a_run(tmp_path, plan("zero2", 2), 4)
    every = tuple(plans.find_differences(plan("zero2", 2), plan("ddp", 1)))
    with pytest.raises(UserError, match=r"zero2 on 2 ranks.*single on 1 rank.*parallelism=zero2"):
        run_selection.select(plan("ddp", 1), RunRequest("one", allow_change=every), {})
    folder.checkpoint(4).rmdir()
    assert run_selection.select(plan("ddp", 1), RunRequest("one", allow_change=every), {}).resumes, (
        "nothing is saved, nothing is lost"
    )


def with_plan(folder, step, stored):
    run_dir.write_json(
        folder.checkpoint(step) / "complete.json", {"run_id": "one", "step": step, "plan": dataclasses.asdict(stored)}
    )


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_text(file.read_text()[:700])])
@pytest.mark.parametrize("name", ["one", None])
def test_lost_plan_is_restored_from_latest_checkpoint(tmp_path, monkeypatch, harm, name, console):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    stored = dataclasses.replace(plan("zero2", 2), run_id="one")
    folder = a_run(tmp_path, stored, 4, 8)
    if name is None:
        folder = RunDir(folder.path.rename(folder.path.with_name("tiny-1")))
    harm(folder.plan)
    with pytest.raises(UserError, match=r"has checkpoints, but its plan.json is missing or corrupt.*NAME="):
        run_selection.select(plan("zero2", 2), RunRequest(name), {})
    with_plan(folder, 4, stored)
    start = run_selection.select(plan("zero2", 2), RunRequest(name), {})
    assert start.resumes and start.run_dir == folder and start.plan.run_id == "one"
    assert "restored from checkpoint-4" in console.readouterr().out and plans.read(folder.plan) == stored


def test_lost_plan_of_linked_checkpoint_is_not_restored(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    folder = a_run(tmp_path, plan("zero2", 2), 4)
    folder.plan.unlink()
    elsewhere = folder.path.rename(tmp_path / "elsewhere")
    (tmp_path / "runs" / "tiny-1").symlink_to(elsewhere)
    assert run_selection.select(plan("zero2", 2), RunRequest(), {}).run_dir.name == "tiny-2"
    assert not (elsewhere / "plan.json").exists()


def test_allow_change_matches_exact_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    folder = a_run(tmp_path, plan("zero2", 2), 4)
    changed = plan("zero2", 2, "trainer.learning_rate=1e-3", "trainer.logging_steps=7")
    with pytest.raises(UserError, match=r"ALLOW_CHANGE=learning_rate,trainer.logging_steps, or"):
        run_selection.select(changed, RunRequest("one"), {})
    for keys in (("learning_rate", "logging_steps"), ("trainer.learning_rate", "sections.trainer.logging_steps")):
        assert run_selection.select(changed, RunRequest("one", allow_change=keys), {}).resumes
    with pytest.raises(UserError, match=r"ALLOW_CHANGE: 'nonsense' is not a key"):
        run_selection.select(plan("zero2", 2), RunRequest("one", allow_change=("nonsense",)), {})
    run_dir.write_json(folder.manifest, {"state": "finished"})
    with pytest.raises(UserError, match=r"is finished and has another plan: learning_rate"):
        run_selection.select(changed, RunRequest("one", allow_change=("learning_rate", "logging_steps")), {})


def trained(weight_decays):
    """AdamW after one step, a group for each weight decay."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.rand(8, generator=generator)) for _ in weight_decays]
    groups = [{"params": [one], "weight_decay": decay} for one, decay in zip(weights, weight_decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    step(optimizer)
    return optimizer


def step(optimizer):
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.linspace(-1, 1, 8)
    optimizer.step()


def weights_of(optimizer):
    return [weight.tolist() for group in optimizer.param_groups for weight in group["params"]]


def test_fix_loaded_state_restores_groups_and_step_counters():
    """One step counter for all weights, and the first group's settings for every group."""
    straight, loaded = trained([0.1, 0.0]), trained([0.1, 0.0])
    saved = [{key: value for key, value in group.items() if key != "params"} for group in loaded.param_groups]
    shared = next(iter(loaded.state.values()))["step"]
    for state in loaded.state.values():
        state["step"] = shared
    loaded.param_groups[1]["weight_decay"] = 0.1
    reshard.fix_loaded_state(loaded, saved)
    for optimizer in (straight, loaded):
        step(optimizer)
        step(optimizer)
    assert weights_of(straight) == weights_of(loaded)
    assert [state["step"].item() for state in loaded.state.values()] == [3, 3]


def test_run_of_other_model_or_data_is_only_resumed_by_name(tmp_path, monkeypatch, console):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    for number, override in ((1, "data.train=a.jsonl"), (2, "data.train=b.jsonl"), (3, "lora.r=4")):
        folder = RunDir(tmp_path / "runs" / f"tiny-{number}")
        folder.path.mkdir(parents=True)
        stored = dataclasses.replace(plan("zero2", 2, override), run_id=str(number), created=f"2026-01-0{number}")
        plans.write(stored, folder.plan)
    start = run_selection.select(plan("zero2", 2, "data.train=c.jsonl"), RunRequest(), {})
    assert (start.run_dir.name, start.resumes) == ("tiny-4", False)
    assert console.readouterr().out == (
        "not resuming tiny-3: method 'lora' -> 'full'. Resume it with its own settings and NAME=tiny-3\n"
    )
    older = run_selection.select(plan("zero2", 2, "data.train=a.jsonl"), RunRequest(), {})
    assert (older.run_dir.name, older.resumes) == ("tiny-1", True), "of this model and data"
    with pytest.raises(UserError, match=r"no unfinished run of tiny with this model and data.*NAME=tiny-3"):
        run_selection.select(plan("zero2", 2), RunRequest(resume=True), {})
    with pytest.raises(UserError, match=r"tiny-2 has another plan: data.train 'b.jsonl' -> 'c.jsonl'"):
        run_selection.select(plan("zero2", 2, "data.train=c.jsonl"), RunRequest("tiny-2"), {})


def test_restart_names_the_checkpoint_only_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    folder = a_run(tmp_path, plan("zero2", 2), 4)
    assert folder.describe_restart() == "no checkpoint is complete: the same command starts again from step 0"
    with_plan(folder, 4, plan("zero2", 2))
    assert folder.describe_restart() == "run the same command to resume from checkpoint-4"
