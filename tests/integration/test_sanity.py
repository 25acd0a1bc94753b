"""The sanity check: its checks, its cached result, and when it runs."""

import dataclasses
import datetime
import json
import shutil

import pytest
import torch
from helpers.recipes import SHIPPED
from helpers.workplace import assert_one_trainer_at_a_time, manifest

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime import env
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.sanity import checks, trial, worker
from sft_recipes.training import stop_signal
from sft_recipes.training.trainer import RecipeTrainer

FEW_COMPLETIONS = ("generation.show=2", "generation.score=0", "generation.max_new_tokens=4")
CHECKS = [
    "loss mask", "initial loss", "loss falls", "finite values", "gradient norm", "peak memory", "evaluation",
    "completions", "checkpoint",
]  # fmt: skip


def test_train_runs_sanity_check_and_caches_result(short_run, shared_workplace):
    recorded = manifest(short_run)["starts"][-1]["sanity"]
    result = json.loads((shared_workplace.path / recorded["result"]).read_text())
    assert [check["name"] for check in result["checks"]] == CHECKS and result["recipe"] == "tiny"
    passed = {check["name"]: check["passed"] for check in result["checks"]}
    assert passed.pop("completions") is None and all(passed.values()), "the initial weights were random"
    assert result["forecast"]["seconds"] > 0 and result["forecast"]["gpu_hours"] is None


