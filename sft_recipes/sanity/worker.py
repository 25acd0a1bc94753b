"""The main program of every rank of the sanity check: trains a plan for a few steps on a copy, and judges each part.

Started by `accelerate launch … -m sft_recipes.sanity.worker PLAN` in a folder of its own, never by hand. Rank 0
writes `verdict.json`. The checkpoint is reloaded by processes of their own (`sanity_reload.py`): two trainers do not
fit into the memory that one was planned for, and a trainer is not freed by dropping references to it, since the
Trainer's callback handler and DeepSpeed keep its tensors.
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

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import EXIT_STOPPED, RunDir, read_json, write_json
from sft_recipes.sanity import checks as judging
from sft_recipes.sanity import trial
from sft_recipes.sanity.checks import MEMORY, Check
from sft_recipes.training import main, out_of_memory, rank_heartbeat

# Rows of the trial that are evaluated before and after: enough passes to tell their fall from its noise.
_EVALUATED_ROWS, _EVALUATED_PASSES = 24, 8
_HELD_OUT_ROWS = 8
_PROMPTS, _NEW_TOKENS = 3, 48


Result = tuple[list[Check], dict[str, Any]]  # the checks, and what was measured


@dataclasses.dataclass(frozen=True)
class TrialState:
    """What the trial leaves for the processes that reload its checkpoint, in `trial.json`.

    Attributes:
        losses: of each step.
        ends_of_turn: ids of the tokens that end an answer.
        better_than_chance: whether the model was, before the first step.
    """

    losses: list[float]
    ends_of_turn: list[int]
    better_than_chance: bool


class StopRequestedError(Exception):
    """A rank was asked to stop, and all of them agreed: there is no verdict on a trial that was cut short."""


class RankAloneError(Exception):
    """Something failed on this rank, perhaps on no other: they wait for it, so the trial ends with this verdict."""

    def __init__(self, checks: list[Check]):
        super().__init__(checks[-1].said)
        self.checks = checks


def execute(plan_file: str, check: Callable[[Plan, RunDir], Result]) -> None:
    """Run one part of the sanity check on this rank and write its result; exit with 0 wherever there is one, or the
    user's input was wrong."""
    plan, folder, rank = main.begin(plan_file)
    with rank_heartbeat.until_it_ends():
        try:
            checks, figures = check(plan, folder)
        except StopRequestedError:
            if rank == 0:
                write_json(folder.outcome, {"exit_code": EXIT_STOPPED})
            return
        except UserError as error:
            if rank == 0:
                write_json(folder.outcome, {"exit_code": 2, "error": str(error)})
            raise
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.ran_out(error):
                raise
            _write(folder, [Check(MEMORY, False, out_of_memory.what_ran_out(plan, rank, error))], {})
            sys.exit(1)  # the other ranks wait in a collective: the parent ends them
        except RankAloneError as error:
            _write(folder, error.checks, {})
            sys.exit(1)
        if rank == 0:
            _write(folder, checks, figures)


def _write(folder: RunDir, checks: Sequence[Check], figures: dict[str, Any]) -> None:
    write_json(folder.verdict, {"checks": [dataclasses.asdict(c) for c in checks], "figures": figures})


