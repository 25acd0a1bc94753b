"""The sanity gate: what it finds wrong before a run, what it leaves behind, and when it is asked at all."""

import dataclasses
import datetime
import json
import shutil

import pytest
import torch
from helpers.workplace import assert_one_trainer_at_a_time, manifest

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime import env
from sft_recipes.runtime.run_dir import RunDir, write_json
from sft_recipes.sanity import checks, reload_worker, trial, worker
from sft_recipes.training import stop_signal
from sft_recipes.training.trainer import RecipeTrainer

FEW_ANSWERS = ("generation.show=2", "generation.exact_match=0", "generation.max_new_tokens=4")
CHECKS = [
    "rows and masks", "first loss", "loss falls", "numbers", "gradient norm", "peak memory", "evaluation", "answers",
    "checkpoint",
]  # fmt: skip


def test_train_tries_the_plan_first_and_the_receipt_holds_the_verdict(short_run, shared_workplace):
    recorded = manifest(short_run)["starts"][-1]["sanity"]
    receipt = json.loads((shared_workplace.path / recorded["receipt"]).read_text())
    assert [check["name"] for check in receipt["checks"]] == CHECKS and receipt["recipe"] == "tiny"
    passed = {check["name"]: check["passed"] for check in receipt["checks"]}
    assert passed.pop("answers") is None and all(passed.values()), "the model began with random weights"
    assert receipt["forecast"]["seconds"] > 0 and receipt["forecast"]["gpu_hours"] is None


def test_the_receipt_spares_the_next_start_of_the_same_plan(short_run, tracked_run, shared_workplace):
    receipts = list((shared_workplace.runs / ".sanity").iterdir())
    assert len(receipts) == 1 and receipts[0].suffix == ".json", "one trial, and nothing of it lies about"
    first, second = (manifest(run)["starts"][-1] for run in (short_run, tracked_run))
    assert first["sanity"] == second["sanity"]
    written = datetime.datetime.fromtimestamp(receipts[0].stat().st_mtime, datetime.UTC).isoformat()
    assert written <= first["at"] <= second["at"]


def test_the_checkpoint_is_reloaded_once_the_trials_trainer_is_gone(short_run, shared_workplace):
    assert_one_trainer_at_a_time(shared_workplace.path / "device.jsonl", ranks=1)


def test_the_trial_leaves_no_trace_in_the_run(short_run, tracked_run):
    """With a trial before it or without, with trackers or without: the same weights."""
    from safetensors.torch import load_file
    from torch import equal

    tried, untried = (load_file(run / "last" / "model.safetensors") for run in (short_run, tracked_run))
    assert tried.keys() == untried.keys() and all(equal(tried[name], untried[name]) for name in tried)


def test_the_forecast_is_what_the_steps_took(monkeypatch):
    plan = dataclasses.replace(
        plans.make(loader.load("8b"), Topology(gpus=8, processes=8, gpu_type="h100-80g")),
        optimizer_steps=1001, gradient_accumulation_steps=4,
    )  # fmt: skip
    figures = {
        "step_seconds": 3.0, "accumulation": 2, "validation_rows": 1000, "evaluation_seconds_a_row": 0.01,
        "save_seconds": 60.0,
    }  # fmt: skip
    monkeypatch.setenv("GPU_HOUR_PRICE", "2.5")
    forecast = trial.measured_forecast(plan, figures)
    evaluations, saves = 2, 1  # every 1000 and every 2000 steps, and the last
    models = (
        (evaluations + 2) * plans.load_of(plan, plan.sections.model.architecture).trained_bytes / plan.checkpoint_bytes
    )
    seconds = 1001 * 3.0 * 2 + evaluations * 1000 * 0.01 + (saves + models) * 60.0
    assert forecast["seconds"] == pytest.approx(seconds, abs=0.1)
    assert forecast["gpu_hours"] == pytest.approx(seconds * 8 / 3600, abs=0.01)
    above_13b = trial.measured_forecast(plan, {**figures, "save_seconds": None})
    said = plan.forecast["saving_seconds"] if plan.forecast else 0.0
    assert above_13b["seconds"] == pytest.approx(1001 * 3.0 * 2 + evaluations * 1000 * 0.01 + said, abs=0.1)
    assert forecast["money"] == pytest.approx(seconds * 8 / 3600 * 2.5, abs=0.05)


@pytest.mark.parametrize("word", ["no", "Skip", "0"])
def test_another_word_than_skip_is_refused(workplace, word):
    done = workplace.sft("train", "tiny", SANITY=word)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"error: SANITY: {word!r} is not known; say SANITY=skip" in done.stderr


