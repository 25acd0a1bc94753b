"""What is proved while a run trains: digests that any changed bit changes, and a ledger of the rows that were fed."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from helpers.bit_flip import run_with_a_flip
from transformers import AutoModelForCausalLM

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import TrainingError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import attention, stop_signal
from sft_recipes.training import trainer as trainers
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.integrity import data_order, fingerprint, replica_check

ROWS = 23  # five steps of four an epoch; three are left out


@pytest.fixture
def begin(tmp_path, model_folder, tokenizer):
    """Makes a trainer over rows of ragged lengths, for two epochs, in a run's folder."""

    def make(name="run", *overrides, packing=False):
        settings = (
            "batch.min_optimizer_steps=1", "batch.effective_batch_size=4", "batch.max_per_device_batch_size=2",
            "trainer.max_length=64", "trainer.num_train_epochs=2", "trainer.logging_steps=3", "trainer.save_steps=100",
            f"trainer.packing={str(packing).lower()}", *overrides,
        )  # fmt: skip
        plan = plans.make(loader.load("tiny", settings), Topology(gpus=0, processes=1))
        plan = plans.settle(plan, plans.Prepared("f", "x", "m", {}, ROWS, ROWS, 100, 100, 2))
        folder = RunDir(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        ids = [[5 + n % 50] * (4 + n % 7) for n in range(ROWS)]
        columns = {"input_ids": ids, "labels": ids}
        if packing:
            columns["seq_lengths"] = [[2, len(row) - 2] for row in ids]
        rows = Dataset.from_dict(columns)
        validation, passes = trainers.validation_in_passes(
            rows.select([0, 1]), {"rows": 2}, plan.per_device_train_batch_size
        )
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        way = attention.settle(plan, model)
        return trainers.RecipeTrainer(
            plan,
            passes,
            {},
            folder.path,
            model=model,
            args=trainers.sft_config(plan, folder),
            train_dataset=rows,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=trainers.collator(plan, tokenizer.pad_token_id, way.name),
        )

    return make


def flip(tensor, element, bit):
    """One bit of one element, in place."""
    of_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    mask = 1 << bit if bit < 8 * tensor.element_size() - 1 or of_size is torch.uint8 else -(1 << bit)
    tensor.data.reshape(-1)[element : element + 1].view(of_size).bitwise_xor_(mask)


def digest(tensor, name="x"):
    return fingerprint.of_each([(name, tensor)])[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_every_bit_of_a_tensor_counts(dtype):
    tensor = torch.arange(1, 12).to(dtype)  # in bytes no multiple of eight, but for int64
    seen = {digest(tensor)}
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            flip(tensor, element, bit)
            seen.add(digest(tensor))
            flip(tensor, element, bit)
    assert len(seen) == 1 + 8 * tensor.element_size() * tensor.numel()


def test_bits_count_in_every_piece_of_a_large_tensor_and_two_flipped_signs_do_not_cancel():
    tensor = torch.zeros(2 * 2 * fingerprint._WORDS + 3)
    whole = digest(tensor)
    ends = [0, 2 * fingerprint._WORDS - 1, 2 * fingerprint._WORDS, tensor.numel() - 1]
    seen = {whole}
    for one, other in itertools.combinations(ends, 2):
        flip(tensor, one, 31)
        seen.add(digest(tensor))
        flip(tensor, other, 31)
        seen.add(digest(tensor))
        tensor.zero_()
    assert len(seen) == 1 + 3 + 6, "each flip, and each pair of them, has a digest of its own"
    assert digest(tensor) == whole


def test_order_name_shape_and_kind_count_and_numbers_that_compare_equal_are_told_apart():
    tensor = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 6.0])
    others = [
        digest(tensor[[1, 0, 2, 3, 4, 5]]), digest(tensor[[2, 1, 0, 3, 4, 5]]), digest(tensor, "y"),
        digest(tensor.reshape(2, 3)), digest(tensor.reshape(3, 2).t()), digest(tensor.view(torch.int32)),
        digest(torch.tensor([1.0, 2.0, 3.0, 4.0, -0.0, 6.0])), digest(torch.zeros(0)), digest(torch.zeros(())),
        digest(torch.zeros(1)), digest(torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)),
        digest(torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)),
    ]  # fmt: skip
    assert len({digest(tensor), *others}) == 13
    assert digest(tensor.reshape(3, 2).t()) == digest(tensor.reshape(3, 2).t().contiguous()), "memory's order does not"


def changes(trainer):
    """What can be changed of each kind of state, a bit or a count at a time."""
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


def test_a_change_in_any_kind_of_state_changes_its_digest_and_no_other(begin):
    subject = begin()
    subject.train()
    before = fingerprint.of_rank(subject)
    assert before == fingerprint.of_rank(subject), "looking changes nothing"
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
def test_the_ledger_is_the_same_however_rows_are_dealt_out(begin, more, packing):
    subject = begin("run", *more, packing=packing)
    subject.train()
    assert (subject.proof.ledger.steps, subject.state.global_step) == (10, 10)
    by_hand = data_order.DataOrderCheck(subject._get_train_sampler().order, 4, 5)
    for step in range(10):
        by_hand.saw([{data_order.ROW: torch.tensor(subject.order_of_step(step)[::-1])}])
    by_hand.settle()
    assert subject.proof.ledger.chain == by_hand.chain != ""


