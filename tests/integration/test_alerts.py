"""What stops a run, and what it is warned of: planted in real runs, and in figures that are known."""

import dataclasses
import json
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
from sft_recipes.training.nan_guard import DivergedError, NanGuard, What


class Ranks:
    """accelerate where there is one rank."""

    sync_gradients, num_processes, process_index, optimizer_step_was_skipped = True, 1, 0, False

    def reduce(self, tensor, _how):
        return tensor


def watching(tmp_path, deepspeed=False, skipped=False):
    from datasets import Dataset

    plan = plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1))
    Dataset.from_list([{"input_ids": [1, 2], "source": f"a.jsonl:{n}"} for n in (1, 2)]).save_to_disk(
        tmp_path / "train"
    )
    trainer = SimpleNamespace(
        accelerator=Ranks(), is_deepspeed_enabled=deepspeed, state=SimpleNamespace(global_step=4),
        order_of_step={4: [1, 0], 3: [0, 1]}.__getitem__,
    )  # fmt: skip
    trainer.accelerator.optimizer_step_was_skipped = skipped
    return NanGuard(plan, tmp_path, torch.nn.Linear(1, 1)), trainer


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_gradients_that_are_no_numbers_stop_the_run(tmp_path, norm):
    """-1 is how DeepSpeed writes it."""
    watch, trainer = watching(tmp_path)
    watch.saw(trainer, torch.tensor(1.5))
    with pytest.raises(DivergedError, match="the gradients are no numbers") as raised:
        watch.gradients(trainer, torch.tensor(norm))
    assert raised.value.what.step == 5 and raised.value.what.rows == ["a.jsonl:2", "a.jsonl:1"]


def test_a_step_that_deepspeed_skipped_counts_as_one(tmp_path):
    watch, trainer = watching(tmp_path, deepspeed=True, skipped=True)
    watch.saw(trainer, torch.tensor(1.5))
    with pytest.raises(DivergedError, match="the gradients are no numbers"):
        watch.gradients(trainer, 0.7)


def test_a_guard_names_the_rows_of_the_step_behind_which_it_stops(tmp_path):
    watch, trainer = watching(tmp_path)
    watch.saw(trainer, torch.tensor(9.5))
    what = watch.stopped_by_guard(trainer, "loss spike: 9.5").what
    assert (what.step, what.applied, what.loss, what.rows) == (4, True, 9.5, ["a.jsonl:1", "a.jsonl:2"])


def test_a_run_that_goes_on_is_compared_with_what_it_logged_before(tmp_path):
    """The flat second half of a healthy run is no plateau, whoever sees it alone."""
    subject, _ = guard(tmp_path)
    history = [{"step": step, "loss": 3.0 - step / 200} for step in range(1, 300)]
    subject.on_train_begin(None, SimpleNamespace(log_history=history), None)
    arguments = SimpleNamespace(logging_steps=1)
    for step in range(300, 400):
        state = SimpleNamespace(global_step=step, max_steps=400, is_world_process_zero=True, log_history=history)
        subject.on_log(arguments, state, None, logs={"loss": 1.5})
    assert warned(tmp_path) == []


def test_numbers_pass(tmp_path):
    watch, trainer = watching(tmp_path)
    watch.saw(trainer, torch.tensor(1.5))
    watch.gradients(trainer, torch.tensor(0.7))
    assert (watch.loss, watch.grad_norm) == (1.5, pytest.approx(0.7))


def guard(tmp_path, *overrides, steps=400):
    plan = plans.resolve(loader.load("tiny", overrides), Topology(gpus=0, processes=1))
    plan = dataclasses.replace(plan, warmup_steps=20, optimizer_steps=steps)
    subject = alerts.AlertCallback(plan, RunDir(tmp_path))
    said = []
    watch = SimpleNamespace(loss=0.0, grad_norm=1.0)
    watch.stopped_by_guard = lambda trainer, what: DivergedError(
        What(trainer.step, what, watch.loss, watch.grad_norm, ["a.jsonl:9"], applied=True)
    )
    subject.trainer = SimpleNamespace(watch=watch, say=said.append)
    return subject, said


def feed(subject, losses, norms=None, logging_steps=1, **logged):
    """Steps as the Trainer makes them, each with a log line."""
    arguments = SimpleNamespace(logging_steps=logging_steps)
    for step, loss in enumerate(losses, start=1):
        state = SimpleNamespace(global_step=step, max_steps=len(losses), is_world_process_zero=True, log_history=[])
        subject.trainer.watch.loss = loss
        subject.trainer.watch.grad_norm = norms[step - 1] if norms else 1.0
        subject.trainer.step = step
        subject.on_step_end(arguments, state, None)
        line = {"loss": loss, **{key: values[step - 1] for key, values in logged.items()}}
        subject.on_log(arguments, state, None, logs=line)


def warned(tmp_path):
    path = tmp_path / "warnings.jsonl"
    return (
        [(line["step"], line["rule"]) for line in map(json.loads, path.read_text().splitlines())]
        if path.exists()
        else []
    )