def test_a_template_that_never_trains_the_end_of_turn_is_refused_before_anything_is_tried(workplace, few_rows):
    template = workplace.path / "endless.jinja"
    template.write_text(
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{%- else %}{{ m.content }}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    done = workplace.sft("sanity", "tiny", f"data.train={few_rows}", f"model.chat_template={template}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the model never learns to stop" in done.stderr


@pytest.fixture(scope="module")
def trial_of_few_rows(shared_workplace, few_rows, tmp_path_factory):
    """A settled plan, its trial, and its prepared rows, for trials that are carried out in this process."""
    from sft_recipes.data.prepare import prepare

    settings = [f"data.train={few_rows}", "trainer.max_length=128", "batch.effective_batch_size=2", *FEW_ANSWERS]
    plan = plans.make(loader.load("tiny", settings), Topology(gpus=0, processes=1))
    prepared = prepare(plan, tmp_path_factory.mktemp("store"))
    return trial.of(plans.settle(plan, prepared)), prepared


def carried_out(tmp_path, planned, prepared, monkeypatch):
    """The checks of the trial, and of the reload where none failed before it; the gate starts processes for each."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    found = []
    for program, folder in (
        (worker.carry_out, RunDir(tmp_path)),
        (reload_worker.reload, RunDir(tmp_path / "reload")),
    ):
        folder.path.mkdir(exist_ok=True)
        plans.write(planned, folder.plan)
        write_json(folder.prepared, dataclasses.asdict(prepared))
        try:
            found += program(planned, folder)[0]
        except worker.RankAloneError as error:  # which `execute` writes before it leaves
            found += error.checks
        if any(check.passed is False for check in found):
            break
    return {check.name: check for check in found}


def test_a_healthy_trial_passes_in_all(tmp_path, trial_of_few_rows, monkeypatch):
    found = carried_out(tmp_path, *trial_of_few_rows, monkeypatch)
    assert list(found) == CHECKS
    assert {name: check.passed for name, check in found.items() if not check.passed} == {"answers": None}


@pytest.mark.parametrize(("rate", "way"), [(0.0, "raise the rate"), (2.0, "it rises: lower the rate")])
def test_a_rate_of_nothing_or_a_thousand_times_too_high_fails_for_the_loss(
    tmp_path, trial_of_few_rows, monkeypatch, rate, way
):
    planned, prepared = trial_of_few_rows
    found = carried_out(tmp_path, dataclasses.replace(planned, learning_rate=rate), prepared, monkeypatch)
    assert found["loss falls"].passed is False
    assert (
        found["loss falls"].way_out.startswith(way)
        and "row tiny starts from trainer.learning_rate=2.0e-3" in found["loss falls"].way_out
    )
    assert found["rows and masks"].passed and "checkpoint" not in found, "what failed is not reloaded"


@pytest.mark.parametrize(
    "at", [0, 3, 13], ids=["before its first step", "behind its third", "in the steps that it repeats"]
)
def test_a_trial_whose_ranks_agreed_to_stop_has_no_verdict(tmp_path, trial_of_few_rows, monkeypatch, at):
    """As where a rank gets the signal that its launcher does not: the steps that it took are no healthy trial's."""
    seen = {"steps": 0}
    monkeypatch.setattr(stop_signal, "asked", lambda: seen["steps"] >= at)
    step = RecipeTrainer.training_step
    monkeypatch.setattr(
        RecipeTrainer, "training_step", lambda *a, **k: seen.update(steps=seen["steps"] + 1) or step(*a, **k)
    )
    with pytest.raises(worker.StopRequestedError):
        carried_out(tmp_path, *trial_of_few_rows, monkeypatch)


def test_a_checkpoint_that_does_not_load_fails_for_it(tmp_path, trial_of_few_rows, monkeypatch):
    """The optimizer's state is cut short, as a disk does that lies about what it has written."""
    from sft_recipes.training.checkpoint import checkpoint_format

    seal = checkpoint_format.write_commit_marker

    def cut_short(folder, record):
        seal(folder, record)
        (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:1000])

    monkeypatch.setattr(checkpoint_format, "write_commit_marker", cut_short)
    found = carried_out(tmp_path, *trial_of_few_rows, monkeypatch)
    assert {name for name, check in found.items() if check.passed is False} == {"checkpoint"}
    assert "checkpoint-10: optimizer.pt has 1000 bytes" in found["checkpoint"].said


def test_a_checkpoint_that_lost_the_optimizers_state_fails_for_other_losses(tmp_path, trial_of_few_rows, monkeypatch):
    """What was saved is whole, and is not what the optimizer held."""
    from sft_recipes.training.checkpoint import checkpoint_format

    seal = checkpoint_format.write_commit_marker

    def lose(folder, record):
        state = torch.load(folder / "optimizer.pt")
        for one in state["state"].values():
            one["exp_avg"].zero_()
        torch.save(state, folder / "optimizer.pt")
        record["files"].update(checkpoint_format.compute_checksums(folder, ["optimizer.pt"]))
        seal(folder, record)

    monkeypatch.setattr(checkpoint_format, "write_commit_marker", lose)
    found = carried_out(tmp_path, *trial_of_few_rows, monkeypatch)
    assert found["checkpoint"].passed is False and "checkpoint-10 resumes: losses " in found["checkpoint"].said


def test_answers_are_skipped_where_the_unsharded_model_does_not_fit(tmp_path, trial_of_few_rows, monkeypatch):
    """Under ZeRO-3 and FSDP2 training never needs one device to hold it, so that must not fail the plan."""
    from transformers import AutoModelForCausalLM

    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", runs_out)
    state = worker.TrialState(losses=[], ends_of_turn=[1], better_than_chance=True)
    check = reload_worker.saved_answers_are_text(trial_of_few_rows[0], RunDir(tmp_path), state)
    assert check.passed is None and "does not fit: rank 0 ran out of memory" in check.said


@pytest.mark.parametrize("what", ["all", "ends"])
def test_masked_labels_fail_for_the_masks(tmp_path, trial_of_few_rows, monkeypatch, what):
    """Rows as a broken preparation would leave them: every label masked, or each end of turn."""
    from datasets import load_from_disk

    planned, prepared = trial_of_few_rows
    copy = tmp_path / "prepared-copy"
    shutil.copytree(prepared.folder, copy)
    ends = set(json.loads((copy / "details.json").read_text())["end_of_turn_ids"])

    def mask(row):
        return {"labels": [-100 if what == "all" or label in ends else label for label in row["labels"]]}

    rows = load_from_disk(prepared.folder + "/train")
    rows = rows.map(mask, features=rows.features)
    shutil.rmtree(copy / "train")
    rows.save_to_disk(copy / "train")
    run = tmp_path / "run"
    run.mkdir()
    found = carried_out(run, planned, dataclasses.replace(prepared, folder=str(copy)), monkeypatch)
    assert found["rows and masks"].passed is False
    wanted = "labels are masked: nothing would be learned" if what == "all" else "the model would never learn to stop"
    assert wanted in found["rows and masks"].said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The answer is 42.", None),
        ("9", None),
        ("def add(a, b):\n\treturn a + b\n", None),
        ("La réponse est : « quarante-deux » \N{EM DASH} 四十二。", None),
        ("very, very, very good, and it is also very well known that this has no end", None),
        ("", "nothing is said"),
        ("  \n", "nothing is said"),
        ("the the the the the the the the the the the the the the the the the the the the the", "one word again and again"),
        ("\ufffd\ufffd and \ufffd", "characters that are no text"),
        ("می\u200cخواهم می\u200cروم", None),  # noqa: RUF001  Persian, with its joiners
        ("Yes.\r\nNo.\r\n", None),
        ("0" * 48, "the same again and again"),
        ("ab" * 200, "the same again and again"),
        ("\x00\x01\x02 ok", "characters that are no text"),
    ],
)  # fmt: skip
def test_garbled_text_is_told_from_text(text, reason):
    assert checks.garbled(text) == reason


