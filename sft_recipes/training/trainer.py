"""Builds TRL's SFTTrainer from a plan, and mends what it and the Trainer below it leave to chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.data.chat import IGNORED
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.run_folder import RunFolder
from sft_recipes.training import adapters, checkpoint, engine

CHECKPOINTS_KEPT = 2


def sft_config(plan: Plan, folder: RunFolder, report_to: list[str]) -> SFTConfig:
    """The plan in TRL's terms; every value that the recipe may not set is set here."""
    trainer = dict(plan.sections["trainer"])
    for planned in ("max_length", "packing", "gradient_checkpointing"):
        trainer.pop(planned)
    checkpointing = plan.sections["trainer"]["gradient_checkpointing"]
    return SFTConfig(
        **{
            "optim": "adamw_torch_fused" if plan.uses_gpu else "adamw_torch",
            "logging_first_step": True,
            "ddp_find_unused_parameters": False,
            "disable_tqdm": True,
            "log_level": "error",
            "log_level_replica": "error",
            "dataloader_pin_memory": plan.uses_gpu,
            **trainer,
        },
        output_dir=str(folder.path),
        run_name=folder.name,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        per_device_eval_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=plan.lr_scheduler_type,
        num_train_epochs=plan.num_train_epochs,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        max_length=plan.max_length,
        bf16=plan.precision == "bf16",
        use_cpu=not plan.uses_gpu,
        **_checkpointing(checkpointing, plan),
        accelerator_config=_accumulation(plan),
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=CHECKPOINTS_KEPT,
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # by default a NaN loss is replaced in the log while the optimizer steps on
        include_num_input_tokens_seen="non_padding",
        average_tokens_across_devices=True,
        # The rows are prepared, packed and masked already (sft_recipes.data); the collator below keeps them apart.
        packing=False,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=report_to,
    )


def _checkpointing(on: bool, plan: Plan) -> dict[str, Any]:
    """Activation checkpointing under the name that the installed transformers has for it.

    Non-reentrant, but for adapters under ZeRO-3, whose gathered weights have another shape when a layer is computed
    again (https://github.com/huggingface/trl/issues/2514).
    """
    name = (
        "activation_checkpointing"
        if "activation_checkpointing" in SFTConfig.__dataclass_fields__
        else "gradient_checkpointing"
    )
    # TRL's own default is to checkpoint, and it is read from the old name: so that one is silenced, not left out.
    off = {"gradient_checkpointing": False} if name == "activation_checkpointing" else {}
    reentrant = plan.method != "full" and plan.parallelism.startswith("zero3")
    return {name: on, **off, **({f"{name}_kwargs": {"use_reentrant": reentrant}} if on else {})}


def _accumulation(plan: Plan) -> dict[str, Any]:
    """Under FSDP2 each micro-batch's gradients are shared out at once: kept back until the last one, as accelerate does
    by default, every rank would hold the whole model's."""
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}} if plan.parallelism == "fsdp2" else {}


class WholeBatches(Sampler[int]):
    """Row indices in a seeded order of each epoch, cut to whole effective batches.

    The Trainer would let the last optimizer step of an epoch be a smaller one, and accelerate would repeat rows to
    fill a rank. Here each row is used at most once an epoch, every step sees a whole effective batch, and the same rows
    make a step whatever the number of ranks. The tail that is left out is another one each epoch.
    """

    def __init__(self, rows: int, effective_batch_size: int, seed: int, epoch: Callable[[], int]):
        """`epoch` is asked when an epoch begins: accelerate does not pass it on to the sampler of a loader that skips
        rows after a resume (https://github.com/huggingface/accelerate/issues/2823)."""
        self.rows = rows
        self.used = rows // effective_batch_size * effective_batch_size
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        return iter(torch.randperm(self.rows, generator=generator)[: self.used].tolist())

    def __len__(self) -> int:
        return self.used


class PackedRowsCollator(DataCollatorForLanguageModeling):
    """Keeps packed rows as rows, [batch, length], and tells the examples in them apart by `position_ids` alone.

    TRL's own padding-free collator lays all rows end to end, which a variable-length flash kernel wants; for other
    attentions that makes a mask of (batch x length) squared. No attention mask is passed: an all-ones mask would bring
    attention across examples back (transformers derives the isolation from `position_ids` only where there is none).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, each [batch, longest row]."""
        longest = max(len(example["input_ids"]) for example in examples)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for example in examples:
            lengths = example["seq_lengths"]
            labels, positions = list(example["labels"]), []
            for length in lengths:
                labels[len(positions)] = IGNORED  # an example's first token follows another's last: nothing predicts it
                positions += range(length)
            padding = longest - len(positions)
            batch["input_ids"].append([*example["input_ids"], *[self.pad_token_id] * padding])
            batch["labels"].append([*labels, *[IGNORED] * padding])
            batch["position_ids"].append([*positions, *[0] * padding])  # each padding token an example of its own
        return {name: torch.tensor(rows) for name, rows in batch.items()}