def falling(steps, seed=0, start=2.0, end=1.2, noise=0.05):
    chance = random.Random(seed)
    return [end + (start - end) * 0.98**step + chance.gauss(0, noise) for step in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_not_warned_of_anything(tmp_path, seed):
    chance = random.Random(seed)
    subject, said = guard(tmp_path)
    norms = [abs(chance.gauss(1.5, 0.5)) for _ in range(400)]
    speeds = [1000 * chance.uniform(0.85, 1.1) * (0.5 if step % 100 == 0 else 1) for step in range(400)]
    feed(subject, falling(400, seed), norms, tokens_per_second=speeds)
    assert (warned(tmp_path), said) == ([], [])


def test_a_loss_spike_is_told_once(tmp_path):
    losses = falling(400)
    losses[250] += 2.0
    subject, said = guard(tmp_path)
    feed(subject, losses)
    assert warned(tmp_path) == [(251, "loss_spike")]
    assert len(said) == 1 and "step 251  loss spike: loss 3." in said[0]


@pytest.mark.parametrize(("norm", "rule"), [(30.0, "exploding_gradients"), (1e-8, "vanishing_gradients")])
def test_gradient_norms_outside_the_documents_bounds_are_told_after_a_window(tmp_path, norm, rule):
    norms = [1.0] * 400
    norms[100] = norm
    norms[200:230] = [norm] * 30
    subject, _ = guard(tmp_path)
    feed(subject, falling(400), norms)
    assert warned(tmp_path) == [(210, rule)], "one step alone is not told, a window of ten once"


@pytest.mark.parametrize("rule", ["loss_spike", "exploding_gradients"])
def test_a_guard_stops_the_run_where_the_recipe_says_so(tmp_path, rule):
    losses, norms = falling(400), [1.0] * 400
    losses[250] += 2.0
    norms[300:] = [50.0] * 100
    subject, _ = guard(tmp_path, f"monitor.stop_on=[{rule}]")
    with pytest.raises(DivergedError, match=rule.replace("_", " ")) as raised:
        feed(subject, losses, norms)
    what = raised.value.what
    assert what.step == {"loss_spike": 251, "exploding_gradients": 310}[rule]
    assert what.applied and what.rows == ["a.jsonl:9"], "of the step that it stopped behind, which was applied"


def test_a_throughput_drop_is_told_and_a_slow_line_is_not(tmp_path):
    speeds = [1000.0] * 400
    speeds[100] = 10.0
    speeds[300:] = [300.0] * 100
    subject, _ = guard(tmp_path)
    feed(subject, falling(400), tokens_per_second=speeds)
    assert warned(tmp_path) == [(310, "throughput_drop")]


def test_a_loss_that_does_not_move_after_warm_up_is_told(tmp_path):
    chance = random.Random(0)
    subject, _ = guard(tmp_path)
    feed(subject, [2.0 + chance.gauss(0, 0.01) for _ in range(400)])
    assert [rule for _, rule in warned(tmp_path)] == ["plateau"]


def test_a_loss_with_nothing_left_to_learn_has_not_stalled(tmp_path):
    subject, _ = guard(tmp_path)
    feed(subject, [0.01] * 400, mean_token_accuracy=[0.99] * 400)
    assert warned(tmp_path) == []


@pytest.mark.parametrize(
    ("losses", "since"),
    [([], 0), ([3.0], 0), ([3, 2, 1], 0), ([1, 2, 3], 2), ([2, 1, 1, 1.5], 2), ([float("nan"), 2.0, float("nan")], 1)],
)
def test_evaluations_since_the_best_are_counted(losses, since):
    assert alerts.evaluations_since_the_best({10 * n: loss for n, loss in enumerate(losses)}) == since


def test_patience_ends_the_run_on_the_evaluation_that_exceeds_it(tmp_path):
    subject, _ = guard(tmp_path, "monitor.early_stopping_patience=2")
    history, control = [], TrainerControl()
    for step, loss in ((10, 2.0), (20, 1.5), (30, 1.6), (40, 1.7)):
        assert not control.should_training_stop
        history.append({"step": step, "eval_loss": loss})
        state = SimpleNamespace(global_step=step, log_history=history, is_world_process_zero=True)
        subject.on_evaluate(None, state, control)
    assert control.should_training_stop and warned(tmp_path) == [(40, "early_stopping")]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("monitor.stop_on=[loss_spikes]", "monitor.stop_on names 'loss_spikes'; wanted some of loss_spike, exploding"),
        ("monitor.window=1", "monitor.window is 1; wanted 2 to 10000"),
        ("monitor.loss_spike=x", "monitor.loss_spike is 'x'; wanted a number"),
        ("monitor.early_stopping_patience=0", "monitor.early_stopping_patience is 0; wanted at least 1"),
        ("monitor.gradnorm=3", "unknown key monitor.gradnorm"),
    ],
)
def test_a_wrong_threshold_is_refused(workplace, said, message):
    done = workplace.sft("plan", "tiny", said)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


@pytest.mark.parametrize("flat", [False, True], ids=["rows below each other", "rows end to end"])
def test_the_examples_of_a_broken_loss_are_found_in_either_layout(flat):
    """Two packed rows of 5 and 4 tokens; the second row's first example (2 tokens) predicts no number."""
    from sft_recipes.training.nan_guard import _of_row, _of_the_row

    rows = [
        {"input_ids": [0] * 5, "source": ["a:1", "a:2"], "seq_lengths": [3, 2]},
        {"input_ids": [0] * 4, "source": ["a:3", "a:4"], "seq_lengths": [2, 2]},
    ]
    marks = torch.zeros(1, 8, dtype=torch.bool) if flat else torch.zeros(2, 4, dtype=torch.bool)
    marks[(0, 5) if flat else (1, 0)] = True
    found = [_of_row(rows[place], _of_the_row(marks, rows, [0, 1], 0, place)) for place in (0, 1)]
    assert found == [[], ["a:3"]]
    alone = torch.zeros(1, 4, dtype=torch.bool)
    alone[0, 3] = True
    assert _of_row(rows[0], _of_the_row(alone, rows, [0], 0, 0)) == ["a:2"], "a micro-batch of one row"