@pytest.mark.parametrize(("rows", "wanted"), [(896, 64), (64, 64), (20, 64), (1, 4), (17, 32)])
def test_the_longest_rows_are_among_the_trials(rows, wanted):
    lengths = [(7 * number) % rows + 1 for number in range(rows)]
    chosen = worker.choose(lengths, wanted)
    assert len(chosen) == wanted
    assert len(set(chosen)) == min(rows, wanted, 64), "none is taken twice before all are"
    longest = sorted(range(rows), key=lambda row: -lengths[row])[: min(16, rows, wanted)]
    assert {lengths[row] for row in longest} <= {lengths[row] for row in chosen}


@pytest.mark.parametrize("name", loader.names())
def test_a_trial_is_the_plan_on_few_rows(name):
    from sft_recipes.launch.topology import plan_topology

    recipe = loader.load(name)
    plan = dataclasses.replace(plans.make(recipe, plan_topology(recipe)), rows=100_000)
    short = trial.of(plan)
    for kept in ("parallelism", "per_device_train_batch_size", "world_size", "learning_rate", "max_length", "dtypes"):
        assert getattr(short, kept) == getattr(plan, kept)
    assert 10 <= short.optimizer_steps <= 20 and 50 <= short.rows <= 512
    assert short.rows % short.effective_batch_size == 0 and short.warmup_steps == 2
    assert trial.resumes(plan) == (not name.startswith(("32b", "70b")))


