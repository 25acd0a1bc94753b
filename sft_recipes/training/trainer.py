"""TRL's SFTTrainer for a plan: effective batches, a validation loss per token, NaN guard, atomic checkpoints."""

import contextlib
import io
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from sft_recipes.config import gpu_types
from sft_recipes.data import tokenizer_files
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.training import lora, parameter_table, patches, rank_heartbeat
from sft_recipes.training.callbacks import graceful_stop
from sft_recipes.training.callbacks.integrity_log import IntegrityCallback
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.writer import CheckpointWriter
from sft_recipes.training.dataset import RETENTION, EffectiveBatchSampler
from sft_recipes.training.integrity import data_order
from sft_recipes.training.nan_guard import NanGuard
from sft_recipes.training.throughput import ThroughputMeter

log = logging.getLogger(__name__)


class RecipeTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over prepared rows.

    Args:
        passes: forward passes of validation per source, in their order (`dataset.split_into_passes`).
        data: `prepared.json`, with the folder of the rows, and the model's dimensions for the FLOP count.

    Attributes:
        folder: the run directory.
        prepared: folder of the prepared rows.
        end_of_turn_ids: token ids that end a completion.
        eval_sums: loss sum and token count of each forward pass of the latest evaluation, by source, each
            [ranks, passes, 2].
    """

    def __init__(self, plan: Plan, passes: dict[str, int], data: dict[str, Any], **arguments: Any):
        self.plan = plan
        self.passes = passes
        self.prepared = Path(data["folder"])
        self.stopping = graceful_stop.GracefulStopCallback()
        self.source_weights = read_json(self.prepared / "details.json").get("source_weights", [])
        rows = arguments["train_dataset"]
        arguments["train_dataset"] = rows.add_column(data_order.ROW, torch.arange(len(rows)).numpy())
        with patches.keep_model_config(arguments["model"].config):
            if not parameter_table.count(arguments["model"]).get("experts"):
                if arguments["args"].router_aux_loss_coef:
                    raise SetupError(f"trainer.router_aux_loss_coef: {plan.model} has no experts. Remove it")
                arguments["args"].router_aux_loss_coef = 0.0  # else TRL goes by the class: some have no experts
            super().__init__(**arguments)
        lora.cast_trainable_to_fp32(self.model, plan)
        patches.apply_to_trainer(plan, self)
        self.remove_callback(PrinterCallback)  # callbacks/console.py prints
        self.end_of_turn_ids: list[int] = []
        self.eval_sums: dict[str, torch.Tensor] = {}
        self._sums_per_pass: list[torch.Tensor] = []
        self.nan_guard = NanGuard(self)
        peak_flops = gpu_types.peak_flops(plan.gpu_type) if plan.uses_gpu and plan.precision == "bf16" else None
        self.meter = ThroughputMeter(plan, data["architecture"], peak_flops, self.args.device)
        self.folder = RunDir(Path(self.args.output_dir))
        self.checkpoint_writer = CheckpointWriter(plan, self.folder, self.accelerator)
        self.supervised_tokens_seen = 0
        self.integrity = IntegrityCallback(plan, data_order.DataOrderCheck(self._get_train_sampler()))
        self.add_callbacks([self.stopping, self.integrity])

    def _get_train_sampler(self, train_dataset: Any = None) -> EffectiveBatchSampler:
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        batch, seed = self.plan.effective_batch_size, self.args.data_seed
        return EffectiveBatchSampler(
            rows, batch, seed, lambda: self.state.global_step // self.plan.steps_per_epoch, self.source_weights
        )

    def add_callbacks(self, callbacks: list[Any]) -> None:
        """Add callbacks and give each this trainer."""
        for callback in callbacks:
            callback.trainer = self
            self.add_callback(callback)

    def end_callbacks(self) -> None:
        """Close what callbacks have open, for a run that did not finish."""
        for callback in self.callback_handler.callbacks:
            getattr(callback, "end", lambda: None)()

    def rows_of_step(self, steps_taken: int) -> list[int]:
        """Return the rows of the step after `steps_taken` steps, in the order of micro-batches and ranks."""
        return self._get_train_sampler().rows_of_step(steps_taken)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any) -> tuple[list[Any], Any]:
        """Get the micro-batches of a step; also count its supervised tokens over all ranks, and record its rows."""
        self.meter.begin_step(int(self.state.num_input_tokens_seen))
        batches, supervised_tokens = super().get_batch_samples(self.meter.time_batches(epoch_iterator), *arguments)
        self.integrity.data_order.record_batches(batches)
        self.supervised_tokens_seen += int(supervised_tokens or 0)
        self.meter.add_batches(batches, int(supervised_tokens or 0))
        return batches, supervised_tokens

    def compute_loss(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """Compute the loss; in training, stop on all ranks if it is not finite."""
        loss = super().compute_loss(model, *arguments, **named)
        if model.training:
            rank_heartbeat.beat(self.state.global_step + 1, "waiting")
            self.nan_guard.check_loss(loss)
            rank_heartbeat.beat(self.state.global_step + 1, "step")
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer, and check that it has every trained parameter."""
        optimizer = super().create_optimizer(model)
        parameter_table.check_optimizer(self.model if model is None else model, optimizer)
        return optimizer

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Any:
        """Get the gradient norm; stop before the optimizer step if it is not finite."""
        norm = super()._get_grad_norm(*arguments, **named)
        self.nan_guard.check_gradients(norm)
        return norm

    def _evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Evaluate; at a stop request, leave the evaluation on all ranks and save at once."""
        took_no_step = self.state.global_step == self.stopping.first_step
        try:
            metrics: dict[str, float] = super()._evaluate(*arguments, **named)
        except graceful_stop.EvaluationStoppedError as error:
            if took_no_step:
                raise graceful_stop.StoppedAtStartError from error
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # else the Trainer evaluates at the epoch's end, and saves again
            return {}
        if self.control.should_training_stop and took_no_step:
            raise graceful_stop.StoppedAtStartError
        return metrics

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Make TRL's prediction step; also record the sum of the losses and the number of supervised tokens.

        Raises:
            EvaluationStoppedError: on all ranks, if one got a stop request and the run has steps left.
        """
        if self.stopping.stop_requested():
            raise graceful_stop.EvaluationStoppedError
        balances, self.aux_loss_enabled = self.aux_loss_enabled, False  # the loss of the tokens only
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.aux_loss_enabled = balances
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        self._sums_per_pass.append(torch.stack([loss.double() * tokens, tokens.double()]))
        return loss, logits, labels

    def evaluation_loop(self, *arguments: Any, **named: Any) -> EvalLoopOutput:
        """Evaluate with `eval_loss` as sum of losses over sum of supervised tokens, and `eval_SOURCE_loss` per source
        if the data has several.

        The Trainer's is a mean of batch means, which changes with the batch and the number of ranks
        (https://github.com/huggingface/transformers/issues/39241).
        """
        self._sums_per_pass = []
        # A loader draws a random number when it begins: an evaluation repeated after a resume must draw none.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*arguments, **named)
        gathered = self.accelerator.gather(torch.stack(self._sums_per_pass)[None]).cpu()
        self.eval_sums = dict(zip(self.passes, gathered.split(list(self.passes.values()), 1), strict=True))
        prefix = named.get("metric_key_prefix", "eval")
        trained = [source for source in self.passes if source != RETENTION]
        for source, sums in self.eval_sums.items():
            if source == RETENTION or len(trained) > 1:
                output.metrics[f"{prefix}_{source}_loss"] = mean_loss(sums)
        output.metrics[f"{prefix}_loss"] = mean_loss(torch.cat([self.eval_sums[source] for source in trained], 1))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and this trainer's, with the SFT guide's sign of overfitting.

        `num_tokens` is the Trainer's count: TRL's takes a batch for one row, and restarts from 0 at a resume.
        """
        for metrics in self._metrics.values():
            metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        if "loss" in logs:
            logs.update(self.meter.read(self.accelerator, int(self.state.num_input_tokens_seen)))
        train_losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        if "eval_loss" in logs and train_losses:  # the Trainer never logs both in one record
            gap = logs["train_eval_gap"] = logs["eval_loss"] - train_losses[-1]
            logs["overfitting_signal"] = float(gap > self.plan.sections.monitor.overfitting_gap)
        logs["supervised_tokens_seen"] = self.supervised_tokens_seen
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        """Return where the Trainer writes `checkpoint-N`, before it is moved into the run's folder."""
        return str(self.folder.saving)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint atomically, even if the disk refuses a file on one rank."""
        step, writer = self.state.global_step, self.checkpoint_writer
        checked = self.integrity.check_before_save()
        record = {"supervised_tokens_seen": self.supervised_tokens_seen, "integrity": checked}

        def write() -> None:
            with patches.collect_errors_of_torch_save(writer.collect_write_errors):
                super(RecipeTrainer, self)._save_checkpoint(model, trial)
            if self.is_deepspeed_enabled and self.accelerator.is_main_process:
                latest = self.folder.saving / f"checkpoint-{step}" / "latest"
                latest.write_text(f"global_step{step}", encoding="ascii")

        if refused := writer.save_checkpoint(step, write, record):
            retry = f"next attempt at step {writer.retry_at_step}"
            log.warning("step %d: checkpoint-%d was not saved: %s; %s", step, step, refused, retry)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model, its tokenizer and its generation configuration, which has the end-of-turn ids; without the
        Trainer's pickled arguments, which nothing here loads, and peft's model card with empty headings."""
        folder = Path(str(output_dir))
        with self.checkpoint_writer.collect_write_errors():
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                for name in (TRAINING_ARGS_NAME, "README.md"):
                    (folder / name).unlink(missing_ok=True)
                tokenizer_files.copy_files(self.prepared / tokenizer_files.FOLDER, folder)
                self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)

    def check_first_save(self) -> None:
        """Try before the first step to save what a model's folder has in addition to the weights.

        Raises:
            SetupError: a library rejects values that it saves.
        """
        model = self.accelerator.unwrap_model(self.model)
        with tempfile.TemporaryDirectory() as folder:
            try:
                model.save_pretrained(folder, state_dict={})
                model.generation_config.save_pretrained(folder)
            except ValueError as error:
                reason = " ".join(str(error).split())[:200]
                raise SetupError(f"{self.plan.model}: the first save would fail: {reason}. Correct it") from error

    def save_weights(self, target: Path, masters_of: Path | None = None) -> str | None:
        """Save the model and its tokenizer atomically to `target`; None on success, else the reason of the failure.

        Collective: call on every rank.

        Args:
            masters_of: save the fp32 master weights in this DeepSpeed checkpoint instead of the 16-bit weights.
        """
        partial = self.folder.saving / target.name

        def write() -> None:
            if masters_of is None:
                self.save_model(str(partial), _internal_call=True)
            elif self.accelerator.is_main_process:
                self._save_masters(masters_of, partial)

        record = {"run_id": self.plan.run_id, "step": self.state.global_step}
        return self.checkpoint_writer.write_atomically(target, write, record)

    def _save_masters(self, checkpoint: Path, target: Path) -> None:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read_masters

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            masters = read_masters(str(checkpoint), exclude_frozen_parameters=self.plan.method != "full")
        self._save(str(target), state_dict=masters)
        if config := read_json(target / "config.json"):
            write_json(target / "config.json", {**config, "dtype": "float32"})

    def copy_model(self, source: Path, target: Path, copy: Callable[[Path, Path], Any] = shutil.copy2) -> str | None:
        """Copy the model of a complete, verified folder to `target`; None on success, else the reason of the failure.

        Collective: call on every rank. Rank 0 copies, each file with `copy`.
        """
        partial = self.folder.saving / target.name
        record = {"run_id": self.plan.run_id, "step": int(checkpoint_format.read_commit_marker(source)["step"])}

        def write() -> None:
            if self.accelerator.is_main_process:
                checkpoint_format.copy_model(source, partial, copy)

        return self.checkpoint_writer.write_atomically(target, write, record)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a saved model into this one, which must not be sharded."""
        self._load_from_checkpoint(str(folder), self.model)

    def create_model_card(self, *_arguments: Any, **_named: Any) -> None:
        """Write no model card, which would have empty headings: the manifest records the run."""


def mean_loss(sums: torch.Tensor) -> float:
    """Return the loss per token of passes on all ranks, [ranks, passes, 2]: sum of losses and number of tokens."""
    total, tokens = sums.sum((0, 1)).tolist()
    return float(total / max(tokens, 1))