def attention(plan: Plan) -> str:
    """The attention to load the model with; `auto` is torch's own, which isolates packed rows exactly."""
    asked: str = plan.sections["model"]["attention"]
    return "sdpa" if asked == "auto" else asked


def collator(plan: Plan, pad_token_id: int) -> DataCollatorForLanguageModeling | None:
    """What makes a batch of packed rows; None, TRL's own padding, where rows are not packed.

    Flash attention tells examples apart in one row alone (transformers' `_is_packed_sequence`), so it gets TRL's
    padding-free collator, which lays the rows end to end.
    """
    if not plan.packing:
        return None
    if attention(plan) == "flash_attention_2":
        return DataCollatorForLanguageModeling(pad_token_id, padding_free=True)
    return PackedRowsCollator(pad_token_id)


class ResponseTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over prepared rows: whole effective batches, and a validation loss that is a mean over tokens.

    `passes` says how many forward passes of validation each source of it has, in their order (`validation_in_passes`).
    """

    def __init__(self, plan: Plan, passes: dict[str, int], **arguments: Any):
        self._plan = plan
        super().__init__(peft_config=adapters.configuration(plan), **arguments)
        adapters.hold_in_fp32(self.model, plan)
        adapters.keep_the_trained_layout(self.model)
        engine.reduce_in_fp32(self.accelerator, plan)
        self.remove_callback(PrinterCallback)  # callbacks/progress.py speaks
        self.supervised_tokens_seen = 0
        self.evaluate_sources(passes)
        self.tokens_digest = 0
        self._digest = torch.zeros(1, dtype=torch.int64, device=self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> WholeBatches:
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        return WholeBatches(rows, self._plan.effective_batch_size, self.args.data_seed, self._epoch)

    def _epoch(self) -> int:
        return int(self.state.global_step // self._plan.steps_per_epoch) if self._plan.steps_per_epoch else 0

    def get_batch_samples(self, *arguments: Any, **named: Any) -> tuple[list[Any], Any]:
        """As the Trainer's; counts the supervised tokens of the step over all ranks, and remembers which they were."""
        batches, supervised_tokens = super().get_batch_samples(*arguments, **named)
        self.supervised_tokens_seen += int(supervised_tokens or 0)
        for batch in batches:
            self._digest += tokens_digest(batch).to(self._digest.device)
        return batches, supervised_tokens

    def evaluate_sources(self, passes: dict[str, int]) -> None:
        """Takes the validation rows to be of these sources, each so many forward passes."""
        self._sources = list(passes)
        self._source_of_pass = [source for source, many in enumerate(passes.values()) for _ in range(many)]
        self._evaluated = torch.zeros(len(passes), 2, dtype=torch.float64)
        self._passes_done = 0

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """As TRL's, and keeps each source's sum of losses and the number of tokens that they were taken over."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        source = self._source_of_pass[self._passes_done]
        self._evaluated[source] += torch.stack([loss.double() * tokens, tokens.double()]).cpu()
        self._passes_done += 1
        return loss, logits, labels

    def evaluation_loop(self, *arguments: Any, **named: Any) -> EvalLoopOutput:
        """As the Trainer's, with the sum of losses over the sum of supervised tokens as `eval_loss`, and the same of
        each source where there are several, as `eval_NAME_loss`.

        The Trainer's own is a mean of batch means, which changes with the batch and the number of ranks
        (https://github.com/huggingface/transformers/issues/39241).
        """
        self._evaluated.zero_()
        self._passes_done = 0
        output = super().evaluation_loop(*arguments, **named)
        sums = self.accelerator.reduce(self._evaluated.to(self.accelerator.device, torch.float64), "sum").tolist()
        prefix = named.get("metric_key_prefix", "eval")
        if len(sums) > 1:
            for name, (loss, tokens) in zip(self._sources, sums, strict=True):
                output.metrics[f"{prefix}_{name}_loss"] = loss / max(tokens, 1)
        output.metrics[f"{prefix}_loss"] = sum(loss for loss, _ in sums) / max(sum(tokens for _, tokens in sums), 1)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with `num_tokens` counted by the Trainer: TRL's own takes a batch for one row, and starts from 0
        again on a resume. `tokens_digest` is of the supervised tokens since the last line, of all ranks: where two runs
        have the same, they saw the same rows."""
        for measured in self._metrics.values():
            if "num_tokens" in measured:
                measured["num_tokens"] = [self.state.num_input_tokens_seen]
        if "loss" in logs:
            self.tokens_digest = int(self.accelerator.reduce(self._digest, "sum").item()) % 2**48
            self._digest.zero_()
        super().log(logs, start_time)

    def save_weights(self, target: Path) -> None:
        """Saves the model and its tokenizer so that `target` is whole or not there. All ranks take part.

        The Trainer's pickled arguments are left out, since a model's folder is loaded by others, and so is peft's
        card of empty headings.
        """
        partial = checkpoint.partial(target)
        self.save_model(str(partial), _internal_call=True)
        if self.accelerator.is_main_process:
            for name in ("training_args.bin", "README.md"):
                (partial / name).unlink(missing_ok=True)
            self._add_generation(partial)
            checkpoint.publish(target)

    def _add_generation(self, folder: Path) -> None:
        """Adapters have no generation configuration of their own, and the ends of turn stand there."""
        if self._plan.method != "full":
            self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)

    def take_up(self, whole: Path, last: Path) -> None:
        """Stands where the last step left a run that was cut off before its models were published."""
        self.state = TrainerState.load_from_json(str(whole / "trainer_state.json"))
        if not self._plan.no_rank_holds_the_model:
            self.model.to(self.args.device)
        if self.accelerator.is_main_process:
            checkpoint.copy_whole(whole, last, checkpoint.MODEL_FILES)
            self._add_generation(last)

    def load_weights(self, folder: Path) -> None:
        """Puts the weights of a saved model into this one, which no rank may hold in shards."""
        self._load_from_checkpoint(str(folder), self.model)

    def create_model_card(self, *_arguments: Any, **_named: Any) -> None:
        """Nothing: the manifest tells what a run was; a card with empty headings in every checkpoint does not."""


