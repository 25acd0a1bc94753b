"""Collated labels, isolation of packed examples, effective batches, validation loss per token, SFTConfig."""

import pyarrow
import pytest
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from helpers.examples import labels_of, tokenize_all
from helpers.workplace import REPOSITORY
from transformers import AutoModelForCausalLM

from sft_recipes.config import loader, schema
from sft_recipes.config.schema import TABLE_KEYS
from sft_recipes.data.formats import Conversation
from sft_recipes.data.packing import TrainerRows
from sft_recipes.data.rows import RowStore
from sft_recipes.data.sources import RawRow
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer, Example
from sft_recipes.data.tokenize_rows import to_chunk
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import attention, dataset, main, sft_config
from sft_recipes.training import trainer as trainers

CONVERSATIONS = [
    [{"role": "user", "content": f"Add {n} and {n}." + " please" * (n % 4)}, {"role": "assistant", "content": f"It is {2 * n}."}]
    for n in range(23)
]  # fmt: skip


@pytest.fixture(scope="module")
def examples(tokenizer):
    import datetime

    conversations = [Conversation(messages, f"here:{n}") for n, messages in enumerate(CONVERSATIONS)]
    return tokenize_all(ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21)), conversations)


def make_rows(examples, max_length, packing):
    conversations = [Conversation([{"role": "user", "content": "x"}], "")] * len(examples)
    rows, store = [RawRow({}, f"here:{n}") for n in range(len(examples))], RowStore()
    store.append(to_chunk(rows, conversations, examples, max_length))
    arranged = TrainerRows.arrange(store.read(), max_length, packing)
    return Dataset(InMemoryTable(pyarrow.concat_tables(arranged.tables())))


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
    validation, passes = dataset.split_into_passes(
        validation, {"rows": len(validation)}, plan.per_device_train_batch_size
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    choice = attention.select(plan, model)
    return trainers.RecipeTrainer(
        plan,
        passes,
        {"architecture": {}, "folder": str(tmp_path)},
        model=model,
        args=sft_config.make_sft_config(plan, RunDir(tmp_path)),
        train_dataset=rows.remove_columns("source"),
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=dataset.make_collator(plan, tokenizer.pad_token_id, choice.name),
    )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "not packed"])
def test_batch_labels_are_assistant_turns_only(tmp_path, model_folder, tokenizer, examples, packing):
    rows = make_rows(examples, 128, packing)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, f"trainer.packing={str(packing).lower()}")
    supervised, batches = [], 0
    for batch in subject.get_train_dataloader():
        batches += 1
        assert batch["input_ids"].shape == batch["labels"].shape
        assert torch.equal(batch["labels"][batch["labels"] != IGNORED], batch["input_ids"][batch["labels"] != IGNORED])
        supervised += [label for row in batch["labels"].tolist() for label in row if label != IGNORED]
    assert batches == len(subject._get_train_sampler()) // 2 > 0
    answers = tokenizer.decode(supervised).split("<|im_end|>\n")
    known = {messages[1]["content"] for messages in CONVERSATIONS}
    assert answers.pop() == ""
    assert len(answers) == len(set(answers)) and set(answers) <= known
    assert packing or len(answers) == len(subject._get_train_sampler())


def test_packed_examples_are_isolated(model, tokenizer, examples):
    """Per-token losses in packed, padded rows equal those of each example alone."""
    rows = make_rows(examples, 100, packing=True)
    assert max(len(lengths) for lengths in rows["seq_lengths"]) > 2
    assert len({len(ids) for ids in rows["input_ids"]}) > 1, "no row is padded"
    packed = dataset.RowsCollator(tokenizer.pad_token_id, return_position_ids=True)(list(rows))
    assert "attention_mask" not in packed
    together = token_losses(model, **packed)
    alone = {}
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([labels_of(example)])
        alone[tuple(example.input_ids)] = token_losses(model, input_ids=ids, labels=labels)
    order = [tuple(ids) for row in rows for ids in _cut(row["input_ids"], row["seq_lengths"])]
    assert sorted(order) == sorted(alone)
    torch.testing.assert_close(together, torch.cat([alone[ids] for ids in order]), rtol=1e-5, atol=1e-5)


def test_all_ones_mask_breaks_isolation(model, tokenizer, examples):
    """The reason to pass no mask; fails once transformers isolates packed rows with one."""
    rows = make_rows(examples, 100, packing=True)
    packed = dataset.RowsCollator(tokenizer.pad_token_id, return_position_ids=True)(list(rows))
    masked = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    assert (token_losses(model, **packed) - token_losses(model, **masked)).abs().max() > 1e-3


def _cut(ids, lengths):
    first = 0
    for length in lengths:
        yield ids[first : first + length]
        first += length


def test_packing_keeps_every_token(examples):
    rows = make_rows(examples, 100, packing=True)
    packed = sorted(tuple(ids) for row in rows for ids in _cut(row["input_ids"], row["seq_lengths"]))
    assert packed == sorted(tuple(example.input_ids) for example in examples)
    assert max(map(len, rows["input_ids"])) <= 100


