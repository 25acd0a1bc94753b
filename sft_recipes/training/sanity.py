"""The main program of every rank of the sanity gate: a short trial of a plan on a copy, and a verdict on each part.

Started by `accelerate launch … -m sft_recipes.training.sanity PLAN` in a folder of its own, never by hand. Rank 0
writes `verdict.json`.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_recipes.planning import trial
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.run_folder import EXIT_STOPPED, RunFolder, read_json, write_json
from sft_recipes.planning.schema import RecipeError
from sft_recipes.training import checks as judging
from sft_recipes.training import memory, pulse, run
from sft_recipes.training.checks import MEMORY, Check
from sft_recipes.training.resume import LostError

# Rows of the trial that are evaluated before and after: enough passes to tell their fall from its noise.
_EVALUATED_ROWS, _EVALUATED_PASSES = 24, 8
_HELD_OUT_ROWS = 8
_PROMPTS, _NEW_TOKENS = 3, 48


class DoesNotLoadError(Exception):
    """What the trial saved cannot be loaded."""

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        way_out = "is the disk of RUNS_DIR full or read-only? a run could not be resumed on this machine"
        self.check = Check(name, False, reason, way_out)


class AskedToStopError(Exception):
    """A rank was asked to stop, and all of them agreed: there is no verdict on a trial that was cut short."""


class RankAloneError(Exception):
    """Something failed on this rank, perhaps on no other: they wait for it, so the trial ends with this verdict."""

    def __init__(self, checks: list[Check]):
        super().__init__(checks[-1].said)
        self.checks = checks


def main(plan_file: str) -> None:
    """Carries the trial out; leaves with 0 wherever there is a verdict, or the user's input was wrong."""
    plan, folder, rank = run.begin(plan_file)
    with pulse.until_it_ends():
        try:
            checks, figures = carry_out(plan, folder)
        except AskedToStopError:
            if rank == 0:
                write_json(folder.outcome, {"exit_code": EXIT_STOPPED})
            return
        except RecipeError as error:
            if rank == 0:
                write_json(folder.outcome, {"exit_code": 2, "error": str(error)})
            raise
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            _write(folder, [Check(MEMORY, False, memory.what_ran_out(plan, rank, error))], {})
            sys.exit(1)  # the other ranks wait in a collective: the parent ends them
        except RankAloneError as error:
            _write(folder, error.checks, {})
            sys.exit(1)
        if rank == 0:
            _write(folder, checks, figures)


def _write(folder: RunFolder, checks: Sequence[Check], figures: dict[str, Any]) -> None:
    write_json(folder.verdict, {"checks": [dataclasses.asdict(c) for c in checks], "figures": figures})


def carry_out(plan: Plan, folder: RunFolder) -> tuple[list[Check], dict[str, Any]]:
    """The verdict on each part, and what was measured. All ranks take part; rank 0's is the one that counts.

    Raises:
        RecipeError: what a run would refuse as well.
        AskedToStopError: a signal cut the trial's training short.
    """
    from sft_recipes.training.divergence import DivergedError

    arguments = run.configure(plan, folder)
    found = _copy(plan, folder, arguments.distributed_state)
    parts = run.build(plan, folder, arguments, found)
    sft, record = parts.trainer, recorder()
    sft.add_callbacks([record])
    checks = [judging.rows_are_right(sft, parts.ends_of_turn)]
    if not checks[0].passed:
        return checks, {}
    arguments.eval_on_start = True
    try:
        _train(sft)
    except DivergedError as error:
        way_out = f"look at {', '.join(error.what.rows) or 'the rows'}, or lower trainer.learning_rate"
        return [*checks, Check("numbers", False, f"step {error.what.step}: {error}", way_out)], {}
    checks += [
        judging.first_loss_is_plausible(plan, record, _vocabulary_size(sft)),
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
        "save_bytes": sft.saving.bytes_at_most if record.save_seconds else None,
    }
    sharded = plan.no_rank_holds_the_model
    knows = judging.knows_more_than_chance(judging.mean_loss(record.rows[0]), _vocabulary_size(sft))
    whole = None if sharded else sft.accelerator.unwrap_model(sft.model)
    answered = None if sharded else answers_are_text(plan, parts, found, whole, knows)
    del whole
    _free(sft)  # the model that answers under ZeRO-3, and the trainer that goes on, have room then
    for check in (
        lambda: answered or saved_answers_are_text(plan, folder, parts, found, knows),
        lambda: a_checkpoint_loads(plan, folder, found, record),
    ):
        try:
            checks.append(check())
        except DoesNotLoadError as error:
            raise RankAloneError([*checks, error.check]) from error
    return checks, figures


def _train(trainer: Any, checkpoint: Path | None = None) -> None:
    """Trains to the trial's end.

    Raises:
        AskedToStopError: a signal cut it short.
    """
    from sft_recipes.training.callbacks.stop import EndedAtStartError

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except EndedAtStartError as error:
        raise AskedToStopError from error
    if trainer.stopping.stopped:
        raise AskedToStopError


