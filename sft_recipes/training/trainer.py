"""Builds TRL's SFTTrainer from a plan, and mends what it and the Trainer below it leave to chance."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.config import gpu_types
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.monitor.detectors import exceeds_overfitting_gap
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import attention, lora, rank_heartbeat, strategy
from sft_recipes.training.callbacks.graceful_stop import (
    EvaluationStoppedError,
    GracefulStopCallback,
    StoppedAtStartError,
)
from sft_recipes.training.callbacks.integrity_log import IntegrityCallback
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.writer import CheckpointWriter
from sft_recipes.training.integrity import data_order
from sft_recipes.training.nan_guard import NanGuard
from sft_recipes.training.throughput import ThroughputMeter

log = logging.getLogger(__name__)

# TRL scores all positions where there is no Triton, and throws away those that the loss does not look at: on a CPU a
# quarter of a step of the tiny recipe. As on CUDA, only the supervised ones are scored. This module asks for nothing
# else by that name; the kernel asks its own.
trl.trainer.utils._use_triton = lambda _device: True

# TRL lays a tile of logits out so wide, also where the vocabulary is narrower.
_WIDEST_TILE = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE

RETAINED = "retention_eval"  # the source whose loss says what the model forgets, and decides nothing


def sft_config(plan: Plan, folder: RunDir) -> SFTConfig:
    """The plan in TRL's terms; every value that the recipe may not set is set here.

    Raises:
        SetupError: kernels are asked for that are not installed.
    """
    trainer = dict(plan.sections.trainer)
    if trainer.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise SetupError(
            "trainer.use_liger_kernel: liger-kernel is not installed; install it into the virtual environment, or "
            "leave it out: TRL's own kernel scores the answers' tokens without it"
        )
    for planned in ("max_length", "packing", "gradient_checkpointing"):
        trainer.pop(planned)
    checkpointing = plan.sections.trainer["gradient_checkpointing"]
    return SFTConfig(
        **{
            "optim": "adamw_torch_fused",
            "logging_first_step": True,
            "ddp_find_unused_parameters": False,
            "project": "sft-recipes",
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
        save_total_limit=None,  # which are kept is callbacks/best.py's: the Trainer would delete by date
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # by default a NaN loss is replaced in the log while the optimizer steps on
        include_num_input_tokens_seen="non_padding",
        average_tokens_across_devices=True,
        # The rows are prepared, packed and masked already (sft_recipes.data); the collator below keeps them apart.
        packing=False,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],  # callbacks/trackers.py adds them
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
    reentrant = plan.method != "full" and plan.strategy.zero_stage == 3
    return {name: on, **off, **({f"{name}_kwargs": {"use_reentrant": reentrant}} if on else {})}


def _accumulation(plan: Plan) -> dict[str, Any]:
    """Under FSDP2 each micro-batch's gradients are shared out at once: kept back until the last one, as accelerate does
    by default, every rank would hold the whole model's."""
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}} if plan.strategy.fsdp else {}