class Misdealt(trainers.EffectiveBatchSampler):
    """A sampler with a fault in its second epoch."""

    def __init__(self, real, fault):
        super().__init__(real.rows, real.effective_batch_size, real.seed, real.epoch)
        self.fault = fault

    def __iter__(self):
        rows = self.order(self.epoch()).tolist()
        if self.epoch() == 1:
            self.fault(rows)
        return iter(rows)


def twice(rows):
    rows[5] = rows[4]


def of_another_step(rows):
    rows[5], rows[9] = rows[9], rows[5]


def ends_early(rows):
    del rows[12:]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (twice, r"epoch 2, step 7: row (\d+) was fed 2 times \(ranks 0, 0\); left out: \d+;"),
        (
            of_another_step,
            r"epoch 2, step 7: rows that are another step's were fed: \d+ \(step 3 of the epoch\); left out",
        ),
        (ends_early, r"epoch 2 ended behind 3 of its 5 steps, its other rows were left out"),
    ],
)
def test_a_row_that_is_used_twice_or_left_out_stops_the_run_and_nothing_is_saved_from_it(begin, fault, said):
    subject = begin("run", "trainer.save_steps=6")
    real = subject._get_train_sampler()
    subject._get_train_sampler = lambda _rows=None: Misdealt(real, fault)
    with pytest.raises(TrainingError, match=said):
        subject.train()
    assert RunDir(subject.saving.folder.path).numbered("checkpoint") == [6]


def test_an_order_that_deals_a_row_out_twice_is_found():
    subject = data_order.DataOrderCheck(lambda _epoch: torch.tensor([0, 1, 2, 1]), 2, 2)
    subject.saw([{data_order.ROW: torch.tensor([0, 1])}])
    with pytest.raises(TrainingError, match="epoch 1: its order deals row 1 out 2 times"):
        subject.settle()


def proved(trainer):
    return [json.loads(line) for line in trainer.proof.folder.integrity_log.read_text().splitlines()]


@pytest.mark.parametrize("step", [3, 5], ids=["in the middle of an epoch", "at its end"])
def test_the_ledger_and_the_proof_go_on_across_a_resume(begin, step):
    """The second start takes the same steps again, proves them again, and finds the same bits."""
    settings = (f"trainer.save_steps={step}", "trainer.max_steps=8")
    first = begin("run", *settings)
    first.train()
    lines = proved(first)
    assert {(step, True), (step + 1, False), (step + 2, False)} <= {(line["step"], line["saved"]) for line in lines}
    again = begin("run", *settings)
    point = again.saving.folder.checkpoint(step)
    again.proof.restore_state(checkpoint_format.read(point)["proof"])
    again.train(resume_from_checkpoint=str(point))
    assert (again.proof.ledger.steps, again.proof.ledger.chain) == (8, first.proof.ledger.chain)
    assert proved(again) == [line if line["step"] <= step else {**line, "went_on_from": step} for line in lines]


@pytest.mark.parametrize("step", [2, 5], ids=["in the middle of an epoch", "at its end"])
def test_a_stop_that_falls_on_an_evaluation_saves_its_step_once(begin, monkeypatch, step):
    """The Trainer asks twice at an epoch's end whether there is something to evaluate and to save."""
    subject = begin("run", "trainer.eval_steps=1", "trainer.max_steps=8")
    save, saved = subject.saving.checkpoint, []
    monkeypatch.setattr(subject.saving, "checkpoint", lambda at, *more: saved.append(at) or save(at, *more))
    evaluating = lambda: subject.state.global_step == step and not subject.model.training  # noqa: E731
    monkeypatch.setattr(stop_signal, "asked", evaluating)
    subject.train()
    assert saved == [step] and subject.stopping.stopped
    assert RunDir(subject.saving.folder.path).latest_complete() == step


def test_a_resume_that_skips_no_rows_is_found(begin, monkeypatch):
    """As where accelerate's loader forgot how far the epoch was."""
    first = begin("run", "trainer.save_steps=3", "trainer.max_steps=4")
    first.train()
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", lambda loader, _batches: loader)
    again = begin("run", "trainer.max_steps=8")
    point = again.saving.folder.checkpoint(3)
    again.proof.restore_state(checkpoint_format.read(point)["proof"])
    with pytest.raises(TrainingError, match=r"epoch 1, step 4: rows that are another step's were fed: \d+ \(step 1 of"):
        again.train(resume_from_checkpoint=str(point))


def test_a_proof_of_another_step_is_refused(begin):
    subject = begin()
    subject.proof.restore_state({"step": 7, "rows": "x", "ranks": []})
    with pytest.raises(TrainingError, match="a checkpoint of step 0 holds the proof of step 7"):
        subject.train()


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
def test_the_ranks_that_differ_from_more_than_half_are_named_and_all_where_there_is_no_half(held, ranks):
    assert replica_check.minority(list(held)) == ranks


def test_a_bit_that_flips_on_one_rank_of_three_is_found_before_it_is_saved_and_the_rank_is_named(workplace, few_rows):
    line, saved = run_with_a_flip(workplace, few_rows, 3, "trainer.save_steps=2", behind_step=3)
    assert "step 4: the weights of rank 1 on " in line and "are not those of the other 2 ranks" in line
    assert saved == [2]
