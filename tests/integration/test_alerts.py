"""Alerts, stop_on, early stopping and the NaN guard on known series of losses, norms and throughput."""

import dataclasses
import json
import logging
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.callbacks import alerts
from sft_recipes.training.nan_guard import DivergedError, NanGuard


class Ranks:
    """accelerate with one rank."""

    sync_gradients, num_processes, process_index, optimizer_step_was_skipped = True, 1, 0, False

    def reduce(self, tensor, _how):
        return tensor


def make_nan_guard(tmp_path, deepspeed=False, skipped=False):
    from datasets import Dataset

    plan = plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1))
    Dataset.from_list([{"input_ids": [1, 2], "source": f"a.jsonl:{n}"} for n in (1, 2)]).save_to_disk(
        tmp_path / "train"
    )
    trainer = SimpleNamespace(
        accelerator=Ranks(), is_deepspeed_enabled=deepspeed, state=SimpleNamespace(global_step=4),
        rows_of_step={4: [1, 0], 3: [0, 1]}.__getitem__, plan=plan, prepared=tmp_path, model=torch.nn.Linear(1, 1),
    )  # fmt: skip
    trainer.accelerator.optimizer_step_was_skipped = skipped
    return NanGuard(trainer)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_nan_guard_stops_on_non_finite_gradients(tmp_path, norm):
    """DeepSpeed reports -1."""
    watch = make_nan_guard(tmp_path)
    watch.check_loss(torch.tensor(1.5))
    with pytest.raises(DivergedError, match="the gradients are NaN or Inf") as raised:
        watch.check_gradients(torch.tensor(norm))
    assert raised.value.step == 5 and raised.value.rows == ["a.jsonl:2", "a.jsonl:1"]


def test_nan_guard_names_rows_of_the_micro_batch_without_a_finite_loss(tmp_path):
    """Two micro-batches of one row, the second of which is packed."""
    watch = make_nan_guard(tmp_path)
    watch._trainer.plan = dataclasses.replace(
        watch._trainer.plan, gradient_accumulation_steps=2, per_device_train_batch_size=1
    )
    watch._trainer.accelerator.sync_gradients = False
    watch.check_loss(torch.tensor(1.5))
    watch._trainer.accelerator.sync_gradients = True
    with pytest.raises(DivergedError, match="the loss is NaN or Inf") as raised:
        watch.check_loss(torch.tensor(float("nan")))
    assert raised.value.rows == ["a.jsonl:1"]


def test_nan_guard_stops_on_step_skipped_by_deepspeed(tmp_path):
    watch = make_nan_guard(tmp_path, deepspeed=True, skipped=True)
    watch.check_loss(torch.tensor(1.5))
    with pytest.raises(DivergedError, match="the gradients are NaN or Inf"):
        watch.check_gradients(0.7)


def test_stop_names_rows_of_the_applied_step(tmp_path):
    watch = make_nan_guard(tmp_path)
    watch.check_loss(torch.tensor(9.5))
    what = watch.diverged("loss spike: 9.5", applied=True)
    assert (what.step, what.applied, what.loss, what.rows) == (4, True, 9.5, ["a.jsonl:1", "a.jsonl:2"])


def test_resume_compares_with_earlier_log_lines(tmp_path):
    """The flat second half of a healthy run is no plateau."""
    callback, _ = make_callback(tmp_path)
    history = [{"step": step, "loss": 3.0 - step / 200} for step in range(1, 300)]
    callback.on_train_begin(None, SimpleNamespace(log_history=history), None)
    arguments = SimpleNamespace(logging_steps=1)
    for step in range(300, 400):
        state = SimpleNamespace(global_step=step, max_steps=400, is_world_process_zero=True, log_history=history)
        callback.on_log(arguments, state, None, logs={"loss": 1.5})
    assert recorded(tmp_path) == []


def test_nan_guard_accepts_finite_values(tmp_path):
    watch = make_nan_guard(tmp_path)
    watch.check_loss(torch.tensor(1.5))
    watch.check_gradients(torch.tensor(0.7))
    assert (watch.loss, watch.grad_norm) == (1.5, pytest.approx(0.7))


class Lines(logging.Handler):
    """Collect what the callback logs."""

    def __init__(self):
        super().__init__()
        self.printed = []

    def emit(self, record):
        self.printed.append(record.getMessage())


def make_callback(tmp_path, *overrides, steps=400):
    plan = plans.resolve(loader.load("tiny", overrides), Topology(gpus=0, processes=1))
    plan = dataclasses.replace(plan, warmup_steps=20, optimizer_steps=steps)
    callback = alerts.AlertCallback()
    watch = SimpleNamespace(loss=0.0, grad_norm=1.0)
    watch.diverged = lambda what, applied: DivergedError(
        callback.trainer.step, what, watch.loss, watch.grad_norm, ["a.jsonl:9"], applied
    )
    callback.trainer = SimpleNamespace(nan_guard=watch, plan=plan, folder=RunDir(tmp_path))
    callback.on_train_begin(None, SimpleNamespace(log_history=[]), None)
    lines = Lines()
    alerts.log.handlers = [lines]
    return callback, lines.printed


def feed(callback, losses, norms=None, logging_steps=1, **logged):
    """Call the callback as the Trainer does: each step, each with a log line."""
    arguments = SimpleNamespace(logging_steps=logging_steps)
    for step, loss in enumerate(losses, start=1):
        state = SimpleNamespace(global_step=step, max_steps=len(losses), is_world_process_zero=True, log_history=[])
        callback.trainer.nan_guard.loss = loss
        callback.trainer.nan_guard.grad_norm = norms[step - 1] if norms else 1.0
        callback.trainer.step = step
        callback.on_step_end(arguments, state, None)
        line = {"loss": loss, **{key: values[step - 1] for key, values in logged.items()}}
        callback.on_log(arguments, state, None, logs=line)