def tokens_digest(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A number for the supervised tokens of a batch and their places, [1], int64.

    It is a sum that wraps, so how rows are dealt out to batches and ranks, or padded, does not change it.
    """
    labels = batch["labels"].long()
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)
    mixed = (labels + 1) * 0x1E3779B97F4A7C15 + (positions.long() + 1) * 0x3F58476D1CE4E5B9
    mixed = mixed * (mixed ^ (mixed >> 29))
    return mixed[labels != IGNORED].sum().reshape(1)


def whole_passes(validation: Any, rows_a_pass: int) -> Any:
    """The validation rows, filled with rows that count nothing to whole passes over all ranks.

    Accelerate would fill them by repeating rows from the beginning, which then count twice.

    Args:
        validation: a datasets.Dataset with `input_ids`, `labels` and, where packed, `seq_lengths`.
        rows_a_pass: micro-batch x ranks.
    """
    from datasets import concatenate_datasets

    missing = -len(validation) % rows_a_pass
    if not missing:
        return validation
    nothing = validation.select([0] * missing).map(
        lambda row: {"labels": [IGNORED] * len(row["labels"])}, features=validation.features
    )
    return concatenate_datasets([validation, nothing])


def validation_in_passes(validation: Any, rows_of: dict[str, int], rows_a_pass: int) -> tuple[Any, dict[str, int]]:
    """The validation rows with each source filled to whole passes, and how many passes each has.

    No pass then holds rows of two sources, so a loss of a pass belongs to one.

    Args:
        rows_of: how many rows each source has, in their order.
        rows_a_pass: micro-batch x ranks.
    """
    from datasets import concatenate_datasets

    filled, first = {}, 0
    for name, many in rows_of.items():
        filled[name] = whole_passes(validation.select(range(first, first + many)), rows_a_pass)
        first += many
    return concatenate_datasets(list(filled.values())), {name: len(one) // rows_a_pass for name, one in filled.items()}


def read_rows(prepared: Path) -> tuple[Any, Any]:
    """The prepared training and validation rows, without the places where they were written."""
    from datasets import load_from_disk

    train, validation = (load_from_disk(str(prepared / part)) for part in ("train", "validation"))
    return train.remove_columns("source"), validation.remove_columns("source")