@pytest.mark.parametrize("rows", [8, 11, 37])
def test_sampler_uses_each_row_once_and_drops_a_new_tail_per_epoch(rows):
    sampler, *epochs = [
        dataset.EffectiveBatchSampler(rows, 4, 42, lambda epoch=epoch: epoch) for epoch in (0, *range(6))
    ]
    epochs = [list(epoch) for epoch in epochs]
    assert all(len(order) == len(set(order)) == len(sampler) == rows // 4 * 4 for order in epochs)
    assert len({tuple(order) for order in epochs}) == 6
    dropped = {frozenset(set(range(rows)) - set(order)) for order in epochs}
    assert len(dropped) > 1 or rows % 4 == 0
    assert list(sampler) == epochs[0]
    assert list(dataset.EffectiveBatchSampler(rows, 4, 43, lambda: 0)) != epochs[0]


def test_sampler_uses_rows_as_often_as_their_weights_say():
    weights = [(10, 2.5), (6, 1.0), (20, 0.25)]
    sampler = dataset.EffectiveBatchSampler(36, 4, 42, lambda: 0, weights)
    assert sampler.used == sampler.rows == 25 + 6 + 5 + 0 // 4 * 4
    uses = [torch.bincount(sampler.order(epoch), minlength=36) for epoch in range(4)]
    for count in uses:
        assert sorted(set(count[:10].tolist())) == [2, 3] and count[:10].sum() == 25
        assert set(count[10:16].tolist()) == {1}
        assert count[16:].sum() == 5 and set(count[16:].tolist()) == {0, 1}
    assert sum(uses)[16:].tolist() == [1] * 20, "the fraction is other rows in each epoch"
    assert sum(uses[:2])[:10].tolist() == [5] * 10
    assert not torch.equal(sampler.order(0), sampler.order(1))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_eval_loss_is_mean_over_tokens_for_any_batch(tmp_path, model_folder, model, tokenizer, examples, micro_batch):
    """Completions of very different lengths: a mean of batch means would change with the batch."""
    long = [Example(example.input_ids * 4, ((1, 4 * len(example.input_ids)),)) for example in examples[:3]]
    rows = make_rows([*examples[3:10], *long], 128, packing=False)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false")
    subject.args.per_device_eval_batch_size = micro_batch
    subject.eval_dataset, subject.passes = dataset.split_into_passes(rows, {"short": 7, "long": 3}, micro_batch)
    losses = [
        token_losses(model, input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])) for row in rows
    ]  # fmt: skip
    expected = {"eval_loss": losses, "eval_short_loss": losses[:7], "eval_long_loss": losses[7:]}
    metrics = subject.evaluate()
    for name, part in expected.items():
        assert metrics[name] == pytest.approx(torch.cat(part).double().mean().item(), rel=1e-5)


def test_filler_rows_have_no_supervised_tokens():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "labels": [[IGNORED, 2], [IGNORED, 4, 5]]})
    filled, passes = dataset.split_into_passes(rows, {"one": 2}, 4)
    assert len(filled) == 4 and passes == {"one": 1}
    assert filled[:2] == rows[:2]
    assert {label for row in filled.select([2, 3])["labels"] for label in row} == {IGNORED}


def test_sft_config_equals_plan(tmp_path, model_folder, tokenizer, examples):
    rows = make_rows(examples, 128, packing=False)
    subject = make_trainer(
        tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false", "trainer.gradient_checkpointing=true"
    )
    arguments = subject.args
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 2)
    assert arguments.optim == "adamw_torch_fused"
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.max_grad_norm == 1.0
    assert arguments.gradient_checkpointing is arguments.activation_checkpointing is True
    assert arguments.average_tokens_across_devices and not arguments.logging_nan_inf_filter
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.float32}


def test_sft_config_gets_every_allowed_field(tmp_path):
    import dataclasses

    from trl import SFTConfig

    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig) if field.init}
    allowed = {
        name: defaults[name]
        for name in (key.removeprefix("trainer.") for key in schema.key_types())
        if name in defaults and name not in TABLE_KEYS and isinstance(defaults[name], bool | int | float | str)
    }
    assert len(allowed) >= 39
    plan = plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1))
    plan.sections.trainer.update({**allowed, "gradient_checkpointing": True})
    arguments = sft_config.make_sft_config(plan, RunDir(tmp_path))
    # The plan sets some; the Trainer changes others (no pinning without a GPU, enumerations for names).
    reached = {name for name in allowed if getattr(arguments, name) == allowed[name]}
    changed = {"max_length", "packing", "gradient_checkpointing", "dataloader_pin_memory", "debug"}
    assert allowed.keys() - reached <= changed


def test_gradient_checkpointing_is_off_if_recipe_disables_it(tmp_path, model_folder, tokenizer, examples):
    rows = make_rows(examples, 128, packing=False)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false")
    assert loader.load("tiny").trainer["gradient_checkpointing"] is False
    assert not subject.args.gradient_checkpointing and not subject.model.is_gradient_checkpointing


def test_deepspeed_configs_leave_batch_and_clipping_to_trainer():
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
def test_labels_equal_stock_trl(tmp_path, model_folder, tokenizer, examples, mode):
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
    assert masked == [(example.input_ids, labels_of(example)) for example in examples]