def recorded(tmp_path):
    path = tmp_path / "warnings.jsonl"
    return (
        [(line["step"], line["rule"]) for line in map(json.loads, path.read_text().splitlines())]
        if path.exists()
        else []
    )


def falling(steps, seed=0, start=2.0, end=1.2, noise=0.05):
    rng = random.Random(seed)
    return [end + (start - end) * 0.98**step + rng.gauss(0, noise) for step in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_healthy_run_has_no_alerts(tmp_path, seed):
    rng = random.Random(seed)
    callback, printed = make_callback(tmp_path)
    norms = [abs(rng.gauss(1.5, 0.5)) for _ in range(400)]
    speeds = [1000 * rng.uniform(0.85, 1.1) * (0.5 if step % 100 == 0 else 1) for step in range(400)]
    feed(callback, falling(400, seed), norms, tokens_per_second=speeds)
    assert (recorded(tmp_path), printed) == ([], [])


def test_loss_spike_is_reported_once(tmp_path):
    losses = falling(400)
    losses[250] += 2.0
    callback, printed = make_callback(tmp_path)
    feed(callback, losses)
    assert recorded(tmp_path) == [(251, "loss_spike")]
    assert len(printed) == 1 and "step 251: loss spike: loss 3." in printed[0]


@pytest.mark.parametrize(("norm", "rule"), [(30.0, "exploding_gradients"), (1e-8, "vanishing_gradients")])
def test_gradient_norms_outside_limits_are_reported_after_a_window(tmp_path, norm, rule):
    norms = [1.0] * 400
    norms[100] = norm
    norms[200:230] = [norm] * 30
    callback, _ = make_callback(tmp_path)
    feed(callback, falling(400), norms)
    assert recorded(tmp_path) == [(210, rule)], "a window of ten steps once, a single step not"


@pytest.mark.parametrize("rule", ["loss_spike", "exploding_gradients"])
def test_stop_on_stops_the_run(tmp_path, rule):
    losses, norms = falling(400), [1.0] * 400
    losses[250] += 2.0
    norms[300:] = [50.0] * 100
    callback, _ = make_callback(tmp_path, f"monitor.stop_on=[{rule}]")
    with pytest.raises(DivergedError, match=rule.replace("_", " ")) as raised:
        feed(callback, losses, norms)
    what = raised.value
    assert what.step == {"loss_spike": 251, "exploding_gradients": 310}[rule]
    assert what.applied and what.rows == ["a.jsonl:9"], "rows of the last applied step"


def test_throughput_drop_is_reported_and_one_slow_line_is_not(tmp_path):
    speeds = [1000.0] * 400
    speeds[100] = 10.0
    speeds[300:] = [300.0] * 100
    callback, _ = make_callback(tmp_path)
    feed(callback, falling(400), tokens_per_second=speeds)
    assert recorded(tmp_path) == [(310, "throughput_drop")]


def test_constant_loss_after_warmup_is_a_plateau(tmp_path):
    rng = random.Random(0)
    callback, _ = make_callback(tmp_path)
    feed(callback, [2.0 + rng.gauss(0, 0.01) for _ in range(400)])
    assert [rule for _, rule in recorded(tmp_path)] == ["plateau"]


def test_converged_loss_is_no_plateau(tmp_path):
    callback, _ = make_callback(tmp_path)
    feed(callback, [0.01] * 400, mean_token_accuracy=[0.99] * 400)
    assert recorded(tmp_path) == []


@pytest.mark.parametrize(
    ("losses", "since"),
    [([], 0), ([3.0], 0), ([3, 2, 1], 0), ([1, 2, 3], 2), ([2, 1, 1, 1.5], 2), ([float("nan"), 2.0, float("nan")], 1)],
)
def test_evaluations_since_best(losses, since):
    assert alerts.evaluations_since_best({10 * n: loss for n, loss in enumerate(losses)}) == since


def test_early_stopping_after_patience(tmp_path):
    callback, _ = make_callback(tmp_path, "monitor.early_stopping_patience=2")
    history, control = [], TrainerControl()
    for step, loss in ((10, 2.0), (20, 1.5), (30, 1.6), (40, 1.7)):
        assert not control.should_training_stop
        history.append({"step": step, "eval_loss": loss})
        state = SimpleNamespace(global_step=step, log_history=history, is_world_process_zero=True)
        callback.on_evaluate(None, state, control)
    assert control.should_training_stop and recorded(tmp_path) == [(40, "early_stopping")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "monitor.stop_on=[loss_spikes]",
            "monitor.stop_on: found 'loss_spikes', expected 'loss_spike', 'exploding_gradients' or",
        ),
        ("monitor.window=1", "monitor.window: found 1, expected greater than or equal to 2"),
        ("monitor.loss_spike=x", "monitor.loss_spike: found 'x', expected a valid number"),
        (
            "monitor.early_stopping_patience=0",
            "monitor.early_stopping_patience: found 0, expected greater than or equal to 1",
        ),
        ("monitor.gradnorm=3", "unknown key monitor.gradnorm"),
    ],
)
def test_invalid_threshold_is_rejected(in_process, override, message):
    done = in_process("plan", "tiny", override)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
