"""Main program of every rank of the trial: trains a plan for a few steps on a copy, and runs the checks.

Started by `accelerate launch … -m sft_recipes.sanity.worker PLAN` in its own directory, never by hand. Rank 0 writes
`result.json`. Other processes reload the checkpoint (`reload_worker.py`): two trainers do not fit into the memory
planned for one, and dropping all references to a trainer does not free it, since the Trainer's callback handler and
DeepSpeed keep its tensors.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.data import tokenizer_files
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import EXIT_STOPPED, EXIT_USER, RunDir, read_json, write_json
from sft_recipes.sanity import checks, trial
from sft_recipes.sanity.checks import MEMORY, Check
from sft_recipes.training import main, out_of_memory, rank_heartbeat

# Training rows that are evaluated before and after: enough passes to separate the fall of the loss from noise.
_EVAL_ROWS, _EVAL_PASSES = 24, 8
_HELD_OUT_ROWS = 8
_PROMPTS, _MAX_NEW_TOKENS = 3, 48


Result = tuple[list[Check], dict[str, Any]]  # checks, and measurements


@dataclasses.dataclass(frozen=True)
class TrialState:
    """State that the trial leaves for the processes that reload its checkpoint, in `trial.json`.

    Attributes:
        losses: of each step.
        better_than_chance: whether the model was, before the first step.
    """

    losses: list[float]
    end_of_turn_ids: list[int]
    better_than_chance: bool


class StopRequestedError(Exception):
    """All ranks agreed to stop: an interrupted trial has no result."""


class RankAloneError(Exception):
    """A check failed on this rank, perhaps on no other: the others wait for it, so the trial ends with these checks."""

    def __init__(self, checks: list[Check]):
        super().__init__(checks[-1].detail)
        self.checks = checks


def execute(plan_file: str, run_checks: Callable[[Plan, RunDir], Result]) -> None:
    """Run one part of the sanity check on this rank and write its result; exit with 0 if there is one, or at a user
    error."""
    plan, run_dir, rank = main.begin(plan_file)
    with rank_heartbeat.record_exit():
        try:
            results, measured = run_checks(plan, run_dir)
        except StopRequestedError:
            if rank == 0:
                write_json(run_dir.outcome, {"exit_code": EXIT_STOPPED})
            return
        except UserError as error:
            if rank == 0:
                write_json(run_dir.outcome, {"exit_code": EXIT_USER, "error": str(error)})
            raise
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            _write_result(run_dir, [Check(MEMORY, False, out_of_memory.describe(plan, rank, error))], {})
            sys.exit(1)  # the other ranks wait in a collective: the launcher terminates them
        except RankAloneError as error:
            _write_result(run_dir, error.checks, {})
            sys.exit(1)
        if rank == 0:
            _write_result(run_dir, results, measured)


def _write_result(run_dir: RunDir, results: Sequence[Check], measured: dict[str, Any]) -> None:
    write_json(run_dir.result, {"checks": [dataclasses.asdict(check) for check in results], "measured": measured})


def run_trial(plan: Plan, run_dir: RunDir) -> Result:
    """Train the trial and run its checks. Collective: call on every rank; rank 0's result counts.

    Raises:
        UserError: a run would fail with it too.
        StopRequestedError: a signal interrupted the steps.
    """
    from sft_recipes.training.nan_guard import DivergedError

    arguments = main.configure(plan, run_dir)
    prepared = _copy_rows(plan, run_dir, arguments.distributed_state)
    parts = main.build(plan, run_dir, arguments, prepared)
    trainer, record = parts.trainer, recorder()
    vocabulary_size = int(trainer.model.config.get_text_config().vocab_size)
    trainer.add_callbacks([record])
    results = [checks.check_loss_mask(trainer, parts.end_of_turn_ids)]
    if not results[0].passed:
        return results, {}
    arguments.eval_on_start = True
    try:
        train(trainer)
    except DivergedError as error:
        fix = f"check {', '.join(error.rows) or 'the rows'}, or lower trainer.learning_rate"
        return [*results, Check("finite values", False, f"step {error.step}: {error}", fix)], {}
    results += [
        checks.check_initial_loss(plan, record, vocabulary_size),
        checks.check_loss_falls(plan, record),
        Check("finite values", True, "no NaN or Inf in losses and gradients"),
        checks.check_gradient_norm(plan, record),
        checks.check_memory(plan, trainer),
        checks.check_evaluation(
            record, read_json(Path(prepared["folder"]) / "details.json")["validation_rows"]["held_out"]
        ),
    ]
    measured = {
        "step_seconds": statistics.median(record.step_seconds[trial.WARMUP_STEPS :]),
        "tokens_per_second": statistics.median(record.tokens_per_second[trial.WARMUP_STEPS :]),
        "accumulation": plan.gradient_accumulation_steps,
        "eval_seconds_per_row": record.eval_seconds / max(record.eval_rows, 1),
        "eval_rows": _count_eval_rows(read_json(Path(prepared["original"]) / "details.json")),
        "save_seconds": record.save_seconds,
        "save_bytes": trainer.checkpoint_writer.expected_bytes if record.save_seconds else None,
    }
    better_than_chance = checks.is_better_than_chance(checks.mean_loss(record.losses_per_pass[0]), vocabulary_size)
    state = TrialState(record.losses, parts.end_of_turn_ids, better_than_chance)
    if trainer.accelerator.is_main_process:
        write_json(run_dir.trial, dataclasses.asdict(state))
        if not plan.shards_parameters:
            model = trainer.accelerator.unwrap_model(trainer.model)
            with trainer.compute_loss_context_manager():  # fp32 weights compute in bf16, as in training
                results.append(check_completions(plan, copied_rows(run_dir), model, trainer.processing_class, state))
    return [*results, *_skipped_checks(plan)], measured


def _skipped_checks(plan: Plan) -> list[Check]:
    """Checks that need a saved model, if saving one takes too long."""
    if trial.checks_resume(plan):
        return []
    completions = f"under {plan.parallelism} it needs a saved model, which takes minutes above 13B parameters"
    checkpoint = "above 13B parameters saving and loading take minutes"
    return [
        *([Check("completions", None, completions)] if plan.shards_parameters else []),
        Check("checkpoint", None, checkpoint),
    ]


def train(trainer: Any, checkpoint: Path | None = None) -> None:
    """Train to the last step of the trial.

    Raises:
        StopRequestedError: a signal interrupted the steps.
    """
    from sft_recipes.training.callbacks.graceful_stop import StoppedAtStartError

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except StoppedAtStartError as error:
        raise StopRequestedError from error
    if trainer.stopping.stopped:
        raise StopRequestedError


def _count_eval_rows(details: dict[str, Any]) -> int:
    return int(sum(details["validation_rows"].values()) + details.get("retention_eval_rows", 0))


def copied_rows(run_dir: RunDir) -> Path:
    """Directory of the trial's copy of the prepared rows."""
    return run_dir.path / "prepared"


