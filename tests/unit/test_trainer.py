"""What reaches the model: collated labels, isolation of packed examples, whole batches, a validation loss over tokens."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.workplace import REPOSITORY
from transformers import AutoModelForCausalLM

from sft_recipes.config import loader
from sft_recipes.config.schema import TABLE_KEYS
from sft_recipes.data.formats import Conversation
from sft_recipes.data.packing import to_dataset
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer, Example
from sft_recipes.data.tokenize_rows import to_arrays
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import attention
from sft_recipes.training import trainer as trainers
from sft_recipes.training.callbacks.graceful_stop import GracefulStopCallback

CONVERSATIONS = [
    [{"role": "user", "content": f"Add {n} and {n}." + " please" * (n % 4)}, {"role": "assistant", "content": f"It is {2 * n}."}]
    for n in range(23)
]  # fmt: skip


@pytest.fixture(scope="module")
def examples(tokenizer):
    import datetime

    conversations = [Conversation(messages, f"here:{n}") for n, messages in enumerate(CONVERSATIONS)]
    return ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21)).tokenize(conversations)


def dataset(examples, max_length, packing):
    said = [Conversation([{"role": "user", "content": "x"}], one.location) for one in examples]
    return to_dataset(to_arrays(said, list(examples), max_length), max_length, packing)


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def token_losses(model, **inputs):
    """Loss of each predicted token, in the order of the row."""
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )
    return losses[labels[:, 1:] != IGNORED]


def make_trainer(tmp_path, model_folder, tokenizer, rows, validation, *overrides):
    settings = (
        "batch.min_optimizer_steps=1", "batch.effective_batch_size=4", "batch.max_per_device_batch_size=2",
        "trainer.max_length=128", "trainer.num_train_epochs=2", *overrides,
    )  # fmt: skip
    plan = plans.resolve(loader.load("tiny", settings), Topology(gpus=0, processes=1))
    plan = plans.with_prepared_data(
        plan, plans.Prepared("f", "x", "m", {}, len(rows), len(rows), 100, 100, len(validation))
    )
    validation, passes = trainers.validation_in_passes(
        validation, {"rows": len(validation)}, plan.per_device_train_batch_size
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    way = attention.settle(plan, model)
    return trainers.RecipeTrainer(
        plan,
        passes,
        {},
        tmp_path,
        model=model,
        args=trainers.sft_config(plan, RunDir(tmp_path)),
        train_dataset=rows.remove_columns("source"),
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=trainers.collator(plan, tokenizer.pad_token_id, way.name),
    )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "not packed"])
def test_the_labels_of_a_real_batch_are_the_answers_and_their_ends_alone(
    tmp_path, model_folder, tokenizer, examples, packing
):
    rows = dataset(examples, 128, packing)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, f"trainer.packing={str(packing).lower()}")
    supervised, batches = [], 0
    for batch in subject.get_train_dataloader():
        batches += 1
        assert batch["input_ids"].shape == batch["labels"].shape
        assert torch.equal(batch["labels"][batch["labels"] != IGNORED], batch["input_ids"][batch["labels"] != IGNORED])
        supervised += [label for row in batch["labels"].tolist() for label in row if label != IGNORED]
    assert batches == len(subject._get_train_sampler()) // 2 > 0
    said = tokenizer.decode(supervised).split("<|im_end|>\n")
    known = {messages[1]["content"] for messages in CONVERSATIONS}
    assert said.pop() == ""
    assert len(said) == len(set(said)) and set(said) <= known
    assert packing or len(said) == len(subject._get_train_sampler())


def test_packed_examples_do_not_see_each_other(model, tokenizer, examples):
    """Per-token losses in packed, padded rows equal those of each example alone."""
    rows = dataset(examples, 100, packing=True)
    assert max(len(lengths) for lengths in rows["seq_lengths"]) > 2
    assert len({len(ids) for ids in rows["input_ids"]}) > 1, "no row needs padding, so padding is not tried"
    packed = trainers.PackedRowsCollator(tokenizer.pad_token_id)(list(rows))
    assert "attention_mask" not in packed
    together = token_losses(model, **packed)
    alone = {}
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        alone[tuple(example.input_ids)] = token_losses(model, input_ids=ids, labels=labels)
    order = [tuple(ids) for row in rows for ids in _cut(row["input_ids"], row["seq_lengths"])]
    assert sorted(order) == sorted(alone)
    torch.testing.assert_close(together, torch.cat([alone[ids] for ids in order]), rtol=1e-5, atol=1e-5)


def test_an_all_ones_mask_would_let_them_see_each_other(model, tokenizer, examples):
    """The reason why no mask is passed; fails when transformers isolates packed rows all the same."""
    rows = dataset(examples, 100, packing=True)
    packed = trainers.PackedRowsCollator(tokenizer.pad_token_id)(list(rows))
    masked = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    assert (token_losses(model, **packed) - token_losses(model, **masked)).abs().max() > 1e-3


def _cut(ids, lengths):
    first = 0
    for length in lengths:
        yield ids[first : first + length]
        first += length


def test_packing_loses_no_example_and_no_token(examples):
    rows = dataset(examples, 100, packing=True)
    packed = sorted(tuple(ids) for row in rows for ids in _cut(row["input_ids"], row["seq_lengths"]))
    assert packed == sorted(tuple(example.input_ids) for example in examples)
    assert max(map(len, rows["input_ids"])) <= 100


@pytest.mark.parametrize("rows", [8, 11, 37])
def test_an_epoch_uses_each_row_once_in_whole_batches_and_drops_another_tail_each_time(rows):
    sampler, *epochs = [
        trainers.EffectiveBatchSampler(rows, 4, 42, lambda epoch=epoch: epoch) for epoch in (0, *range(6))
    ]
    epochs = [list(epoch) for epoch in epochs]
    assert all(len(order) == len(set(order)) == len(sampler) == rows // 4 * 4 for order in epochs)
    assert len({tuple(order) for order in epochs}) == 6
    left_out = {frozenset(set(range(rows)) - set(order)) for order in epochs}
    assert len(left_out) > 1 or rows % 4 == 0
    assert list(sampler) == epochs[0]
    assert list(trainers.EffectiveBatchSampler(rows, 4, 43, lambda: 0)) != epochs[0]


def test_a_digest_of_tokens_tells_rows_apart_and_not_how_they_are_dealt_out(examples):
    def digest(rows, micro_batch, padded_to):
        total = 0
        for first in range(0, len(rows), micro_batch):
            part = rows[first : first + micro_batch]
            longest = max(padded_to, *(len(one.labels) for one in part))
            labels = torch.tensor([one.labels + [IGNORED] * (longest - len(one.labels)) for one in part])
            total += trainers.tokens_digest({"labels": labels}).item()
        return total % 2**48

    assert digest(examples[:8], 1, 0) == digest(examples[:8], 4, 50) == digest(examples[7::-1], 8, 0)
    assert len({digest([one], 1, 0) for one in examples[:8]}) == 8
    assert digest(examples[:8], 1, 0) != digest([*examples[:7], examples[8]], 1, 0)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_the_validation_loss_is_a_mean_over_tokens_whatever_the_batch(
    tmp_path, model_folder, model, tokenizer, examples, micro_batch
):
    """Answers of very different lengths: a mean of batch means would move with the batch."""
    long = [Example(one.input_ids * 4, ((1, 4 * len(one.input_ids)),)) for one in examples[:3]]
    rows = dataset([*examples[3:10], *long], 128, packing=False)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false")
    subject.args.per_device_eval_batch_size = micro_batch
    subject.eval_dataset, passes = trainers.validation_in_passes(rows, {"short": 7, "long": 3}, micro_batch)
    subject.evaluate_sources(passes)
    losses = [
        token_losses(model, input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])) for row in rows
    ]  # fmt: skip
    expected = {"eval_loss": losses, "eval_short_loss": losses[:7], "eval_long_loss": losses[7:]}
    found = subject.evaluate()
    for name, part in expected.items():
        assert found[name] == pytest.approx(torch.cat(part).double().mean().item(), rel=1e-5)


def test_rows_that_fill_a_pass_count_nothing():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "labels": [[IGNORED, 2], [IGNORED, 4, 5]]})
    filled = trainers.whole_passes(rows, 4)
    assert len(filled) == 4
    assert filled[:2] == rows[:2]
    assert {label for row in filled.select([2, 3])["labels"] for label in row} == {IGNORED}
    assert trainers.whole_passes(rows, 2) is rows


def test_the_resolved_configuration_says_what_the_plan_says(tmp_path, model_folder, tokenizer, examples):
    rows = dataset(examples, 128, packing=False)
    subject = make_trainer(
        tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false", "trainer.gradient_checkpointing=true"
    )
    arguments = subject.args
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 2)
    assert arguments.optim == "adamw_torch_fused"
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.max_grad_norm == 1.0
    assert arguments.gradient_checkpointing and arguments.gradient_checkpointing_kwargs["use_reentrant"] is False
    assert arguments.average_tokens_across_devices and not arguments.logging_nan_inf_filter
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.float32}


def test_every_field_that_a_recipe_may_set_reaches_the_configuration(tmp_path):
    import dataclasses

    from trl import SFTConfig

    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig) if field.init}
    allowed = {
        name: defaults[name]
        for name in loader._trainer_keys()
        if name in defaults and name not in TABLE_KEYS and isinstance(defaults[name], bool | int | float | str)
    }
    assert len(allowed) >= 40
    plan = plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1))
    plan.sections.trainer.update({**allowed, "gradient_checkpointing": True})
    arguments = trainers.sft_config(plan, RunDir(tmp_path))
    # Some the plan settles; the Trainer itself changes others (no pinning without a GPU, enumerations for names).
    reached = {name for name in allowed if getattr(arguments, name) == allowed[name]}
    settled = {"max_length", "packing", "gradient_checkpointing", "dataloader_pin_memory", "debug"}
    assert allowed.keys() - reached <= settled


def test_checkpointing_is_off_where_the_recipe_says_off(tmp_path, model_folder, tokenizer, examples):
    rows = dataset(examples, 128, packing=False)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false")
    assert loader.load("tiny").trainer["gradient_checkpointing"] is False
    assert not subject.args.gradient_checkpointing and not subject.model.is_gradient_checkpointing


def test_the_engines_files_leave_to_the_trainer_what_the_trainer_owns():
    import json

    files = sorted((REPOSITORY / "deepspeed_configs").glob("*.json"))
    assert len(files) == 4
    for file in files:
        config = json.loads(file.read_text())
        assert f"zero{config['zero_optimization']['stage']}" == file.stem.removesuffix("_offload")
        assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
        owned = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        assert all(config[key] == "auto" for key in owned)


@pytest.mark.parametrize("mode", ["assistant only", "prompt and completion"])
def test_labels_equal_those_of_stock_trl_token_for_token(tmp_path, model_folder, tokenizer, examples, mode):
    """On the same rows: conversations under `assistant_only_loss`, and their two halves under completion loss."""
    from trl import SFTConfig, SFTTrainer

    from sft_recipes.data.toy.toy_model import CHAT_TEMPLATE

    own = tokenizer.chat_template
    said = "{{ message['content'] + '<|im_end|>\n' }}"
    tagged = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}" + said + "{% endgeneration %}{% else %}" + said + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assistant = mode == "assistant only"
    rows = (
        {"messages": CONVERSATIONS}
        if assistant
        else {"prompt": [m[:1] for m in CONVERSATIONS], "completion": [m[1:] for m in CONVERSATIONS]}
    )
    try:
        tokenizer.chat_template = tagged if assistant else CHAT_TEMPLATE
        stock = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
            SFTConfig(str(tmp_path), assistant_only_loss=assistant, use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        ).train_dataset
    finally:
        tokenizer.chat_template = own
    masked = [(row["input_ids"], row["labels"]) for row in stock]
    assert masked == [(one.input_ids, one.labels) for one in examples]


def test_a_model_that_lets_packed_examples_see_each_other_is_refused(tmp_path, model_folder, tokenizer, examples):
    """Position ids keep examples apart in attention; a recurrent state does not read them."""
    from transformers import MambaConfig, MambaForCausalLM

    from sft_recipes.runtime.errors import UserError
    from sft_recipes.training import packing_isolation

    rows = dataset(examples, 128, packing=True)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows)
    subject.model_wrapped = subject.model
    assert packing_isolation.check(subject.plan, subject) < 1e-6
    leaky = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4))
    subject.model = subject.model_wrapped = leaky
    with pytest.raises(
        UserError, match=r"packed examples see each other in .*MambaForCausalLM .*trainer.packing=false"
    ):
        packing_isolation.check(subject.plan, subject)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_stop_training_before_they_change_a_weight(
    tmp_path, model_folder, tokenizer, examples, broken
):
    """The loss is a number; one element of one gradient is not, as an overflow in the backward pass leaves it."""
    from sft_recipes.training.nan_guard import DivergedError

    rows = dataset(examples, 128, packing=False)
    rows.save_to_disk(tmp_path / "train")
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false")
    weight = subject.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), broken))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    with pytest.raises(DivergedError, match="the gradients are no numbers") as raised:
        subject.train()
    what = raised.value.what
    assert what.step == 1 and not what.applied and torch.isfinite(torch.tensor(what.loss))
    assert len(what.rows) == 4 and set(what.rows) <= set(rows["source"]), "of the step's four rows"
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())


def scored_and_supervised(subject, monkeypatch):
    """How many positions the logits were computed of in one forward pass of a trainer, and how many are supervised."""
    import trl.trainer.utils

    real, scored = trl.trainer.utils._ChunkedLogProbFunction, []

    class Counting:
        @staticmethod
        def apply(hidden, *rest):
            scored.append(len(hidden))
            return real.apply(hidden, *rest)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counting)
    batch = next(iter(subject.get_train_dataloader()))
    batch.pop("row")
    supervised = (batch["labels"][:, 1:] != IGNORED).sum()
    subject.model.train()
    subject.compute_loss(subject.model, batch, num_items_in_batch=supervised)
    return scored, int(supervised)


def test_only_supervised_positions_are_scored(tmp_path, model_folder, tokenizer, examples, monkeypatch):
    rows = dataset(examples, 128, packing=True)
    scored, supervised = scored_and_supervised(make_trainer(tmp_path, model_folder, tokenizer, rows, rows), monkeypatch)
    assert scored == [supervised]


def test_trl_itself_would_score_all_positions_on_a_cpu(tmp_path, model_folder, tokenizer, examples, monkeypatch):
    """The reason why it is told otherwise; fails when it no longer does, and `_use_triton` can be left alone."""
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.kernels.chunked_logprob._use_triton)
    rows = dataset(examples, 128, packing=True)
    scored, supervised = scored_and_supervised(make_trainer(tmp_path, model_folder, tokenizer, rows, rows), monkeypatch)
    assert scored[0] > 2 * supervised


def test_a_tile_of_logits_is_no_wider_than_the_vocabulary(tmp_path, model_folder, tokenizer, examples):
    import trl.trainer.utils

    rows = dataset(examples, 128, packing=True)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows)
    assert subject.model.config.vocab_size == trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE < 32_768


def test_trl_itself_would_lay_out_a_tile_as_wide_as_it_is_told(monkeypatch):
    """The reason why it is told otherwise; fails when it no longer does, and its width can be left alone."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from machine import peak_allocated
    from torch.profiler import ProfilerActivity, profile
    from trl.kernels import ChunkedLogProbFunction

    states, weight, answers = torch.zeros(100, 8), torch.zeros(64, 8), torch.zeros(100, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as tracker:
        ChunkedLogProbFunction.apply(states, weight, None, answers, 1.0, 32_768, None, 1.0, ())
    assert peak_allocated(tracker) > 100 * 32_768 * 4


def test_loss_accuracy_and_entropy_are_those_of_trl(tmp_path, model_folder, tokenizer, examples):
    rows = dataset(examples, 128, packing=True)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows)
    batch = next(iter(subject.get_train_dataloader()))
    batch.pop("row")
    supervised = (batch["labels"][:, 1:] != IGNORED).sum()
    subject.model.train()
    ours = subject.compute_loss(subject.model, dict(batch), num_items_in_batch=supervised)
    found = subject._answers()
    subject._loss_is_plain = False
    theirs = subject.compute_loss(subject.model, dict(batch), num_items_in_batch=supervised)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6) and ours.item() > 1
    for name, mean in found.items():
        (wanted,) = subject._metrics["train"][name]
        assert mean == pytest.approx(wanted, rel=1e-6), name
    assert found["entropy"] > 1


def test_rank_without_cuda_names_the_cause(tmp_path, monkeypatch):
    """Not as transformers does ("You need to assign use_cpu"): whether this PyTorch is a CPU build or a CUDA build."""
    from sft_recipes.training import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = plans.resolve(loader.load("1b"), Topology(gpus=1, processes=1, gpu_type="h100-80g"))
    with pytest.raises(
        UserError, match="^GPUS: 1 requested, but (PyTorch|found) .*(TORCH=cuda|nvidia-smi|Install|Update)"
    ):
        main.configure(plan, RunDir(tmp_path))


@pytest.mark.parametrize(("began", "now", "none"), [(0, 0, True), (0, 1, False), (7, 7, True), (7, 8, False)])
def test_a_resumed_run_counts_its_steps_from_where_it_began(began, now, none):
    stopping = GracefulStopCallback()
    stopping.on_train_begin(None, SimpleNamespace(global_step=began), None)
    ours = SimpleNamespace(state=SimpleNamespace(global_step=now), stopping=stopping)
    assert trainers.RecipeTrainer._took_no_step(ours) is none