def test_cached_result_skips_sanity_check_of_same_plan(short_run, tracked_run, shared_workplace):
    results = list((shared_workplace.runs / ".sanity").iterdir())
    assert len(results) == 1 and results[0].suffix == ".json", "one trial, and no files of it"
    first, second = (manifest(run)["starts"][-1] for run in (short_run, tracked_run))
    assert first["sanity"] == second["sanity"]
    written = datetime.datetime.fromtimestamp(results[0].stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    assert written <= first["at"] <= second["at"]


def test_checkpoint_is_reloaded_after_trainer_has_exited(short_run, shared_workplace):
    assert_one_trainer_at_a_time(shared_workplace.path / "device.jsonl", ranks=1)


def test_sanity_check_does_not_change_the_run(short_run, tracked_run):
    """Same weights with or without a sanity check first, with or without trackers."""
    from safetensors.torch import load_file
    from torch import equal

    checked, unchecked = (load_file(run / "last" / "model.safetensors") for run in (short_run, tracked_run))
    assert checked.keys() == unchecked.keys() and all(equal(checked[name], unchecked[name]) for name in checked)


def test_forecast_adds_up_measured_times(monkeypatch):
    plan = dataclasses.replace(
        plans.resolve(loader.load("8b"), Topology(gpus=8, processes=8, gpu_type="h100-80g")),
        optimizer_steps=1001, gradient_accumulation_steps=4,
    )  # fmt: skip
    measured = {
        "step_seconds": 3.0, "accumulation": 2, "eval_rows": 1000, "eval_seconds_per_row": 0.01, "save_seconds": 60.0,
    }  # fmt: skip
    monkeypatch.setenv("GPU_HOUR_PRICE", "2.5")
    forecast = trial.measured_forecast(plan, measured)
    evaluations, saves = 2, 1  # every 1000 and every 2000 steps, and the last
    seconds = 1001 * 3.0 * 2 + evaluations * 1000 * 0.01 + saves * 60.0
    assert forecast["seconds"] == pytest.approx(seconds, abs=0.1)
    assert forecast["gpu_hours"] == pytest.approx(seconds * 8 / 3600, abs=0.01)
    above_13b = trial.measured_forecast(plan, {**measured, "save_seconds": None})
    saving = plan.forecast["saving_seconds"] if plan.forecast else 0.0
    assert above_13b["seconds"] == pytest.approx(1001 * 3.0 * 2 + evaluations * 1000 * 0.01 + saving, abs=0.1)
    assert forecast["money"] == pytest.approx(seconds * 8 / 3600 * 2.5, abs=0.05)


@pytest.mark.parametrize("value", ["no", "Skip", "0"])
def test_sanity_variable_accepts_skip_only(in_process, value):
    done = in_process("train", "tiny", SANITY=value)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"error: SANITY: found {value!r}, expected skip or nothing" in done.stderr


@pytest.fixture(scope="module")
def trial_of_few_rows(shared_workplace, few_rows, tmp_path_factory):
    """Trial of a settled plan, and its prepared rows, to run in this process."""
    from sft_recipes.data.prepare import prepare

    settings = [f"data.train={few_rows}", "trainer.max_length=128", "batch.effective_batch_size=2", *FEW_COMPLETIONS]
    plan = plans.resolve(loader.load("tiny", settings), Topology(gpus=0, processes=1))
    prepared = prepare(plan, tmp_path_factory.mktemp("store"))
    return trial.trial_plan(plans.with_prepared_data(plan, prepared)), prepared


def run_in_process(tmp_path, planned, prepared, monkeypatch):
    """Checks of the trial, and of the reload unless one failed before; the launcher starts processes for each."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    results = []
    for folder in (RunDir(tmp_path), RunDir(tmp_path / trial.RELOAD)):
        folder.path.mkdir(exist_ok=True)
        plans.write(planned, folder.plan)
        write_json(folder.prepared, dataclasses.asdict(prepared))
        worker.run_part(planned, folder)
        if read_json(folder.outcome):
            return read_json(folder.outcome)
        results += [checks.Check(**check) for check in read_json(folder.result)["checks"]]
        if any(check.passed is False for check in results):
            break
    return {check.name: check for check in results}


def test_healthy_trial_passes_all_checks(tmp_path, trial_of_few_rows, monkeypatch):
    results = run_in_process(tmp_path, *trial_of_few_rows, monkeypatch)
    assert list(results) == CHECKS
    assert {name: check.passed for name, check in results.items() if not check.passed} == {"completions": None}


@pytest.mark.parametrize(("rate", "fix"), [(0.0, "raise"), (2.0, "lower")], ids=["zero", "too high"])
def test_wrong_learning_rate_fails_loss_check(tmp_path, trial_of_few_rows, monkeypatch, rate, fix):
    planned, prepared = trial_of_few_rows
    results = run_in_process(tmp_path, dataclasses.replace(planned, learning_rate=rate), prepared, monkeypatch)
    assert results["loss falls"].passed is False
    assert results["loss falls"].fix == f"{fix} trainer.learning_rate"
    assert results["loss mask"].passed and "checkpoint" not in results, "a failed trial is not reloaded"


@pytest.mark.parametrize("at", [0, 3, 13], ids=["before step 1", "after step 3", "after the reload"])
def test_stopped_trial_has_no_result(tmp_path, trial_of_few_rows, monkeypatch, at):
    """As if a rank, but not its launcher, gets the signal: an incomplete trial must not pass."""
    counter = {"steps": 0}
    monkeypatch.setattr(stop_signal, "requested", lambda: counter["steps"] >= at)
    step = RecipeTrainer.training_step
    monkeypatch.setattr(
        RecipeTrainer, "training_step", lambda *a, **k: counter.update(steps=counter["steps"] + 1) or step(*a, **k)
    )
    assert run_in_process(tmp_path, *trial_of_few_rows, monkeypatch) == {"exit_code": 75}


def test_truncated_checkpoint_fails_checkpoint_check(tmp_path, trial_of_few_rows, monkeypatch):
    """The optimizer state is truncated, as by a disk that reports writes that it has not done."""
    from sft_recipes.training.checkpoint import checkpoint_format

    write_commit_marker = checkpoint_format.write_commit_marker

    def truncate(folder, record):
        write_commit_marker(folder, record)
        (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:1000])

    monkeypatch.setattr(checkpoint_format, "write_commit_marker", truncate)
    results = run_in_process(tmp_path, *trial_of_few_rows, monkeypatch)
    assert {name for name, check in results.items() if check.passed is False} == {"checkpoint"}
    assert "checkpoint-10: size mismatch in optimizer.pt: found 1000 bytes" in results["checkpoint"].detail


def test_lost_optimizer_state_fails_checkpoint_check(tmp_path, trial_of_few_rows, monkeypatch):
    """The saved state is complete, but not that of the optimizer."""
    from sft_recipes.training.checkpoint import checkpoint_format

    write_commit_marker = checkpoint_format.write_commit_marker

    def lose(folder, record):
        state = torch.load(folder / "optimizer.pt")
        for moments in state["state"].values():
            moments["exp_avg"].zero_()
        torch.save(state, folder / "optimizer.pt")
        record["files"].update(checkpoint_format.compute_checksums(folder, ["optimizer.pt"]))
        write_commit_marker(folder, record)

    monkeypatch.setattr(checkpoint_format, "write_commit_marker", lose)
    results = run_in_process(tmp_path, *trial_of_few_rows, monkeypatch)
    assert results["checkpoint"].passed is False
    assert "checkpoint-10 resumes with other losses: found " in results["checkpoint"].detail


@pytest.mark.parametrize("masked", ["all", "ends"])
def test_masked_labels_fail_loss_mask_check(tmp_path, trial_of_few_rows, monkeypatch, masked):
    """Every label masked, or each end of turn."""
    from datasets import load_from_disk

    planned, prepared = trial_of_few_rows
    copy = tmp_path / "prepared-copy"
    shutil.copytree(prepared.folder, copy)
    ends = set(json.loads((copy / "details.json").read_text())["end_of_turn_ids"])

    def mask(row):
        return {"labels": [-100 if masked == "all" or label in ends else label for label in row["labels"]]}

    rows = load_from_disk(prepared.folder + "/train")
    rows = rows.map(mask, features=rows.features)
    shutil.rmtree(copy / "train")
    rows.save_to_disk(copy / "train")
    run = tmp_path / "run"
    run.mkdir()
    check = run_in_process(run, planned, dataclasses.replace(prepared, folder=str(copy)), monkeypatch)["loss mask"]
    expected = "labels are masked: nothing to learn" if masked == "all" else "the model would never learn to stop"
    assert check.passed is False and expected in check.detail


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The answer is 42.", None),
        ("9", None),
        ("def add(a, b):\n\treturn a + b\n", None),
        ("La réponse est : « quarante-deux » \N{EM DASH} 四十二。", None),
        ("very, very, very good, and it is also very well known that this has no end", None),
        ("", "empty"),
        ("  \n", "empty"),
        ("the " * 21, "repetition"),
        ("\ufffd\ufffd and \ufffd", "unprintable characters"),
        ("می\u200cخواهم می\u200cروم", None),  # noqa: RUF001  Persian, with its joiners
        ("Yes.\r\nNo.\r\n", None),
        ("0" * 48, "repetition"),
        ("ab" * 200, "repetition"),
        ("\x00\x01\x02 ok", "unprintable characters"),
    ],
)  # fmt: skip
def test_find_garbled(text, reason):
    assert checks.find_garbled(text) == reason


@pytest.mark.parametrize(("rows", "count"), [(896, 64), (64, 64), (20, 64), (1, 4), (17, 32)])
def test_select_rows_includes_the_longest(rows, count):
    lengths = [(7 * number) % rows + 1 for number in range(rows)]
    selected = worker.select_rows(lengths, count)
    assert len(selected) == count
    assert len(set(selected)) == min(rows, count, 64), "no row repeats before all are selected"
    longest = sorted(range(rows), key=lambda row: -lengths[row])[: min(16, rows, count)]
    assert {lengths[row] for row in longest} <= {lengths[row] for row in selected}


@pytest.mark.parametrize("name", SHIPPED)
def test_trial_plan_keeps_what_it_checks(name):
    from sft_recipes.launch.topology import plan_topology

    recipe = loader.load(name)
    plan = dataclasses.replace(plans.resolve(recipe, plan_topology(recipe)), rows=100_000)
    short = trial.trial_plan(plan)
    for kept in ("parallelism", "per_device_train_batch_size", "world_size", "learning_rate", "max_length", "dtypes"):
        assert getattr(short, kept) == getattr(plan, kept)
    assert 10 <= short.optimizer_steps <= 20 and 50 <= short.rows <= 512
    assert short.rows % short.effective_batch_size == 0 and short.warmup_steps == 2
    assert trial.checks_resume(plan) == (not name.startswith(("30b", "32b", "70b")))


def test_cache_key_depends_on_weight_files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    overrides = ["model.from_scratch=false", "model.architecture={}", f"model.name_or_path={model}"]
    plan = plans.resolve(loader.load("tiny", overrides), Topology(gpus=0, processes=1))
    before = trial.cache_key(plan)
    assert trial.cache_key(plan) == before
    (model / "model.safetensors").write_bytes(b"22")
    assert trial.cache_key(plan) != before


def test_forecast_of_unknown_architecture():
    overrides = ["model.from_scratch=false", "model.architecture={}", "model.name_or_path=/somewhere"]
    plan = dataclasses.replace(
        plans.resolve(loader.load("tiny", overrides), Topology(gpus=0, processes=1)), optimizer_steps=10
    )
    measured = {
        "step_seconds": 3.0, "accumulation": 1, "eval_rows": 10, "eval_seconds_per_row": 0.1, "save_seconds": 2.0,
    }  # fmt: skip
    assert trial.measured_forecast(plan, measured)["seconds"] == pytest.approx(10 * 3.0 + 10 * 0.1 + 2.0)


@pytest.mark.parametrize(("loss", "expected"), [(1.4, True), (5.4, True), (5.75, False), (7.0, False)])
def test_better_than_chance(loss, expected):
    assert checks.is_better_than_chance(loss, 320) == expected


def test_trial_plan_ignores_eval_delay():
    plan = plans.resolve(loader.load("tiny", ["trainer.eval_delay=500"]), Topology(gpus=0, processes=1))
    assert "eval_delay" not in trial.trial_plan(dataclasses.replace(plan, rows=100)).sections.trainer


def test_cache_key_depends_on_plan_data_and_libraries(monkeypatch):
    plan = dataclasses.replace(plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1)), data_fingerprint="a")
    same = dataclasses.replace(plan, created="2020-01-01T00:00:00+00:00", notes=["x"])
    others = [
        dataclasses.replace(plan, data_fingerprint="b"),
        dataclasses.replace(plan, learning_rate=1e-3),
        dataclasses.replace(plan, world_size=2),
    ]
    before = trial.cache_key(plan)
    assert trial.cache_key(same) == before
    assert len({trial.cache_key(each) for each in [plan, *others]}) == 4
    monkeypatch.setattr(env.metadata, "version", lambda name: "9.9")
    assert trial.cache_key(plan) != before


def test_cache_key_depends_on_modules_that_matter():
    modules = trial.code_hashes(trial.REPOSITORY)
    assert {"sft_recipes/training/main.py", "sft_recipes/sanity/worker.py", "sft_recipes/launch/command.py"} <= set(
        modules
    )
    assert not [path for path in modules if path.startswith(("sft_recipes/tools", "sft_recipes/monitor"))]
    assert "sft_recipes/cli.py" not in modules and "sft_recipes/launch/container.py" not in modules