def _copy_rows(plan: Plan, run_dir: RunDir, state: Any) -> dict[str, Any]:
    """Copy the trial's rows: the longest and a sample of the others, cycled to complete effective batches. The
    validation rows are some of these and a few held-out ones."""
    from datasets import concatenate_datasets, load_from_disk

    prepared = read_json(run_dir.prepared)
    original, copy = Path(prepared["folder"]), copied_rows(run_dir)
    with state.main_process_first():
        if state.is_main_process:
            train, validation = (load_from_disk(str(original / part)) for part in ("train", "validation"))
            rows = train.select(select_rows(_lengths(train), plan.rows or 0))
            passes = _EVAL_PASSES * plan.per_device_train_batch_size * plan.world_size
            evaluated = rows.select(range(min(len(rows), max(_EVAL_ROWS, passes))))
            held_out = validation.select(range(min(_HELD_OUT_ROWS, len(validation))))
            rows.save_to_disk(str(copy / "train"))
            concatenate_datasets([evaluated, held_out]).save_to_disk(str(copy / "validation"))
            details = {**read_json(original / "details.json"), "retention_eval_rows": 0, "source_weights": []}
            details["validation_rows"] = {"rows": len(evaluated), "held_out": len(held_out)}
            write_json(copy / "details.json", details)
            shutil.copy(original / "prompts.jsonl", copy)
            shutil.copytree(original / tokenizer_files.FOLDER, copy / tokenizer_files.FOLDER)
    return {**prepared, "folder": str(copy), "original": str(original)}


