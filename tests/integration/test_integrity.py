"""Integrity checks of a run: fingerprints that change with any bit, the data-order check, the replica check."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

from sft_recipes.config import loader
from sft_recipes.data.packing import rows_per_epoch
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import TrainingError
from sft_recipes.runtime.run_dir import RunDir, write_json
from sft_recipes.training import attention, dataset, sft_config, stop_signal
from sft_recipes.training import trainer as trainers
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.integrity import data_order, fingerprint, replica_check

ROWS = 23  # five steps of four per epoch; three are dropped


@pytest.fixture
def begin(tmp_path, model_folder, tokenizer):
    """Makes a trainer over rows of several lengths, for two epochs, in a run directory."""

    def make(name="run", *overrides, packing=False, weights=()):
        settings = (
            "batch.min_optimizer_steps=1", "batch.effective_batch_size=4", "batch.max_per_device_batch_size=2",
            "trainer.max_length=64", "trainer.num_train_epochs=2", "trainer.logging_steps=3", "trainer.save_steps=100",
            f"trainer.packing={str(packing).lower()}", *overrides,
        )  # fmt: skip
        plan = plans.resolve(loader.load("tiny", settings), Topology(gpus=0, processes=1))
        rows_used = rows_per_epoch(weights or [(ROWS, 1)])
        plan = plans.with_prepared_data(plan, plans.Prepared("f", "x", "m", {}, ROWS, rows_used, 100, 100, 2))
        folder = RunDir(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        write_json(folder.path / "details.json", {"source_weights": weights})
        ids = [[5 + n % 50] * (4 + n % 7) for n in range(ROWS)]
        columns = {"input_ids": ids, "labels": ids}
        if packing:
            columns["seq_lengths"] = [[2, len(row) - 2] for row in ids]
        rows = Dataset.from_dict(columns)
        validation, passes = dataset.split_into_passes(
            rows.select([0, 1]), {"rows": 2}, plan.per_device_train_batch_size
        )
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        way = attention.select(plan, model)
        return trainers.RecipeTrainer(
            plan,
            passes,
            {"architecture": {}, "folder": str(folder.path)},
            model=model,
            args=sft_config.make_sft_config(plan, folder),
            train_dataset=rows,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=dataset.make_collator(plan, tokenizer.pad_token_id, way.name),
        )

    return make


def flip(tensor, element, bit):
    """One bit of one element, in place."""
    of_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    mask = 1 << bit if bit < 8 * tensor.element_size() - 1 or of_size is torch.uint8 else -(1 << bit)
    tensor.data.reshape(-1)[element : element + 1].view(of_size).bitwise_xor_(mask)


def fingerprint_of(tensor, name="x"):
    return fingerprint.of({name: tensor})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_fingerprint_changes_with_every_bit(dtype):
    tensor = torch.arange(1, 12).to(dtype)  # in bytes no multiple of eight, but for int64
    seen = {fingerprint_of(tensor)}
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            flip(tensor, element, bit)
            seen.add(fingerprint_of(tensor))
            flip(tensor, element, bit)
    assert len(seen) == 1 + 8 * tensor.element_size() * tensor.numel()


def test_fingerprint_changes_in_every_chunk_and_two_flipped_signs_do_not_cancel():
    tensor = torch.zeros(2 * 2 * fingerprint._CHUNK + 3)
    original = fingerprint_of(tensor)
    ends = [0, 2 * fingerprint._CHUNK - 1, 2 * fingerprint._CHUNK, tensor.numel() - 1]
    seen = {original}
    for first, second in itertools.combinations(ends, 2):
        flip(tensor, first, 31)
        seen.add(fingerprint_of(tensor))
        flip(tensor, second, 31)
        seen.add(fingerprint_of(tensor))
        tensor.zero_()
    assert len(seen) == 1 + 3 + 6, "each flip, and each pair of flips, has a different fingerprint"
    assert fingerprint_of(tensor) == original


def test_fingerprint_depends_on_order_name_shape_dtype_and_bits():
    tensor = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 6.0])
    others = [
        fingerprint_of(tensor[[1, 0, 2, 3, 4, 5]]), fingerprint_of(tensor[[2, 1, 0, 3, 4, 5]]), fingerprint_of(tensor, "y"),
        fingerprint_of(tensor.reshape(2, 3)), fingerprint_of(tensor.reshape(3, 2).t()), fingerprint_of(tensor.view(torch.int32)),
        fingerprint_of(torch.tensor([1.0, 2.0, 3.0, 4.0, -0.0, 6.0])), fingerprint_of(torch.zeros(0)), fingerprint_of(torch.zeros(())),
        fingerprint_of(torch.zeros(1)), fingerprint_of(torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)),
        fingerprint_of(torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)),
    ]  # fmt: skip
    assert len({fingerprint_of(tensor), *others}) == 13
    assert fingerprint_of(tensor.reshape(3, 2).t()) == fingerprint_of(tensor.reshape(3, 2).t().contiguous()), (
        "the memory layout does not count"
    )


def changes(trainer):
    """Changes of each kind of state, one bit or counter at a time."""
    inner = trainer.optimizer.optimizer
    group, weight = inner.param_groups[0], inner.param_groups[0]["params"][0]
    yield "weights", lambda: flip(trainer.model.model.norm.weight, 3, 0)
    yield "optimizer", lambda: flip(inner.state[weight]["exp_avg"], 11, 31)
    yield "optimizer", lambda: flip(inner.state[weight]["exp_avg_sq"], 0, 1)
    yield "optimizer", lambda: flip(inner.state[weight]["step"], 0, 23)
    yield "optimizer", lambda: group.update(lr=math.nextafter(group["lr"], 1))
    yield "scheduler", lambda: setattr(trainer.lr_scheduler, "last_epoch", trainer.lr_scheduler.last_epoch + 1)
    yield "rng", random.random
    yield "rng", np.random.random
    yield "rng", lambda: torch.rand(1)


def test_each_kind_of_state_changes_its_own_fingerprint(begin):
    subject = begin()
    subject.train()
    before = fingerprint.of_rank(subject)
    assert before == fingerprint.of_rank(subject), "a fingerprint changes nothing"
    assert set(before) == {"weights", "optimizer", "scheduler", "rng"}
    changed = 0
    for kind, change in changes(subject):
        change()
        after = fingerprint.of_rank(subject)
        assert {name for name in before if before[name] != after[name]} == {kind}
        before, changed = after, changed + 1
    assert changed == 9


@pytest.mark.parametrize(
    ("more", "packing"),
    [((), False), (("batch.max_per_device_batch_size=1",), True), (("trainer.dataloader_num_workers=2",), True)],
)
def test_rows_hash_does_not_depend_on_micro_batches_or_workers(begin, more, packing):
    subject = begin("run", *more, packing=packing)
    subject.train()
    assert (subject.integrity.data_order.steps, subject.state.global_step) == (10, 10)
    by_hand = data_order.DataOrderCheck(subject._get_train_sampler())
    for step in range(10):
        by_hand.record_batches([{data_order.ROW: torch.tensor(subject.rows_of_step(step)[::-1])}])
    by_hand.check_pending(10)
    assert subject.integrity.data_order.rows_hash == by_hand.rows_hash != ""


class FaultySampler(dataset.EffectiveBatchSampler):
    """A sampler with a fault in its second epoch."""

    def __init__(self, real, fault):
        super().__init__(real.rows, real.effective_batch_size, real.seed, real.epoch)
        self.fault = fault

    def __iter__(self):
        rows = self.order(self.epoch()).tolist()
        if self.epoch() == 1:
            self.fault(rows)
        return iter(rows)


def repeat_row(rows):
    rows[5] = rows[4]


def swap_rows(rows):
    rows[5], rows[9] = rows[9], rows[5]


def end_early(rows):
    del rows[12:]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (repeat_row, "step 7: fed other rows than its epoch's order has"),
        (swap_rows, "step 7: fed other rows than its epoch's order has"),
        (end_early, "step 8: rows of the epoch were skipped"),
    ],
)
def test_data_order_check_stops_the_run_before_a_save(begin, fault, message):
    subject = begin("run", "trainer.save_steps=6")
    real = subject._get_train_sampler()
    subject._get_train_sampler = lambda _rows=None: FaultySampler(real, fault)
    with pytest.raises(TrainingError, match=message):
        subject.train()
    assert RunDir(subject.checkpoint_writer.folder.path).numbered("checkpoint") == [6]


def integrity_lines(trainer):
    return [json.loads(line) for line in trainer.folder.integrity_log.read_text().splitlines()]


def restore_rows_hash(trainer, point):
    record = checkpoint_format.read_commit_marker(point)
    trainer.integrity.data_order.rows_hash = record["integrity"]["rows_hash"]


@pytest.mark.parametrize(
    ("step", "weights"),
    [(3, ()), (5, ()), (3, [(13, 2.5), (10, 0.5)])],
    ids=["in the middle of an epoch", "at its end", "with source weights"],
)
def test_resumed_run_has_the_same_fingerprints(begin, step, weights):
    """The second attempt repeats the same steps and logs the same fingerprints."""
    settings = (f"trainer.save_steps={step}", "trainer.max_steps=8")
    first = begin("run", *settings, weights=weights)
    first.train()
    lines = integrity_lines(first)
    assert {(step, True), (step + 1, False), (step + 2, False)} <= {(line["step"], line["saved"]) for line in lines}
    again = begin("run", *settings, weights=weights)
    point = again.checkpoint_writer.folder.checkpoint(step)
    restore_rows_hash(again, point)
    again.train(resume_from_checkpoint=str(point))
    assert (again.integrity.data_order.steps, again.integrity.data_order.rows_hash) == (
        8,
        first.integrity.data_order.rows_hash,
    )
    assert integrity_lines(again) == [
        line if line["step"] <= step else {**line, "resumed_from": step} for line in lines
    ]


@pytest.mark.parametrize("step", [2, 5], ids=["in the middle of an epoch", "at its end"])
def test_stop_during_an_evaluation_saves_once(begin, monkeypatch, step):
    """At the end of an epoch the Trainer evaluates and saves in two places."""
    subject = begin("run", "trainer.eval_steps=1", "trainer.max_steps=8")
    save, saved = subject.checkpoint_writer.save_checkpoint, []
    monkeypatch.setattr(
        subject.checkpoint_writer, "save_checkpoint", lambda at, *more: saved.append(at) or save(at, *more)
    )
    evaluating = lambda: subject.state.global_step == step and not subject.model.training  # noqa: E731
    monkeypatch.setattr(stop_signal, "requested", evaluating)
    subject.train()
    assert saved == [step] and subject.stopping.stopped
    assert RunDir(subject.checkpoint_writer.folder.path).latest_complete() == step


def test_data_order_check_finds_a_resume_that_skips_no_rows(begin, monkeypatch):
    """As if accelerate's loader had lost the position in the epoch."""
    first = begin("run", "trainer.save_steps=3", "trainer.max_steps=4")
    first.train()
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", lambda loader, _batches: loader)
    again = begin("run", "trainer.max_steps=8")
    point = again.checkpoint_writer.folder.checkpoint(3)
    restore_rows_hash(again, point)
    with pytest.raises(TrainingError, match="step 4: fed other rows"):
        again.train(resume_from_checkpoint=str(point))


@pytest.mark.parametrize(
    ("held", "ranks"),
    [
        ("aab", [2]),
        ("baaa", [0]),
        ("ab", [0, 1]),
        ("aabb", [0, 1, 2, 3]),
        ("aabcda", [0, 1, 2, 3, 4, 5]),
        ("abaaca", [1, 4]),
    ],
)
def test_find_minority(held, ranks):
    assert replica_check.find_minority(list(held)) == ranks
