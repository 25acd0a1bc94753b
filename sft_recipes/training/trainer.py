"""TRL's SFTTrainer for a plan: effective batches, a validation loss per token, NaN guard, atomic checkpoints."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
from transformers import PrinterCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from sft_recipes.config import gpu_types
from sft_recipes.data import tokenizer_files
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.training import lora, parameter_table, patches, rank_heartbeat
from sft_recipes.training.callbacks.graceful_stop import (
    EvaluationStoppedError,
    GracefulStopCallback,
    StoppedAtStartError,
)
from sft_recipes.training.callbacks.integrity_log import IntegrityCallback
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.writer import CheckpointWriter
from sft_recipes.training.dataset import RETENTION, EffectiveBatchSampler, tokens_digest
from sft_recipes.training.integrity import data_order
from sft_recipes.training.nan_guard import NanGuard
from sft_recipes.training.throughput import ThroughputMeter

log = logging.getLogger(__name__)


class RecipeTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over prepared rows.

    Args:
        passes: forward passes of validation per source, in their order (`dataset.split_into_passes`).
        architecture: model dimensions, for the FLOP count.
        prepared: folder of the prepared rows.
    """

    def __init__(
        self, plan: Plan, passes: dict[str, int], architecture: dict[str, Any], prepared: Path, **arguments: Any
    ):
        self.plan = plan
        self.stopping = GracefulStopCallback()
        self.source_weights = read_json(prepared / "details.json").get("source_weights", [])
        arguments["train_dataset"] = data_order.add_row_numbers(arguments["train_dataset"])
        with patches.keep_model_config(arguments["model"].config):
            if not parameter_table.count(arguments["model"]).get("experts"):
                if arguments["args"].router_aux_loss_coef:
                    raise SetupError(f"trainer.router_aux_loss_coef: {plan.model} has no experts. Remove it")
                arguments["args"].router_aux_loss_coef = 0.0  # else TRL goes by the class: some have no experts
            super().__init__(**arguments)
        lora.cast_trainable_to_fp32(self.model, plan)
        patches.apply_to_trainer(plan, self)
        self.remove_callback(PrinterCallback)  # callbacks/console.py prints
        self.add_callbacks([self.stopping])
        self._tokenizer_folder = prepared / tokenizer_files.FOLDER
        self.nan_guard = NanGuard(plan, prepared, self.model)
        self.meter = ThroughputMeter(plan, architecture, peak_flops(plan, self.args.device), self.args.device)
        self._tokens_measured: int | None = None
        self.checkpoint_writer = CheckpointWriter(plan, RunDir(Path(self.args.output_dir)), self.accelerator)
        self.supervised_tokens_seen = 0
        self.set_eval_sources(passes)
        # Other losses and MoE load balancing only exist in TRL's compute_loss.
        self._loss_is_plain = self.args.loss_type == "nll" and not (self.label_smoother or self.aux_loss_enabled)
        self._token_sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        self._flops_per_token: int | None = None
        self.tokens_digest = 0
        self._digest = torch.zeros(1, dtype=torch.int64, device=self.args.device)
        sampler = self._get_train_sampler()
        steps_per_epoch = sampler.used // plan.effective_batch_size
        self.integrity = IntegrityCallback(
            plan,
            self.checkpoint_writer.folder,
            data_order.DataOrderCheck(sampler.order, plan.effective_batch_size, steps_per_epoch),
        )
        self.add_callbacks([self.integrity])

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if data_order.ROW not in self._signature_columns:
            self._signature_columns.append(data_order.ROW)

    def _get_train_sampler(self, train_dataset: Any = None) -> EffectiveBatchSampler:
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        batch, seed = self.plan.effective_batch_size, self.args.data_seed
        return EffectiveBatchSampler(rows, batch, seed, self._epoch, self.source_weights)

    def _epoch(self) -> int:
        return int(self.state.global_step // self.plan.steps_per_epoch) if self.plan.steps_per_epoch else 0

    def add_callbacks(self, callbacks: list[Any]) -> None:
        """Add callbacks and give each this trainer."""
        for callback in callbacks:
            callback.trainer = self
            self.add_callback(callback)

    def end_callbacks(self) -> None:
        """Close what callbacks have open, for a run that did not finish."""
        for callback in self.callback_handler.callbacks:
            getattr(callback, "end", lambda: None)()

    def write_summary(self) -> None:
        """Have callbacks write their summaries, for a run whose last step an earlier attempt took."""
        for callback in self.callback_handler.callbacks:
            getattr(callback, "write_summary", lambda _state: None)(self.state)

    def rows_of_step(self, steps_taken: int) -> list[int]:
        """Return the rows of the step after `steps_taken` steps, in the order of micro-batches and ranks."""
        return self._get_train_sampler().rows_of_step(steps_taken)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any) -> tuple[list[Any], Any]:
        """Get the micro-batches of a step; also count its supervised tokens over all ranks, and record its rows."""
        if self._tokens_measured is None:
            self._tokens_measured = int(self.state.num_input_tokens_seen)  # of earlier attempts
        self.meter.begin_step()
        batches, supervised_tokens = super().get_batch_samples(self.meter.time_batches(epoch_iterator), *arguments)
        self.integrity.data_order.record_batches(batches)
        self.supervised_tokens_seen += int(supervised_tokens or 0)
        self.meter.add_batches(batches, int(supervised_tokens or 0))
        for batch in batches:
            self._digest += tokens_digest(batch).to(self._digest.device)
        return batches, supervised_tokens

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """Compute the loss; in training, stop on all ranks if it is not finite."""
        if model.training and self._loss_is_plain:
            loss = self._plain_loss(model, inputs, named["num_items_in_batch"])
        else:
            loss = super().compute_loss(model, inputs, *arguments, **named)
        if model.training:
            rank_heartbeat.beat(self.state.global_step + 1, "waiting")
            self.nan_guard.check_loss(self, loss)
            rank_heartbeat.beat(self.state.global_step + 1, "step")
        return loss

    def _plain_loss(self, model: Any, inputs: dict[str, Any], supervised_tokens: torch.Tensor) -> torch.Tensor:
        """Compute TRL's loss over the step's supervised tokens, without its three gathers over the ranks and three GPU
        synchronizations per micro-batch: the metrics are summed, and read when a line is logged."""
        outputs = model(**inputs, fused_lm_head=True)
        per_token = (outputs.label_mask, outputs.is_top1, outputs.entropy.detach())
        self._token_sums += torch.stack([values.sum(dtype=torch.float64) for values in per_token])
        loss: torch.Tensor = -outputs.log_probs.sum() * self.accelerator.num_processes / supervised_tokens.clamp(min=1)
        return loss

    def _read_token_metrics(self) -> dict[str, float]:
        """Return means over the supervised tokens of all ranks since the last call; nothing if TRL measured them."""
        if not self._loss_is_plain:
            return {}
        tokens, correct, entropy = self.accelerator.reduce(self._token_sums, "sum").tolist()
        self._token_sums.zero_()
        return {"mean_token_accuracy": correct / max(tokens, 1), "entropy": entropy / max(tokens, 1)}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the Trainer's count; it would count the model's parameters again at every micro-batch."""
        if self._flops_per_token is None:
            self._flops_per_token = int(super().floating_point_ops({"input_ids": torch.zeros(1)}))
        return int(self._flops_per_token * inputs["input_ids"].numel())

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer, and check that it has every trained parameter."""
        optimizer = super().create_optimizer(model)
        parameter_table.check_optimizer(self.model if model is None else model, optimizer)
        return optimizer

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Any:
        """Get the gradient norm; stop before the optimizer step if it is not finite."""
        norm = super()._get_grad_norm(*arguments, **named)
        self.nan_guard.check_gradients(self, norm)
        return norm

    def _evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Evaluate; at a stop request, leave the evaluation on all ranks and save at once."""
        try:
            metrics: dict[str, float] = super()._evaluate(*arguments, **named)
        except EvaluationStoppedError as error:
            if self._took_no_step():
                raise StoppedAtStartError from error
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # else the Trainer evaluates at the epoch's end, and saves again
            return {}
        if self.control.should_training_stop and self._took_no_step():
            raise StoppedAtStartError
        return metrics

    def _took_no_step(self) -> bool:
        return bool(self.state.global_step == self.stopping.first_step)

    def set_eval_sources(self, passes: dict[str, int]) -> None:
        """Set the sources of the validation rows and the forward passes of each."""
        self._sources = list(passes)
        self._source_of_pass = [source for source, count in enumerate(passes.values()) for _ in range(count)]
        self._eval_sums = torch.zeros(len(passes), 2, dtype=torch.float64)
        self._sums_per_pass: list[torch.Tensor] = []

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Make TRL's prediction step; also sum the losses and count the supervised tokens per source.

        Raises:
            EvaluationStoppedError: on all ranks, if one got a stop request and the run has steps left.
        """
        if self.stopping.stop_requested():
            raise EvaluationStoppedError
        balances, self.aux_loss_enabled = self.aux_loss_enabled, False  # the loss of the tokens only
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.aux_loss_enabled = balances
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        source = self._source_of_pass[len(self._sums_per_pass)]
        self._sums_per_pass.append(torch.stack([loss.double() * tokens, tokens.double()]).cpu())
        self._eval_sums[source] += self._sums_per_pass[-1]
        return loss, logits, labels

    def evaluated_passes(self, source: str) -> torch.Tensor:
        """Return loss sum and token count of each pass of a source in the latest evaluation, [ranks, passes, 2]."""
        sums = [
            pass_sums
            for pass_sums, number in zip(self._sums_per_pass, self._source_of_pass, strict=True)
            if self._sources[number] == source
        ]
        gathered: torch.Tensor = self.accelerator.gather(torch.stack(sums)[None].to(self.accelerator.device))
        return gathered.cpu()

    def evaluation_loop(self, *arguments: Any, **named: Any) -> EvalLoopOutput:
        """Evaluate with `eval_loss` as sum of losses over sum of supervised tokens, and `eval_SOURCE_loss` per source
        if the data has several.

        The Trainer's is a mean of batch means, which changes with the batch and the number of ranks
        (https://github.com/huggingface/transformers/issues/39241).
        """
        self._eval_sums.zero_()
        self._sums_per_pass.clear()
        # A loader draws a random number when it begins: an evaluation repeated after a resume must draw none.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*arguments, **named)
        sums = self.accelerator.reduce(self._eval_sums.to(self.accelerator.device, torch.float64), "sum").tolist()
        prefix = named.get("metric_key_prefix", "eval")
        by_source = dict(zip(self._sources, sums, strict=True))
        retention = by_source.pop(RETENTION, None)
        reported = {**(by_source if len(by_source) > 1 else {}), **({RETENTION: retention} if retention else {})}
        for source, (loss, tokens) in reported.items():
            output.metrics[f"{prefix}_{source}_loss"] = loss / max(tokens, 1)
        total, tokens = (sum(part) for part in zip(*by_source.values(), strict=True))
        output.metrics[f"{prefix}_loss"] = total / max(tokens, 1)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and this trainer's.

        `num_tokens` is the Trainer's count: TRL's takes a batch for one row, and restarts from 0 at a resume.
        `tokens_digest` covers the supervised tokens of all ranks since the last line: equal digests, equal rows.
        """
        for metrics in self._metrics.values():
            metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        if "loss" in logs:
            self.tokens_digest = int(self.accelerator.reduce(self._digest, "sum").item()) % 2**48
            self._digest.zero_()
            tokens = int(self.state.num_input_tokens_seen)
            logs.update(self.meter.read(self.accelerator, tokens - (self._tokens_measured or 0)))
            logs.update(self._read_token_metrics())
            self._tokens_measured = tokens
        if "eval_loss" in logs:
            logs.update(self._train_eval_gap(logs["eval_loss"]))
        logs["supervised_tokens_seen"] = self.supervised_tokens_seen
        super().log(logs, start_time)

    def _train_eval_gap(self, eval_loss: float) -> dict[str, float]:
        """Return validation loss minus the last logged training loss (the Trainer never logs both in one record), its
        exponential mean, and whether the gap is the SFT guide's sign of overfitting."""
        train_loss = self._last_logged("loss")
        if train_loss is None:
            return {}
        gap = eval_loss - train_loss
        smoothed = self._last_logged("train_eval_gap_smoothed")
        return {
            "train_eval_gap": gap,
            "train_eval_gap_smoothed": gap if smoothed is None else (smoothed + gap) / 2,
            "overfitting_signal": float(gap > self.plan.sections.monitor.overfitting_gap),
        }

    def _last_logged(self, key: str) -> float | None:
        """Return the latest value in the Trainer's history, which a resume restores."""
        return next((float(entry[key]) for entry in reversed(self.state.log_history) if key in entry), None)

    def _get_output_dir(self, trial: Any) -> str:
        """Return where the Trainer writes `checkpoint-N`, before it is moved into the run's folder."""
        return str(self.checkpoint_writer.folder.saving)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint atomically, without the Trainer's pickled arguments, which nothing here loads."""
        step, integrity = self.state.global_step, self.integrity.check_before_save()
        partial = self.checkpoint_writer.folder.saving / f"checkpoint-{step}"
        if self.is_deepspeed_enabled:
            patches.tolerate_disk_errors(self.model_wrapped, self.checkpoint_writer.collect_write_errors)

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
            if self.args.should_save:
                self._copy_tokenizer(Path(str(output_dir)))

    def _copy_tokenizer(self, folder: Path) -> None:
        tokenizer_files.copy_files(self._tokenizer_folder, folder)

    def check_first_save(self) -> None:
        """Try before the first step to save what a model's folder has in addition to the weights.

        Raises:
            SetupError: a library rejects values that it saves.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict={})
                self._add_generation_config(Path(folder))
            except ValueError as error:
                reason = " ".join(str(error).split())[:200]
                raise SetupError(
                    f"{self.plan.model}: the first save would fail: {reason}. No step was taken. Correct that file of "
                    f"the model"
                ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        with self.checkpoint_writer.collect_write_errors():
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer and the LR scheduler; under FSDP2 every rank takes part in gathering the optimizer state,
        even if the disk has just refused the weights."""
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

    def save_weights(self, target: Path, masters_of: Path | None = None) -> str | None:
        """Save the model and its tokenizer atomically to `target`; None on success, else the reason of the failure.

        Collective: call on every rank. Leaves out the Trainer's pickled arguments, since others load a model's folder,
        and peft's model card with empty headings.

        Args:
            masters_of: save the fp32 master weights in this DeepSpeed checkpoint instead of the 16-bit weights.
        """
        partial = self.checkpoint_writer.folder.saving / target.name

        def write() -> None:
            if masters_of is None:
                self.save_model(str(partial), _internal_call=True)
            elif self.accelerator.is_main_process:
                self._save_masters(masters_of, partial)
            if self.accelerator.is_main_process:
                for name in (TRAINING_ARGS_NAME, "README.md"):
                    (partial / name).unlink(missing_ok=True)
                self._add_generation_config(partial)

        return self.checkpoint_writer.write_atomically(
            target, write, {"run_id": self.plan.run_id, "step": self.state.global_step}
        )

    def _save_masters(self, checkpoint: Path, target: Path) -> None:
        from deepspeed.utils import zero_to_fp32

        frozen = self.plan.method != "full"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            masters = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint), exclude_frozen_parameters=frozen
            )
        self._save(str(target), state_dict=masters)
        if config := read_json(target / "config.json"):
            write_json(target / "config.json", {**config, "dtype": "float32"})

    def copy_model(self, source: Path, target: Path, copy: Callable[[Path, Path], Any] = shutil.copy2) -> str | None:
        """Copy the model of a complete, verified folder to `target`; None on success, else the reason of the failure.

        Collective: call on every rank. Rank 0 copies, each file with `copy`.
        """
        step = int(checkpoint_format.read_commit_marker(source)["step"])

        def write() -> None:
            if self.accelerator.is_main_process:
                partial = self.checkpoint_writer.folder.saving / target.name
                checkpoint_format.copy_model(source, partial, copy)
                self._add_generation_config(partial)

        return self.checkpoint_writer.write_atomically(target, write, {"run_id": self.plan.run_id, "step": step})

    def _add_generation_config(self, folder: Path) -> None:
        """Write the generation configuration, which has the end-of-turn ids, to saved adapters; peft writes none."""
        if self.plan.method != "full":
            self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)

    def restore_state(self, checkpoint: Path) -> None:
        """Restore the state of a checkpoint's step, without its weights, which `train` or `copy_model` bring."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a saved model into this one, which must not be sharded."""
        self._load_from_checkpoint(str(folder), self.model)

    def create_model_card(self, *_arguments: Any, **_named: Any) -> None:
        """Write no model card, which would have empty headings: the manifest records the run."""


def peak_flops(plan: Plan, device: torch.device) -> float | None:
    """Return dense bf16 peak FLOP/s of this device by the table of GPU types, or of the type that the plan names; None
    on a CPU, in fp32, and for a device that neither knows."""
    if device.type != "cuda" or plan.precision != "bf16":
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu = gpu_types.identify(properties.name, properties.total_memory / 2**20)
    return gpu.peak_flops if gpu else gpu_types.peak_flops(plan.gpu_type)