def _lengths(rows: Any) -> list[int]:
    """Tokens per row, from the offsets in the file: the tokens of a large dataset are not loaded into memory."""
    chunks = rows.data.column("input_ids").chunks
    return [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]


def select_rows(lengths: Sequence[int], count: int) -> list[int]:
    """Select the longest rows, then others evenly spaced; repeat them if there are fewer than `count`."""
    by_length = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest = by_length[: trial.LONGEST]
    others = sorted(by_length[trial.LONGEST :])
    n_others = max(min(count, trial.ROWS) - len(longest), 0)
    stride = max(len(others) / n_others, 1.0) if n_others else 1.0
    spread = [others[int(index * stride)] for index in range(n_others) if int(index * stride) < len(others)]
    selected = [*longest, *spread][: min(count, len(lengths))]
    return [selected[index % len(selected)] for index in range(count)]


def recorder() -> Any:
    """Return a callback that records the trial's losses, gradient norms and times."""
    from transformers import TrainerCallback

    class Record(TrainerCallback):  # type: ignore[misc]
        """Values of each step and each evaluation, in order."""

        def __init__(self) -> None:
            self.trainer: Any = None
            self.losses: list[float] = []
            self.grad_norms: list[float] = []
            self.step_seconds: list[float] = []
            self.tokens_per_second: list[float] = []
            self.eval_losses: list[float] = []
            self.losses_per_pass: list[Any] = []  # per evaluation: [ranks, passes, 2], sum of losses and tokens
            self.eval_rows = 0
            self.eval_seconds = 0.0
            self.save_seconds: float | None = None
            self._step_end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.trainer.meter.end_step()
            self._step_end = time.perf_counter()
            control.should_save = state.global_step == trial.SAVED_AT and trial.checks_resume(self.trainer.plan)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self.grad_norms.append(logs["grad_norm"])
                self.step_seconds.append(logs["step_seconds"])
                self.tokens_per_second.append(logs["tokens_per_second"])

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            self.eval_losses.append(metrics["eval_held_out_loss"])
            self.losses_per_pass.append(self.trainer.evaluated_passes("rows"))
            self.eval_rows = len(self.trainer.eval_dataset)
            self.eval_seconds = metrics["eval_runtime"]

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.save_seconds = time.perf_counter() - self._step_end

    return Record()


def check_completions(plan: Plan, prepared: Path, model: Any, tokenizer: Any, state: TrialState) -> Check:
    """Check greedy completions of held-out prompts."""
    from sft_recipes.training import completions

    prompts = completions.read_prompts(prepared, _PROMPTS)
    if not prompts:
        return Check("completions", None, "no held-out prompts")
    max_new_tokens = min(plan.sections.generation.max_new_tokens, _MAX_NEW_TOKENS)
    texts = completions.complete_prompts(model, tokenizer, prompts, max_new_tokens, state.end_of_turn_ids)
    excerpts = " | ".join(completions.excerpt(text, 40) or "(empty)" for text in texts)
    if not state.better_than_chance:
        return Check("completions", None, f"the initial weights were no better than chance: {excerpts}")
    reasons = [reason for text in texts if (reason := checks.find_garbled(text))]
    if len(reasons) * 2 <= len(texts):
        return Check("completions", True, excerpts)
    fix = "lower trainer.learning_rate, or check that model.chat_template is the model's own"
    return Check("completions", False, f"{reasons[0]}: {excerpts}", fix)


if __name__ == "__main__":
    execute(sys.argv[1], run_trial)
    main.exit_process()