def _rows_of_an_evaluation(details: dict[str, Any]) -> int:
    return int(sum(details["validation_rows"].values()) + details.get("retain_rows", 0))


def _copy(plan: Plan, folder: RunFolder, state: Any) -> dict[str, Any]:
    """A prepared folder of the trial's rows: the longest, others by chance, cycled to whole effective batches. Rows to
    validate on are the same, and a few that are held out."""
    from datasets import concatenate_datasets, load_from_disk

    found = read_json(folder.prepared)
    prepared, copy = Path(found["folder"]), folder.path / "prepared"
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
            details = {**read_json(prepared / "details.json"), "retain_rows": 0}
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


def saved_answers_are_text(plan: Plan, folder: RunFolder, parts: Any, found: dict[str, Any], knows: bool) -> Check:
    """Of the model that was saved, where no rank holds the one that was trained."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if not trial.resumes(plan):
        return Check("answers", None, f"left out: under {plan.parallelism} they need a saved model, above 13B minutes")
    if not parts.trainer.accelerator.is_main_process:
        return Check("answers", None, "rank 0 answers")
    unset_hf_deepspeed_config()  # else transformers would spread this model over the ranks as well
    try:
        model = run.load_model(plan, str(folder.checkpoint(trial.SAVED_AT)))
    except RecipeError as error:
        raise DoesNotLoadError("answers", str(error)) from error
    return answers_are_text(plan, parts, found, model.to(parts.trainer.args.device), knows)


def answers_are_text(plan: Plan, parts: Any, found: dict[str, Any], model: Any, knows: bool) -> Check:
    """Greedy answers to held-out prompts, on rank 0; `knows` says whether the model began with more than chance."""
    from sft_recipes.training import answers

    if not parts.trainer.accelerator.is_main_process:
        return Check("answers", None, "rank 0 answers")
    prompts = answers.read_prompts(Path(found["folder"]), _PROMPTS, 0)
    if not prompts:
        return Check("answers", None, "left out: no held-out prompts")
    most = min(plan.sections["answers"]["max_new_tokens"], _NEW_TOKENS)
    with parts.trainer.compute_loss_context_manager():  # fp32 weights compute in bf16, as they do in training
        texts = answers.answer(model, parts.trainer.processing_class, prompts, 0, most, parts.ends_of_turn).said
    shown = " | ".join(answers.short(text, 40) or "(nothing)" for text in texts)
    if not knows:
        return Check("answers", None, f"not judged, the weights began with no more than chance: {shown}")
    reasons = [reason for text in texts if (reason := judging.garbled(text))]
    if len(reasons) * 2 <= len(texts):
        return Check("answers", True, shown)
    way_out = "lower trainer.learning_rate; is model.chat_template the model's own?"
    return Check("answers", False, f"{reasons[0]}: {shown}", way_out)


def a_checkpoint_loads(plan: Plan, folder: RunFolder, found: dict[str, Any], record: Any) -> Check:
    """A trainer of its own goes on from the trial's checkpoint, and its steps must repeat the losses."""
    from sft_recipes.training import resume

    if not trial.resumes(plan):
        return Check("checkpoint", None, "left out: above 13B parameters saving and loading take minutes by themselves")
    try:
        point = resume.newest(plan, folder, record.trainer.accelerator, print)
    except LostError as error:
        raise DoesNotLoadError("checkpoint", str(error)) from error
    if point is None:
        raise DoesNotLoadError("checkpoint", f"no whole checkpoint was written to {folder.path}")
    whole = point.path
    again = recorder()
    try:
        arguments = run.configure(plan, folder)
        arguments.eval_strategy = "no"
        parts = run.build(plan, folder, arguments, found)
        parts.trainer.add_callbacks([again])
        _train(parts.trainer, whole)
    except AskedToStopError:
        raise
    except Exception as error:
        if memory.ran_out(error):
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise DoesNotLoadError("checkpoint", f"{whole.name} does not load: {reason}") from error
    first, second = record.losses[trial.SAVED_AT :], again.losses
    tolerance = 1e-5 if plan.precision == "fp32" else 1e-2
    said = f"{whole.name} loads; the steps behind it lose {_numbers(second)}, before {_numbers(first)}"
    if len(first) == len(second) and all(
        math.isclose(one, other, rel_tol=tolerance) for one, other in zip(first, second, strict=True)
    ):
        return Check("checkpoint", True, said)
    return Check("checkpoint", False, said, "a resumed run would not be the same run; report this with `make plan`")


def _numbers(losses: Sequence[float]) -> str:
    return " and ".join(f"{loss:.5f}" for loss in losses)


def _free(sft: Any) -> None:
    """Lets go of a trainer's weights and engine."""
    import torch

    if sft.is_deepspeed_enabled:
        sft.model_wrapped.destroy()
    sft.accelerator.free_memory()
    sft.model = sft.model_wrapped = sft.optimizer = sft.lr_scheduler = None
    sft.callback_handler.callbacks.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1])
    run.leave()
