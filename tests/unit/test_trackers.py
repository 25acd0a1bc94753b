"""Trackers named in REPORT_TO: accepted names, forwarded events, and a tracker that raises."""

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime import env, timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.callbacks import trackers

RECORDS = ({"loss": 2.0}, {"loss": 1.0}, {"loss": 0.5})


class Recorder(TrainerCallback):
    """A tracker that keeps what it is sent, and raises at the loss 1.0 if `raises`."""

    sent, raises = [], False

    def on_log(self, args, state, control, logs=None, **_):
        if self.raises and logs.get("loss") == 1.0:
            raise ConnectionError("connection reset\nby peer")
        self.sent.append(logs)

    def on_train_end(self, args, state, control, **_):
        self.sent.append("end")


@pytest.fixture
def plan():
    return plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1))


def run_with(tracker, rank_0=True, stopped=False):
    """Three log records and the end of training, as the Trainer calls a callback."""
    state = SimpleNamespace(is_world_process_zero=rank_0, global_step=0, epoch=0.5, log_history=[])
    tracker.trainer.stopping.stopped = stopped
    tracker.on_train_begin(None, state, None)
    for record in RECORDS:
        state.global_step += 1
        tracker.on_log(None, state, None, logs=record)
    tracker.on_train_end(None, state, None)


def build(monkeypatch, plan, folder, raises=False):
    monkeypatch.setattr(Recorder, "sent", [])
    monkeypatch.setattr(Recorder, "raises", raises)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Recorder)
    return make_tracker("mlflow", plan, folder)


def make_tracker(name, plan, folder, stopped=False):
    tracker = trackers.TrackerCallback(name)
    tracker.trainer = SimpleNamespace(plan=plan, folder=RunDir(folder), stopping=SimpleNamespace(stopped=stopped))
    return tracker


def test_tracker_gets_all_records_and_the_summary(monkeypatch, plan, tmp_path):
    run_with(build(monkeypatch, plan, tmp_path))
    assert Recorder.sent == [*RECORDS, {"final/total_steps": 3, "final/epochs_completed": 0.5}, "end"]


def test_stopped_run_has_no_summary(monkeypatch, plan, tmp_path):
    run_with(build(monkeypatch, plan, tmp_path), stopped=True)
    assert Recorder.sent == [*RECORDS, "end"]


def test_only_rank_0_creates_a_tracker(monkeypatch, plan, tmp_path):
    run_with(build(monkeypatch, plan, tmp_path), rank_0=False)
    assert Recorder.sent == []


def test_tracker_that_raises_is_disabled_with_one_warning(monkeypatch, plan, tmp_path, caplog):
    run_with(build(monkeypatch, plan, tmp_path, raises=True))
    assert Recorder.sent == [RECORDS[0]]
    assert caplog.messages == ["mlflow: connection reset; disabled, metrics.jsonl has all metrics"]


def test_tensorboard_on_a_disk_that_refuses_it_is_disabled(plan, tmp_path, caplog):
    RunDir(tmp_path).tensorboard.write_text("a file, not a directory")
    run_with(make_tracker("tensorboard", plan, tmp_path))
    (message,) = caplog.messages
    assert message.startswith("tensorboard: ") and message.endswith("; disabled, metrics.jsonl has all metrics")


def test_tensorboard_of_a_resumed_run_purges_later_steps(plan, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, losses in ((0, (4.0, 3.0, 2.0)), (2, (1.0,))):
        tracker = make_tracker("tensorboard", plan, tmp_path, stopped=True)
        state = SimpleNamespace(
            is_world_process_zero=True, is_hyper_param_search=False, global_step=resumed, epoch=0.0, log_history=[]
        )
        tracker.on_train_begin(SimpleNamespace(to_json_string=lambda: "{}"), state, None)
        for loss in losses:
            state.global_step += 1
            tracker.on_log(None, state, None, logs={"loss": loss})
        tracker.on_train_end(None, state, None)
    read = EventAccumulator(str(RunDir(tmp_path).tensorboard))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 4.0), (2, 3.0), (3, 1.0)]