def test_another_weight_file_in_the_same_folder_is_another_plan(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    words = ["model.from_scratch=false", "model.architecture={}", f"model.name_or_path={model}"]
    plan = plans.make(loader.load("tiny", words), Topology(gpus=0, processes=1))
    before = trial.key(plan)
    assert trial.key(plan) == before
    (model / "model.safetensors").write_bytes(b"22")
    assert trial.key(plan) != before


@pytest.mark.parametrize(
    ("rate", "factor", "said"),
    [
        (2e-5, 2, "trainer.learning_rate=4.0e-5"),
        (5e-5, 2, "trainer.learning_rate=1.0e-4 allow_out_of_range=[learning_rate] (row 7-13b wants 1e-05 to 5e-05)"),
        (
            1e-5,
            1 / 3,
            "trainer.learning_rate=3.3e-6 allow_out_of_range=[learning_rate] (row 7-13b wants 1e-05 to 5e-05)",
        ),
        (2e-3, 2, "row 7-13b starts from trainer.learning_rate=2.0e-5"),
    ],
)
def test_another_rate_is_advised_with_what_lets_it_pass(rate, factor, said):
    plan = plans.make(loader.load("8b"), Topology(gpus=8, processes=8, gpu_type="h100-80g"))
    assert checks.another_rate(dataclasses.replace(plan, learning_rate=rate), factor) == said


def test_a_model_whose_numbers_nobody_stated_is_forecast_too():
    words = ["model.from_scratch=false", "model.architecture={}", "model.name_or_path=/somewhere"]
    plan = dataclasses.replace(
        plans.make(loader.load("tiny", words), Topology(gpus=0, processes=1)), optimizer_steps=10
    )
    figures = {
        "step_seconds": 3.0, "accumulation": 1, "validation_rows": 10, "evaluation_seconds_a_row": 0.1,
        "save_seconds": 2.0,
    }  # fmt: skip
    assert trial.measured_forecast(plan, figures)["seconds"] == pytest.approx(10 * 3.0 + 10 * 0.1 + 2.0)


@pytest.mark.parametrize(("loss", "knows"), [(1.4, True), (5.4, True), (5.75, False), (7.0, False)])
def test_random_weights_are_told_from_trained_ones_by_chance(loss, knows):
    assert checks.knows_more_than_chance(loss, 320) == knows


def test_the_trial_keeps_its_own_evaluations_whatever_the_recipe_delays():
    plan = plans.make(loader.load("tiny", ["trainer.eval_delay=500"]), Topology(gpus=0, processes=1))
    assert "eval_delay" not in trial.of(dataclasses.replace(plan, rows=100)).sections.trainer


def test_a_trial_that_was_killed_is_cleared_away_and_a_living_one_is_not(tmp_path):
    from sft_recipes.launch import run_lock, sanity_check

    for name in ("trial-dead", "trial-alive"):
        (tmp_path / name / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "receipt.json").write_text("{}")
    with run_lock.held(RunDir(tmp_path / "trial-alive")):
        sanity_check._forget_what_was_killed(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["receipt.json", "trial-alive"]


def test_a_receipt_is_for_one_plan_data_and_environment(monkeypatch):
    plan = dataclasses.replace(plans.make(loader.load("tiny"), Topology(gpus=0, processes=1)), data_fingerprint="a")
    same = dataclasses.replace(plan, created="2020-01-01T00:00:00+00:00", notes=["x"])
    others = [
        dataclasses.replace(plan, data_fingerprint="b"),
        dataclasses.replace(plan, learning_rate=1e-3),
        dataclasses.replace(plan, world_size=2),
    ]
    assert trial.key(plan) == trial.key(same)
    assert len({trial.key(one) for one in [plan, *others]}) == 4
    before = trial.key(plan)
    monkeypatch.setattr(env.metadata, "version", lambda name: "9.9")
    assert trial.key(plan) != before