def carry_out(plan: Plan, folder: RunDir) -> Result:
    """The verdict on each part, and what was measured. All ranks take part; rank 0's is the one that counts.

    Raises:
        UserError: what a run would refuse as well.
        StopRequestedError: a signal cut the trial's training short.
    """
    from sft_recipes.training.nan_guard import DivergedError

    arguments = main.configure(plan, folder)
    found = _copy(plan, folder, arguments.distributed_state)
    parts = main.build(plan, folder, arguments, found)
    sft, record, vocabulary = parts.trainer, recorder(), _vocabulary_size(parts.trainer)
    sft.add_callbacks([record])
    checks = [judging.rows_are_right(sft, parts.ends_of_turn)]
    if not checks[0].passed:
        return checks, {}
    arguments.eval_on_start = True
    try:
        train(sft)
    except DivergedError as error:
        way_out = f"look at {', '.join(error.what.rows) or 'the rows'}, or lower trainer.learning_rate"
        return [*checks, Check("numbers", False, f"step {error.what.step}: {error}", way_out)], {}
    checks += [
        judging.first_loss_is_plausible(plan, record, vocabulary),
        judging.loss_falls(plan, record),
        Check("numbers", True, "no NaN or Inf in losses and gradients"),
        judging.gradients_are_in_range(plan, record),
        judging.memory_is_enough(plan, sft),
        judging.evaluation_is_a_number(
            record, read_json(Path(found["folder"]) / "details.json")["validation_rows"]["held_out"]
        ),
    ]
    figures = {
        "step_seconds": statistics.median(record.step_seconds[trial.WARMUP_STEPS :]),
        "tokens_per_second": statistics.median(record.tokens_per_second[trial.WARMUP_STEPS :]),
        "accumulation": plan.gradient_accumulation_steps,
        "evaluation_seconds_a_row": record.evaluation_seconds / max(record.evaluation_rows, 1),
        "validation_rows": _rows_of_an_evaluation(read_json(Path(found["original"]) / "details.json")),
        "save_seconds": record.save_seconds,
        "save_bytes": sft.checkpoint_writer.expected_bytes if record.save_seconds else None,
    }
    better_than_chance = judging.knows_more_than_chance(judging.mean_loss(record.rows[0]), vocabulary)
    state = TrialState(record.losses, parts.ends_of_turn, better_than_chance)
    if sft.accelerator.is_main_process:
        write_json(folder.trial, dataclasses.asdict(state))
        if not plan.shards_parameters:
            model = sft.accelerator.unwrap_model(sft.model)
            with sft.compute_loss_context_manager():  # fp32 weights compute in bf16, as they do in training
                checks.append(answers_are_text(plan, prepared_copy(folder), model, sft.processing_class, state))
    return [*checks, *_left_out(plan)], figures


def _left_out(plan: Plan) -> list[Check]:
    """Checks that need a saved model, where saving one takes too long."""
    if trial.resumes(plan):
        return []
    answers = f"left out: under {plan.parallelism} they need a saved model, above 13B minutes"
    checkpoint = "left out: above 13B parameters saving and loading take minutes by themselves"
    return [
        *([Check("answers", None, answers)] if plan.shards_parameters else []),
        Check("checkpoint", None, checkpoint),
    ]


def train(trainer: Any, checkpoint: Path | None = None) -> None:
    """Train to the trial's last step.

    Raises:
        StopRequestedError: a signal cut it short.
    """
    from sft_recipes.training.callbacks.graceful_stop import StoppedAtStartError

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except StoppedAtStartError as error:
        raise StopRequestedError from error
    if trainer.stopping.stopped:
        raise StopRequestedError


def _rows_of_an_evaluation(details: dict[str, Any]) -> int:
    return int(sum(details["validation_rows"].values()) + details.get("retention_eval_rows", 0))


def prepared_copy(folder: RunDir) -> Path:
    """Where the trial's copy of the prepared rows lies."""
    return folder.path / "prepared"


def _copy(plan: Plan, folder: RunDir, state: Any) -> dict[str, Any]:
    """A prepared folder of the trial's rows: the longest, others by chance, cycled to whole effective batches. Rows to
    validate on are the same, and a few that are held out."""
    from datasets import concatenate_datasets, load_from_disk

    found = read_json(folder.prepared)
    prepared, copy = Path(found["folder"]), prepared_copy(folder)
    with state.main_process_first():
        if state.is_main_process:
            train, validation = (load_from_disk(str(prepared / part)) for part in ("train", "validation"))
            chosen = choose(_lengths(train), plan.rows or 0)
            rows = train.select(chosen)
            passes = _EVALUATED_PASSES * plan.per_device_train_batch_size * plan.world_size
            evaluated = rows.select(range(min(len(rows), max(_EVALUATED_ROWS, passes))))
            held_out = validation.select(range(min(_HELD_OUT_ROWS, len(validation))))
            rows.save_to_disk(str(copy / "train"))
            concatenate_datasets([evaluated, held_out]).save_to_disk(str(copy / "validation"))
            details = {**read_json(prepared / "details.json"), "retention_eval_rows": 0}
            details["validation_rows"] = {"rows": len(evaluated), "held_out": len(held_out)}
            write_json(copy / "details.json", details)
            shutil.copy(prepared / "prompts.jsonl", copy)
    return {**found, "folder": str(copy), "original": str(prepared)}