def wandb_arguments(plan, folder):
    """The arguments with which a run starts its W&B run."""
    started, tracker = [], object.__new__(trackers.WeightsAndBiases)
    tracker.plan, tracker.folder = plan, RunDir(Path(folder))
    tracker._wandb = SimpleNamespace(init=lambda **named: started.append(named), Settings=dict)
    tracker._start("offline", "sft-recipes")
    return started[0]


def wandb_id(plan, folder):
    return wandb_arguments(plan, folder)["id"]


def test_resumed_run_continues_the_same_wandb_run(plan):
    plan = dataclasses.replace(plan, run_id="0123456789abcdef")
    first = wandb_id(plan, "runs/a")
    assert first == wandb_id(dataclasses.replace(plan, optimizer_steps=5), "runs/a")
    other = dataclasses.replace(plan, run_id="fedcba9876543210")
    ids = {first, wandb_id(other, "runs/a"), wandb_id(plan, "runs/b")}
    assert len(ids) == 3 and re.fullmatch(r"a-[0-9a-f]{8}", first)


def test_timeouts_of_wandb_are_ours_unless_its_variables_are_set(monkeypatch, plan, tmp_path):
    def limits():
        settings = wandb_arguments(plan, tmp_path)["settings"]
        return {name: value for name, value in settings.items() if name.endswith("_timeout")}

    monkeypatch.delenv("WANDB_FINISH_TIMEOUT", raising=False)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "")
    assert limits() == {"init_timeout": timeouts.TRACKER_INIT, "finish_timeout": timeouts.TRACKER_FINISH}
    assert "WANDB_INIT_TIMEOUT" not in os.environ, "W&B rejects an empty one"
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    assert limits() == {"finish_timeout": timeouts.TRACKER_FINISH}
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "600")
    assert limits() == {}


def test_names_for_report_to_are_integrations_of_transformers():
    assert set(env._TRACKERS) < INTEGRATION_TO_CALLBACK.keys()


def test_report_to_accepts_what_is_installed(monkeypatch, tmp_path):
    (tmp_path / "mlflow.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("REPORT_TO", "mlflow, tensorboard")
    assert env.reporters() == ["mlflow", "tensorboard"]
    monkeypatch.setenv("REPORT_TO", "")
    assert env.reporters() == ["tensorboard"]
    monkeypatch.setenv("REPORT_TO", "none")
    assert env.reporters() == []


def test_report_to_rejects_what_is_not_installed_and_lists_the_rest(monkeypatch):
    absent = next(name for name in env._TRACKERS if not importlib.util.find_spec(name))
    installed = [name for name in env._TRACKERS if importlib.util.find_spec(name)]
    monkeypatch.setenv("REPORT_TO", f"tensorboard,{absent}")
    with pytest.raises(SetupError) as error:
        env.reporters()
    assert str(error.value) == f"REPORT_TO: {absent!r} is not installed. Set none, or some of {', '.join(installed)}"


def test_nothing_is_uploaded_unless_it_is_named(monkeypatch, plan, tmp_path):
    monkeypatch.delenv("CLEARML_LOG_MODEL", raising=False)
    monkeypatch.delenv("WANDB_LOG_MODEL", raising=False)
    tracker = make_tracker("clearml", plan, tmp_path)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "clearml", Recorder)
    run_with(tracker)
    assert trackers.os.environ["CLEARML_LOG_MODEL"] == "FALSE"
    assert not trackers.WeightsAndBiases(tracker.trainer)._log_model.is_enabled
    fields = json.loads((Path(loader.__file__).parent / "trainer_fields.json").read_text())
    assert {"trackio_space_id", "trackio_static_space_id"} <= fields.keys(), "a recipe names a Space, or there is none"