@pytest.mark.parametrize("layers", ["recurrent", "convolution"])
def test_packing_is_rejected_for_a_model_with_state(tmp_path, model_folder, tokenizer, examples, layers):
    """Attention isolates examples by position ids; a recurrent state and a convolution ignore them."""
    from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

    from sft_recipes.runtime.errors import UserError
    from sft_recipes.training import packing_isolation

    rows = make_rows(examples, 128, packing=True)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows)
    subject.model_wrapped = subject.model
    assert packing_isolation.check(subject.plan, subject) < 1e-6
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
    if layers == "recurrent":
        leaky = MambaForCausalLM(MambaConfig(state_size=4, **sizes))
    else:
        heads = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        leaky = Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **heads, **sizes))
        subject.model = subject.model_wrapped = leaky
        with pytest.raises(
            UserError, match=r" mixes packed examples \(.*causal_conv1d.*\). Set trainer.packing=false$"
        ):
            packing_isolation.check(subject.plan, subject)
        subject.data_collator = dataset.RowsCollator(
            tokenizer.pad_token_id, return_position_ids=True
        )  # as with masked attention
    subject.model = subject.model_wrapped = leaky
    with pytest.raises(UserError, match=r"packing leaks across examples in .*ForCausalLM .*Set trainer.packing=false"):
        packing_isolation.check(subject.plan, subject)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_non_finite_gradients_stop_before_the_optimizer_step(tmp_path, model_folder, tokenizer, examples, broken):
    """The loss is finite; one element of one gradient is not, as after an overflow in the backward pass."""
    from sft_recipes.training.nan_guard import DivergedError

    rows = make_rows(examples, 128, packing=False)
    rows.save_to_disk(tmp_path / "train")
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows, "trainer.packing=false")
    weight = subject.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), broken))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    with pytest.raises(DivergedError, match="the gradients are NaN or Inf") as raised:
        subject.train()
    divergence = raised.value
    assert divergence.step == 1 and not divergence.applied and torch.isfinite(torch.tensor(divergence.loss))
    assert len(divergence.rows) == 4 and set(divergence.rows) <= set(rows["source"]), "rows of the step"
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())


def scored_and_supervised(subject, monkeypatch):
    """Return the numbers of scored and of supervised positions of one forward pass."""
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


def test_loss_scores_supervised_positions_only(tmp_path, model_folder, tokenizer, examples, monkeypatch):
    rows = make_rows(examples, 128, packing=True)
    scored, supervised = scored_and_supervised(make_trainer(tmp_path, model_folder, tokenizer, rows, rows), monkeypatch)
    assert scored == [supervised]


def test_trl_scores_all_positions_without_patch(tmp_path, model_folder, tokenizer, examples, monkeypatch):
    """Fails once TRL needs no patch: then remove patches.score_supervised_positions_only."""
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    rows = make_rows(examples, 128, packing=True)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows)
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.kernels.chunked_logprob._use_triton)
    scored, supervised = scored_and_supervised(subject, monkeypatch)
    assert scored[0] > 2 * supervised


def test_logits_chunk_is_limited_to_vocabulary(tmp_path, model_folder, tokenizer, examples):
    import trl.trainer.utils

    rows = make_rows(examples, 128, packing=True)
    subject = make_trainer(tmp_path, model_folder, tokenizer, rows, rows)
    assert subject.model.config.vocab_size == trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE < 32_768


def test_number_of_ranks_must_match_the_plan(tmp_path):
    """accelerate can silently start one process."""
    plan = plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=2))
    with pytest.raises(UserError, match="^ranks: found 1, expected 2 as in the plan$"):
        main.configure(plan, RunDir(tmp_path))


def test_first_save_is_tried_before_step_1(tmp_path, model_folder, tokenizer, examples):
    rows = make_rows(examples, 128, packing=False)
    subject = make_trainer(tmp_path / "run", model_folder, tokenizer, rows, rows)
    subject.check_first_save()
    subject.model.generation_config.temperature = 0.5
    with pytest.raises(UserError, match="the first save would fail: GenerationConfig is invalid"):
        subject.check_first_save()


def test_every_second_layer_is_recomputed_with_the_same_losses(tmp_path, model_folder, tokenizer, examples):
    """The layers that transformers selects, and the losses of a run that recomputes none."""
    losses = {}
    for interval in ("false", "2"):
        rows = make_rows(examples, 128, packing=True)
        overrides = (f"trainer.gradient_checkpointing={interval}", "trainer.logging_steps=1", "trainer.max_steps=3")
        subject = make_trainer(tmp_path / interval, model_folder, tokenizer, rows, rows, *overrides)
        subject.train()
        losses[interval] = [line["loss"] for line in subject.state.log_history if "loss" in line]
        marked = [layer.gradient_checkpointing for layer in subject.model.model.layers]
        assert marked == [interval == "2" and index % 2 == 0 for index in range(len(marked))]
    assert len(losses["2"]) == 3 and losses["2"] == losses["false"]