class EffectiveBatchSampler(Sampler[int]):
    """Row indices in a seeded order of each epoch, cut to whole effective batches.

    The Trainer would let the last optimizer step of an epoch be a smaller one, and accelerate would repeat rows to
    fill a rank. Here each row is used at most once an epoch, every step sees a whole effective batch, and the same rows
    make a step whatever the number of ranks. The tail that is left out is another one each epoch.
    """

    def __init__(self, rows: int, effective_batch_size: int, seed: int, epoch: Callable[[], int]):
        """`epoch` is asked when an epoch begins: accelerate does not pass it on to the sampler of a loader that skips
        rows after a resume (https://github.com/huggingface/accelerate/issues/2823)."""
        self.rows = rows
        self.effective_batch_size = effective_batch_size
        self.used = rows // effective_batch_size * effective_batch_size
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()).tolist())

    def order(self, epoch: int) -> torch.Tensor:
        """The rows of an epoch, as they are dealt out, [rows used]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.rows, generator=generator)[: self.used]

    def of_step(self, step: int) -> list[int]:
        """The rows of an optimizer step, the first being 0."""
        epoch, within = divmod(step * self.effective_batch_size, self.used)
        rows: list[int] = self.order(epoch)[within : within + self.effective_batch_size].tolist()
        return rows

    def __len__(self) -> int:
        return self.used


class RowsCollator(DataCollatorForLanguageModeling):
    """TRL's own, and the numbers of the rows beside what it makes of them (training/ledger.py)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """As TRL's, and `row`, [rows]."""
        return data_order.keep_row_numbers(examples, super().torch_call(examples))


class PackedRowsCollator(DataCollatorForLanguageModeling):
    """Keeps packed rows as rows, [batch, length], and tells the examples in them apart by `position_ids` alone.

    For attentions that make a mask, which would be (batch x length) squared were all rows laid end to end. No attention
    mask is passed: an all-ones mask would bring attention across examples back (transformers derives the isolation from
    `position_ids` only where there is none).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, each [batch, longest row], and `row`, [batch]."""
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
        return data_order.keep_row_numbers(examples, {name: torch.tensor(rows) for name, rows in batch.items()})


def collator(plan: Plan, pad_token_id: int, way: str) -> RowsCollator | PackedRowsCollator:
    """What makes a batch of rows for a model that attends in this way (transformers' name of it).

    Those that take the bounds of examples get TRL's padding-free collator, which lays rows end to end, packed or not:
    nothing is padded, and no layer has to ask a GPU where an example begins.
    """
    if attention.takes_bounds(way):
        return RowsCollator(pad_token_id, padding_free=True)
    return PackedRowsCollator(pad_token_id) if plan.packing else RowsCollator(pad_token_id)


class RecipeTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over prepared rows: whole effective batches, a validation loss that is a mean over tokens, a stop
    before a step that is no number, and what a step costs.

    `passes` says how many forward passes of validation each source of it has, in their order (`validation_in_passes`);
    `architecture` are the numbers that operations are counted from, `prepared` the folder of the rows. `say` is how a
    callback speaks to the user.
    """

    def __init__(
        self, plan: Plan, passes: dict[str, int], architecture: dict[str, Any], prepared: Path, **arguments: Any
    ):
        self.plan = plan
        self.say: Callable[[str], None] = print
        self.stopping = GracefulStopCallback()
        arguments["train_dataset"] = data_order.add_row_numbers(arguments["train_dataset"])
        super().__init__(**arguments)
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(
            _WIDEST_TILE, self.model.config.get_text_config().vocab_size
        )
        lora.cast_trainable_to_fp32(self.model, plan)
        lora.disable_cpu_repack(self.model)
        lora.save_adapters_alone(self.model, plan)
        strategy.reduce_in_fp32(self.accelerator, plan)
        self.remove_callback(PrinterCallback)  # callbacks/progress.py speaks
        self.add_callbacks([self.stopping])
        self.watch = NanGuard(plan, prepared, self.model)
        self.meter = ThroughputMeter(plan, architecture, peak_flops(plan, self.args.device), self.args.device)
        self.meter.watch(self.model)
        self._tokens_measured: int | None = None
        self.checkpoint_writer = CheckpointWriter(plan, RunDir(Path(self.args.output_dir)), self.accelerator)
        self.supervised_tokens_seen = 0
        self.evaluate_sources(passes)
        # What TRL's loss does besides has no other way than its own: other losses, the balance of experts.
        self._loss_is_plain = self.args.loss_type == "nll" and not (self.label_smoother or self.aux_loss_enabled)
        self._answered = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        self._operations_of_a_token: int | None = None
        self.tokens_digest = 0
        self._digest = torch.zeros(1, dtype=torch.int64, device=self.args.device)
        rows = self._get_train_sampler()
        steps_an_epoch = rows.used // plan.effective_batch_size
        self.integrity = IntegrityCallback(
            plan,
            self.checkpoint_writer.folder,
            data_order.DataOrderCheck(rows.order, plan.effective_batch_size, steps_an_epoch),
        )
        self.add_callbacks([self.integrity])

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if data_order.ROW not in self._signature_columns:
            self._signature_columns.append(data_order.ROW)

    def _get_train_sampler(self, train_dataset: Any = None) -> EffectiveBatchSampler:
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        return EffectiveBatchSampler(rows, self.plan.effective_batch_size, self.args.data_seed, self._epoch)

    def _epoch(self) -> int:
        return int(self.state.global_step // self.plan.steps_per_epoch) if self.plan.steps_per_epoch else 0

    def add_callbacks(self, callbacks: list[Any]) -> None:
        """Each is told this trainer."""
        for callback in callbacks:
            callback.trainer = self
            self.add_callback(callback)

    def end_callbacks(self) -> None:
        """For a run that did not come to its end: those that have something open close it."""
        for callback in self.callback_handler.callbacks:
            getattr(callback, "end", lambda: None)()

    def write_summary(self) -> None:
        """For a run whose last step an earlier start took: those that sum a run up at its end do so now."""
        for callback in self.callback_handler.callbacks:
            getattr(callback, "write_summary", lambda _state: None)(self.state)

    def order_of_step(self, taken: int) -> list[int]:
        """The rows of the step behind `taken` steps, as they were dealt out to micro-batches and ranks."""
        return self._get_train_sampler().of_step(taken)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any) -> tuple[list[Any], Any]:
        """As the Trainer's; counts the supervised tokens of the step over all ranks, and remembers which they were."""
        if self._tokens_measured is None:
            self._tokens_measured = int(self.state.num_input_tokens_seen)  # of earlier starts
        self.meter.step_begins()
        batches, supervised_tokens = super().get_batch_samples(self.meter.waiting(epoch_iterator), *arguments)
        self.integrity.data_order.record_batches(batches)
        self.supervised_tokens_seen += int(supervised_tokens or 0)
        self.meter.saw(batches, int(supervised_tokens or 0))
        for batch in batches:
            self._digest += tokens_digest(batch).to(self._digest.device)
        return batches, supervised_tokens

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """As TRL's; in training, all ranks learn the step's loss and stop where it is no number."""
        if model.training and self._loss_is_plain:
            loss = self._loss(model, inputs, named["num_items_in_batch"])
        else:
            loss = super().compute_loss(model, inputs, *arguments, **named)
        if model.training:
            rank_heartbeat.beat(self.state.global_step + 1, "waiting")
            self.watch.saw(self, loss)
            rank_heartbeat.beat(self.state.global_step + 1, "step")
        return loss

    def _loss(self, model: Any, inputs: dict[str, Any], supervised_tokens: torch.Tensor) -> torch.Tensor:
        """TRL's loss over the supervised tokens of the whole step, without its three gathers over the ranks and three
        waits for the GPU at every micro-batch: what they were for is summed up, and read where a line is logged."""
        outputs = model(**inputs, fused_lm_head=True)
        figures = (outputs.label_mask, outputs.is_top1, outputs.entropy.detach())
        self._answered += torch.stack([figure.sum(dtype=torch.float64) for figure in figures])
        loss: torch.Tensor = -outputs.log_probs.sum() * self.accelerator.num_processes / supervised_tokens.clamp(min=1)
        return loss

    def _answers(self) -> dict[str, float]:
        """Means over the supervised tokens since the last call, of all ranks; nothing where TRL measured them."""
        if not self._loss_is_plain:
            return {}
        tokens, right, entropy = self.accelerator.reduce(self._answered, "sum").tolist()
        self._answered.zero_()
        return {"mean_token_accuracy": right / max(tokens, 1), "entropy": entropy / max(tokens, 1)}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, which would count the model's weights anew at every micro-batch."""
        if self._operations_of_a_token is None:
            self._operations_of_a_token = int(super().floating_point_ops({"input_ids": torch.zeros(1)}))
        return int(self._operations_of_a_token * inputs["input_ids"].numel())

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Any:
        """As the Trainer's; stops where the gradients are no numbers, before the step is applied."""
        norm = super()._get_grad_norm(*arguments, **named)
        self.watch.gradients(self, norm)
        return norm

    def _evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """As the Trainer's; where all ranks are asked to stop, they leave it and save at once."""
        try:
            metrics: dict[str, float] = super()._evaluate(*arguments, **named)
        except EvaluationStoppedError as error:
            if self._took_no_step():
                raise StoppedAtStartError from error
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # else the Trainer tries again at the epoch's end, and saves again
            return {}
        if self.control.should_training_stop and self._took_no_step():
            raise StoppedAtStartError
        return metrics

    def _took_no_step(self) -> bool:
        return bool(self.state.global_step == self.stopping.first_step)

    def evaluate_sources(self, passes: dict[str, int]) -> None:
        """Takes the validation rows to be of these sources, each so many forward passes."""
        self._sources = list(passes)
        self._source_of_pass = [source for source, many in enumerate(passes.values()) for _ in range(many)]
        self._evaluated = torch.zeros(len(passes), 2, dtype=torch.float64)
        self._of_pass: list[torch.Tensor] = []

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """As TRL's, and keeps each source's sum of losses and the number of tokens that they were taken over.

        Raises:
            EvaluationStoppedError: on all ranks, where one was asked to stop and the run has steps to come.
        """
        if self.stopping.stop_requested():
            raise EvaluationStoppedError
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        source = self._source_of_pass[len(self._of_pass)]
        self._of_pass.append(torch.stack([loss.double() * tokens, tokens.double()]).cpu())
        self._evaluated[source] += self._of_pass[-1]
        return loss, logits, labels

    def evaluated_passes(self, name: str) -> torch.Tensor:
        """Of the newest evaluation, each pass of a source on each rank: loss sum and tokens, [ranks, passes, 2]."""
        mine = [
            one
            for one, source in zip(self._of_pass, self._source_of_pass, strict=True)
            if self._sources[source] == name
        ]
        gathered: torch.Tensor = self.accelerator.gather(torch.stack(mine)[None].to(self.accelerator.device))
        return gathered.cpu()

    def evaluation_loop(self, *arguments: Any, **named: Any) -> EvalLoopOutput:
        """As the Trainer's, with the sum of losses over the sum of supervised tokens as `eval_loss`, and the same of
        each source where there are several, as `eval_NAME_loss`.

        The Trainer's own is a mean of batch means, which changes with the batch and the number of ranks
        (https://github.com/huggingface/transformers/issues/39241).
        """
        self._evaluated.zero_()
        self._of_pass.clear()
        # A loader draws a random number when it begins: a run that evaluates again after a resume must draw none.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*arguments, **named)
        sums = self.accelerator.reduce(self._evaluated.to(self.accelerator.device, torch.float64), "sum").tolist()
        prefix = named.get("metric_key_prefix", "eval")
        of = dict(zip(self._sources, sums, strict=True))
        retained = of.pop(RETAINED, None)
        named_apart = {**(of if len(of) > 1 else {}), **({RETAINED: retained} if retained else {})}
        for name, (loss, tokens) in named_apart.items():
            output.metrics[f"{prefix}_{name}_loss"] = loss / max(tokens, 1)
        total, tokens = (sum(part) for part in zip(*of.values(), strict=True))
        output.metrics[f"{prefix}_loss"] = total / max(tokens, 1)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with `num_tokens` counted by the Trainer: TRL's own takes a batch for one row, and starts from 0
        again on a resume. `tokens_digest` is of the supervised tokens since the last line, of all ranks: where two runs
        have the same, they saw the same rows."""
        for measured in self._metrics.values():
            measured["num_tokens"] = [self.state.num_input_tokens_seen]
        if "loss" in logs:
            self.tokens_digest = int(self.accelerator.reduce(self._digest, "sum").item()) % 2**48
            self._digest.zero_()
            tokens = int(self.state.num_input_tokens_seen)
            logs.update(self.meter.read(self.accelerator, tokens - (self._tokens_measured or 0)))
            logs.update(self._answers())
            self._tokens_measured = tokens
        if "eval_loss" in logs:
            logs.update(self._gap_of(logs["eval_loss"]))
        logs["supervised_tokens_seen"] = self.supervised_tokens_seen
        super().log(logs, start_time)

    def _gap_of(self, eval_loss: float) -> dict[str, float]:
        """Validation loss minus the last training loss that was logged (the Trainer never puts both in one record),
        its exponential mean, and whether the gap is the documents' sign of overfitting."""
        train_loss = self._last_logged("loss")
        if train_loss is None:
            return {}
        gap = eval_loss - train_loss
        smoothed = self._last_logged("train_eval_gap_smoothed")
        return {
            "train_eval_gap": gap,
            "train_eval_gap_smoothed": gap if smoothed is None else (smoothed + gap) / 2,
            "overfitting_signal": float(exceeds_overfitting_gap(gap, self.plan.sections.monitor)),
        }

    def _last_logged(self, key: str) -> float | None:
        """From the Trainer's own history, which a resume brings back."""
        return next((float(entry[key]) for entry in reversed(self.state.log_history) if key in entry), None)

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes `checkpoint-N`, before it gets its place in the run's folder."""
        return str(self.checkpoint_writer.folder.saving)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's, whole or not at all, without its pickled arguments, which nothing here loads."""
        step, integrity = self.state.global_step, self.integrity.check_before_save()
        partial = self.checkpoint_writer.folder.saving / f"checkpoint-{step}"
        if self.is_deepspeed_enabled:
            self.checkpoint_writer.patch_deepspeed(self.model_wrapped)

        def write() -> None:
            super(RecipeTrainer, self)._save_checkpoint(model, trial)
            if self.accelerator.is_main_process:
                (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                if self.is_deepspeed_enabled:
                    (partial / "latest").write_text(f"global_step{step}", encoding="ascii")

        record = {"supervised_tokens_seen": self.supervised_tokens_seen, "integrity": integrity}
        refused = self.checkpoint_writer.save_checkpoint(step, write, record)
        if refused:
            log.warning(
                "step %d: checkpoint-%d was not saved: %s; next attempt at step %d",
                step,
                step,
                refused,
                self.checkpoint_writer.retry_at_step,
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self.checkpoint_writer.collect_write_errors():
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        with self.checkpoint_writer.collect_write_errors():
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's; under FSDP2 every rank takes part in gathering the optimizer's state, also where the disk
        has just refused the weights."""
        if not self.is_fsdp_enabled:
            with self.checkpoint_writer.collect_write_errors():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        with self.checkpoint_writer.collect_write_errors():
            save_fsdp_model(plugin, self.accelerator, self.model, output_dir)
        with self.checkpoint_writer.collect_write_errors():
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        with self.checkpoint_writer.collect_write_errors():
            if self.accelerator.is_main_process:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def save_weights(self, target: Path) -> str | None:
        """Saves the model and its tokenizer so that `target` is whole or not there, and says why where it is not. All
        ranks take part.

        The Trainer's pickled arguments are left out, since a model's folder is loaded by others, and so is peft's
        gpu_type of empty headings.
        """
        partial = self.checkpoint_writer.folder.saving / target.name

        def write() -> None:
            self.save_model(str(partial), _internal_call=True)
            if self.accelerator.is_main_process:
                for name in (TRAINING_ARGS_NAME, "README.md"):
                    (partial / name).unlink(missing_ok=True)
                self._add_generation(partial)

        return self.checkpoint_writer.write_atomically(
            target, write, {"run_id": self.plan.run_id, "step": self.state.global_step}
        )

    def copy_model(self, whole: Path, target: Path, copy: Callable[[Path, Path], Any] = shutil.copy2) -> str | None:
        """Copies the model of a complete, verified folder to `target`; None on success, else the reason of the failure.

        Collective: call on every rank. Rank 0 copies, each file with `copy`.
        """
        step = int(checkpoint_format.read_commit_marker(whole)["step"])

        def write() -> None:
            if self.accelerator.is_main_process:
                partial = self.checkpoint_writer.folder.saving / target.name
                checkpoint_format.copy_model(whole, partial, copy)
                self._add_generation(partial)

        return self.checkpoint_writer.write_atomically(target, write, {"run_id": self.plan.run_id, "step": step})

    def _add_generation(self, folder: Path) -> None:
        """Adapters have no generation configuration of their own, and the ends of turn stand there."""
        if self.plan.method != "full":
            self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)

    def restore_state(self, whole: Path) -> None:
        """Stands where a checkpoint's step left the run, without its weights, which `train` or `copy_model` bring."""
        self.state = TrainerState.load_from_json(str(whole / "trainer_state.json"))

    def load_weights(self, folder: Path) -> None:
        """Puts the weights of a saved model into this one, which no rank may hold in shards."""
        self._load_from_checkpoint(str(folder), self.model)

    def create_model_card(self, *_arguments: Any, **_named: Any) -> None:
        """Nothing: the manifest tells what a run was; a card with empty headings in every checkpoint does not."""


def peak_flops(plan: Plan, device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device by the table of GPU types, or of the type that the plan names; None on the CPU,
    in fp32, and for a device that neither knows."""
    if device.type != "cuda" or plan.precision != "bf16":
        return None
    properties = torch.cuda.get_device_properties(device)
    found = gpu_types.identify(properties.name, properties.total_memory / 2**20)
    return found.peak_flops if found else gpu_types.peak_flops(plan.gpu_type)


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


def read_rows(prepared: Path, details: dict[str, Any], rows_a_pass: int) -> tuple[Any, Any, dict[str, int]]:
    """The prepared training rows, the rows that an evaluation looks at, and how many passes each source of them has.

    Rows that the model should not forget are evaluated last, as a source of their own.

    Args:
        details: what preparation counted.
        rows_a_pass: micro-batch x ranks.
    """
    from datasets import concatenate_datasets, load_from_disk

    train, held_out = (
        load_from_disk(str(prepared / part)).remove_columns("source") for part in ("train", "validation")
    )
    rows_of = dict(details["validation_rows"])
    if details.get("retention_eval_rows"):
        held_out = concatenate_datasets(
            [held_out, load_from_disk(str(prepared / "retention_eval")).remove_columns("source")]
        )
        rows_of[RETAINED] = details["retention_eval_rows"]
    return train, *validation_in_passes(held_out, rows_of, rows_a_pass)