def _lengths(rows: Any) -> list[int]:
    """Tokens of each row, from the file's own offsets: the tokens of a large data set are not brought into memory."""
    chunks = rows.data.column("input_ids").chunks
    return [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]


def choose(lengths: Sequence[int], many: int) -> list[int]:
    """Which rows: the longest, then some evenly over all; the same ones again where there are fewer than `many`."""
    by_length = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest = by_length[: trial.LONGEST]
    others = sorted(by_length[trial.LONGEST :])
    wanted = max(min(many, trial.ROWS) - len(longest), 0)
    step = max(len(others) / wanted, 1.0) if wanted else 1.0
    spread = [others[int(number * step)] for number in range(wanted) if int(number * step) < len(others)]
    once = [*longest, *spread][: min(many, len(lengths))]
    return [once[number % len(once)] for number in range(many)]


def recorder() -> Any:
    """A callback that remembers the trial's losses, norms and times."""
    from transformers import TrainerCallback

    class Record(TrainerCallback):  # type: ignore[misc]
        """Of each step and each evaluation, in their order."""

        def __init__(self) -> None:
            self.trainer: Any = None
            self.losses: list[float] = []
            self.norms: list[float] = []
            self.step_seconds: list[float] = []
            self.tokens_per_second: list[float] = []
            self.evaluated: list[float] = []
            self.rows: list[Any] = []  # of each evaluation: loss and tokens of each pass on each rank
            self.evaluation_rows = 0
            self.evaluation_seconds = 0.0
            self.save_seconds: float | None = None
            self._stepped = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.trainer.meter.step_ends()
            self._stepped = time.perf_counter()
            control.should_save = state.global_step == trial.SAVED_AT and trial.resumes(self.trainer.plan)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self.norms.append(logs["grad_norm"])
                self.step_seconds.append(logs["step_seconds"])
                self.tokens_per_second.append(logs["tokens_per_second"])

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            self.evaluated.append(metrics["eval_held_out_loss"])
            self.rows.append(self.trainer.evaluated_passes("rows"))
            self.evaluation_rows = len(self.trainer.eval_dataset)
            self.evaluation_seconds = metrics["eval_runtime"]

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.save_seconds = time.perf_counter() - self._stepped

    return Record()


def _vocabulary_size(sft: Any) -> int:
    return int(sft.model.config.get_text_config().vocab_size)


def answers_are_text(plan: Plan, prepared: Path, model: Any, tokenizer: Any, state: TrialState) -> Check:
    """Greedy answers to held-out prompts."""
    from sft_recipes.training import completions

    prompts = completions.read_prompts(prepared, _PROMPTS, 0)
    if not prompts:
        return Check("answers", None, "left out: no held-out prompts")
    most = min(plan.sections.generation.max_new_tokens, _NEW_TOKENS)
    texts = completions.answer(model, tokenizer, prompts, 0, most, state.ends_of_turn).said
    shown = " | ".join(completions.short(text, 40) or "(nothing)" for text in texts)
    if not state.better_than_chance:
        return Check("answers", None, f"not judged, the weights began with no more than chance: {shown}")
    reasons = [reason for text in texts if (reason := judging.garbled(text))]
    if len(reasons) * 2 <= len(texts):
        return Check("answers", True, shown)
    way_out = "lower trainer.learning_rate; is model.chat_template the model's own?"
    return Check("answers", False, f"{reasons[0]}: {shown}", way_out)


if __name__ == "__main__":
    execute(sys.argv[1], carry_out)
    main.leave()
