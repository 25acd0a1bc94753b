"""The main program of every rank of the sanity gate: a short trial of a plan on a copy, and a verdict on each part.

Started by `accelerate launch … -m sft_recipes.training.sanity PLAN` in a folder of its own, never by hand. Rank 0
writes `verdict.json`.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import shutil
import statistics
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.planning import plan as plans
from sft_recipes.planning import recipes, trial
from sft_recipes.planning.memory import GIB
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.processes import end_with_parent
from sft_recipes.planning.run_folder import RunFolder, read_json, write_json
from sft_recipes.planning.schema import RecipeError
from sft_recipes.training import memory, signals
from sft_recipes.training.quiet import quiet

# Rows of the trial that are evaluated before and after: enough passes to tell their fall from its noise.
_EVALUATED_ROWS, _EVALUATED_PASSES = 24, 8
_HELD_OUT_ROWS = 8
_PROMPTS, _NEW_TOKENS = 3, 48
MEMORY = "peak memory"  # the parent, which knows the recipe, says what would take less
_SURE = 3.0  # standard errors that the fall of the loss must exceed
_DEVICE_SHARE = 0.95  # of the device's memory: what is left is for what the trial did not meet


@dataclass(frozen=True)
class Check:
    """One part of the verdict: `passed` is None where it was left out, which `said` gives the reason of; `way_out` is
    what to do where it failed."""

    name: str
    passed: bool | None
    said: str
    way_out: str = ""


class DoesNotLoadError(Exception):
    """What the trial saved cannot be loaded."""

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        way_out = "is the disk of RUNS_DIR full or read-only? a run could not be resumed on this machine"
        self.check = Check(name, False, reason, way_out)


class RankAloneError(Exception):
    """Something failed on this rank, perhaps on no other: they wait for it, so the trial ends with this verdict."""

    def __init__(self, checks: list[Check]):
        super().__init__(checks[-1].said)
        self.checks = checks


def main(plan_file: str) -> None:
    """Carries the trial out; leaves with 0 wherever there is a verdict, or the user's input was wrong."""
    end_with_parent()
    folder = RunFolder(Path(plan_file).parent)
    rank = int(os.environ.get("RANK", "0"))
    signals.listen(folder, rank)
    plan = plans.read(folder.plan)
    try:
        checks, figures = carry_out(plan, folder)
    except RecipeError as error:
        if rank == 0:
            write_json(folder.outcome, {"exit_code": 2, "error": str(error)})
        return
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        _write(folder, [Check(MEMORY, False, memory.what_ran_out(plan, rank, error))], {})
        sys.exit(1)  # the other ranks wait in a collective: the launcher ends them
    except RankAloneError as error:
        _write(folder, error.checks, {})
        sys.exit(1)
    if rank == 0:
        _write(folder, checks, figures)


def _write(folder: RunFolder, checks: Sequence[Check], figures: dict[str, Any]) -> None:
    write_json(folder.path / "verdict.json", {"checks": [dataclasses.asdict(c) for c in checks], "figures": figures})


def carry_out(plan: Plan, folder: RunFolder) -> tuple[list[Check], dict[str, Any]]:
    """The verdict on each part, and what was measured. All ranks take part; rank 0's is the one that counts.

    Raises:
        RecipeError: what a run would refuse as well.
    """
    quiet()
    from sft_recipes.training import run
    from sft_recipes.training.divergence import DivergedError

    arguments = run.configure(plan, folder)
    found = _copy(plan, folder, arguments.distributed_state)
    parts = run.build(plan, folder, arguments, found)
    sft, record = parts.trainer, recorder()
    sft.add_callbacks([record])
    checks = [rows_are_right(sft, parts.ends_of_turn)]
    if not checks[0].passed:
        return checks, {}
    arguments.eval_on_start = True
    try:
        sft.train()
    except DivergedError as error:
        way_out = f"look at {', '.join(error.what.rows) or 'the rows'}, or lower trainer.learning_rate"
        return [*checks, Check("numbers", False, f"step {error.what.step}: {error}", way_out)], {}
    checks += [
        first_loss_is_plausible(plan, record, _vocabulary_size(sft)),
        loss_falls(plan, record),
        Check("numbers", True, "no NaN or Inf in losses and gradients"),
        gradients_are_in_range(plan, record),
        memory_is_enough(plan, sft),
        evaluation_is_a_number(
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
    }
    sharded = plan.no_rank_holds_the_model
    answered = None if sharded else answers_are_text(plan, parts, found, sft.accelerator.unwrap_model(sft.model))
    _free(sft)  # the model that answers under ZeRO-3, and the trainer that goes on, have room then
    for check in (
        lambda: answered or saved_answers_are_text(plan, folder, parts, found),
        lambda: a_checkpoint_loads(plan, folder, found, record),
    ):
        try:
            checks.append(check())
        except DoesNotLoadError as error:
            raise RankAloneError([*checks, error.check]) from error
    return checks, figures


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
            chosen = choose([len(ids) for ids in train["input_ids"]], plan.rows or 0)
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

    from sft_recipes.training.callbacks import best

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
            best.mark_when_all_have_written(self.trainer, state)
            self.save_seconds = time.perf_counter() - self._stepped

    return Record()


def rows_are_right(sft: Any, ends_of_turn: Sequence[int]) -> Check:
    """What the loss looks at, in batches as the model gets them: labels are the tokens themselves, some are supervised,
    and ends of turn are among them (not in each row: one that was cut has lost its own). All ranks judge alike."""
    import torch

    from sft_recipes.data.chat import IGNORED

    ends = torch.tensor(list(ends_of_turn), device=sft.args.device)
    counts = torch.zeros(4, dtype=torch.int64, device=sft.args.device)
    shown = ""
    for batch in sft.get_train_dataloader():
        ids, labels = batch["input_ids"].to(ends.device), batch["labels"].to(ends.device)
        supervised = labels != IGNORED
        counts += torch.stack(
            [
                supervised.sum(),
                supervised.new_tensor(labels.numel(), dtype=torch.int64),
                (supervised & (labels != ids)).sum(),
                torch.isin(labels, ends).sum(),
            ]
        )
        shown = shown or _short(sft.processing_class.decode(ids[0][supervised[0]].tolist()))
    many, of, others, ended = sft.accelerator.reduce(counts, "sum").tolist()
    way_out = "see the rows with `make inspect`; look at the data's roles and at model.chat_template"
    if not many:
        return Check("rows and masks", False, f"all {of:,} labels are masked: nothing would be learned", way_out)
    if others:
        return Check("rows and masks", False, f"{others:,} labels are other tokens than their row's own", way_out)
    if not ended:
        names = ", ".join(sft.processing_class.convert_ids_to_tokens(list(ends_of_turn)))
        said = f"no end of turn ({names}) is supervised: the model would never learn to stop"
        return Check("rows and masks", False, said, way_out)
    return Check("rows and masks", True, f"{many:,} of {of:,} tokens are supervised, {ended:,} ends of turn: {shown}")


def _short(text: str, most: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _vocabulary_size(sft: Any) -> int:
    return int(sft.model.config.get_text_config().vocab_size)


def first_loss_is_plausible(plan: Plan, record: Any, vocabulary: int) -> Check:
    """The loss before the first step against chance, ln(vocabulary): what a model that knows nothing has, and what one
    whose tokens or weights are not its own exceeds."""
    first, chance = _mean(record.rows[0]), math.log(vocabulary)
    said = f"{first:.3f} before the first step; chance over {vocabulary:,} tokens is {chance:.2f}"
    if not 1e-4 < first < 1.5 * chance:
        way_out = "is model.name_or_path's tokenizer its own, and are its weights whole? is the data already in it?"
        return Check("first loss", False, said, way_out)
    if first > 0.95 * chance and not plan.sections["model"]["from_scratch"]:
        said += ", so the weights know no more than chance: are they a trained model's?"
    return Check("first loss", True, said)


def _mean(passes: Any) -> float:
    return float(passes[..., 0].sum() / passes[..., 1].sum())


def loss_falls(plan: Plan, record: Any) -> Check:
    """On the very rows that were trained on, before and after: each pass is its own measure, so what differs between
    rows is no noise."""
    before, after = (passes[..., 0] / passes[..., 1].clamp(min=1) for passes in (record.rows[0], record.rows[-1]))
    falls = [
        fall
        for fall, tokens in zip(
            (before - after).flatten().tolist(), record.rows[0][..., 1].flatten().tolist(), strict=True
        )
        if tokens
    ]
    mean = statistics.fmean(falls)
    error = statistics.stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    said = (
        f"{_mean(record.rows[0]):.4f} -> {_mean(record.rows[-1]):.4f} on the same rows in {len(record.losses)} steps "
        f"at {plan.learning_rate:.1e}; the fall is {mean:.2g}, its standard error {error:.1g}"
    )
    if mean > _SURE * error and mean > 0:
        return Check("loss falls", True, said)
    rises = mean < -_SURE * error
    way_out = f"it rises: lower the rate, {_rate(plan, 1 / 3)}" if rises else f"raise the rate, {_rate(plan, 2)}"
    return Check("loss falls", False, said, way_out)


def _rate(plan: Plan, factor: float) -> str:
    """Another learning rate; where this one is outside its row of the table, the one that the row starts from."""
    entry = recipes.table()[plan.size].cells["learning_rate"]
    if entry.range is None or not entry.allows(plan.learning_rate):
        return f"row {plan.size} starts from {recipes.line(plan.size, 'learning_rate', entry.start)}"
    return recipes.line(plan.size, "learning_rate", plan.learning_rate * factor)


def evaluation_is_a_number(record: Any, rows: int) -> Check:
    """Of the held-out rows, behind the last step."""
    loss = record.evaluated[-1]
    way_out = "look at the rows of data.validation with `make inspect`"
    return Check("evaluation", math.isfinite(loss), f"loss {loss:.4f} over {rows} held-out rows", way_out)


def gradients_are_in_range(plan: Plan, record: Any) -> Check:
    """Behind the warm-up, against the documents' bounds."""
    limits, norms = plan.sections["guards"], record.norms[trial.WARMUP_STEPS :]
    middle = statistics.median(norms)
    least, most = limits["grad_norm_below"], limits["grad_norm_above"]
    said = f"{middle:.3g} (median), {max(norms):.3g} at most; wanted {least:g} to {most:g}"
    if least <= middle <= most:
        return Check("gradient norm", True, said)
    way_out = (
        f"lower trainer.learning_rate, or look for rows that are no text; where this model's norms are larger by "
        f"nature, guards.grad_norm_above={2 * middle:.0f}"
        if middle > most
        else "see that weights are trained and rows supervised (make inspect)"
    )
    return Check("gradient norm", False, said, way_out)


def memory_is_enough(plan: Plan, sft: Any) -> Check:
    """The most that a rank held, against its device and against what the plan said."""
    import torch
    from accelerate.utils import gather

    on_gpu = torch.cuda.is_available() and plan.uses_gpu
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // plan.world_size
    device = torch.cuda.get_device_properties(sft.args.device).total_memory if on_gpu else here
    mine = torch.cuda.max_memory_reserved() if on_gpu else memory.peak_of_the_host()
    peak = int(gather(torch.tensor([float(mine)], dtype=torch.float64, device=sft.args.device)).max())
    said = f"{peak / GIB:.2f} GiB at the peak of {device / GIB:.1f} a rank"
    planned = (plan.memory_bytes_per_gpu or {}).get("total")
    if planned and on_gpu:
        said += f"; the plan said {planned / GIB:.2f} ({peak / planned:.2f} times that)"
    return Check(MEMORY, peak <= _DEVICE_SHARE * device, said)


def saved_answers_are_text(plan: Plan, folder: RunFolder, parts: Any, found: dict[str, Any]) -> Check:
    """Of the model that was saved, where no rank holds the one that was trained."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from sft_recipes.training import run

    if not trial.resumes(plan):
        return Check("answers", None, f"left out: under {plan.parallelism} they need a saved model, above 13B minutes")
    if not parts.trainer.accelerator.is_main_process:
        return Check("answers", None, "rank 0 answers")
    unset_hf_deepspeed_config()  # else transformers would spread this model over the ranks as well
    try:
        model = run.load_model(plan, str(folder.checkpoint(trial.SAVED_AT)))
    except RecipeError as error:
        raise DoesNotLoadError("answers", str(error)) from error
    return answers_are_text(plan, parts, found, model.to(parts.trainer.args.device))


def answers_are_text(plan: Plan, parts: Any, found: dict[str, Any], model: Any) -> Check:
    """Greedy answers to held-out prompts, on rank 0."""
    from sft_recipes.training import answers

    if not parts.trainer.accelerator.is_main_process:
        return Check("answers", None, "rank 0 answers")
    prompts = answers.read_prompts(Path(found["folder"]), _PROMPTS, 0)
    if not prompts:
        return Check("answers", None, "left out: no held-out prompts")
    most = min(plan.sections["answers"]["max_new_tokens"], _NEW_TOKENS)
    with parts.trainer.compute_loss_context_manager():  # fp32 weights compute in bf16, as they do in training
        texts = answers.answer(model, parts.trainer.processing_class, prompts, 0, most, parts.ends_of_turn).said
    shown = " | ".join(_short(text, 40) or "(nothing)" for text in texts)
    if plan.sections["model"]["from_scratch"]:
        return Check("answers", None, f"not judged, the model began with random weights: {shown}")
    reasons = [reason for text in texts if (reason := garbled(text))]
    if len(reasons) * 2 <= len(texts):
        return Check("answers", True, shown)
    way_out = "lower trainer.learning_rate; is model.chat_template the model's own?"
    return Check("answers", False, f"{reasons[0]}: {shown}", way_out)


def garbled(text: str) -> str | None:
    """What is wrong with an answer as text; None where nothing is.

    Three signs, each far from what any language or code has: nothing at all; more than a tenth of the characters
    unprintable or undecodable; in a text of 20 words or more, one word making up more than half of them; in one of 100
    characters or more, ten times less information than its length (zlib).
    """
    if not text.strip():
        return "nothing is said"
    odd = sum(map(_is_no_text, text))
    if odd > 0.1 * len(text):
        return "characters that are no text"
    words = text.split()
    if len(words) >= 20 and Counter(words).most_common(1)[0][1] > 0.5 * len(words):
        return "one word again and again"
    encoded = text.encode()
    commonest = Counter(text).most_common(1)[0][1]
    if len(text) >= 40 and commonest > 0.8 * len(text):
        return "the same again and again"
    if len(encoded) >= 100 and len(zlib.compress(encoded, 9)) < 0.1 * len(encoded) + 12:
        return "the same again and again"
    return None


def _is_no_text(character: str) -> bool:
    """Control characters, private and unassigned ones, and what could not be decoded; not line ends and joiners."""
    if character in "\n\r\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") or character == "\N{REPLACEMENT CHARACTER}"


def a_checkpoint_loads(plan: Plan, folder: RunFolder, found: dict[str, Any], record: Any) -> Check:
    """A trainer of its own goes on from the trial's checkpoint, and its steps must repeat the losses."""
    from sft_recipes.training import checkpoint, run

    if not trial.resumes(plan):
        return Check("checkpoint", None, "left out: above 13B parameters saving and loading take minutes by themselves")
    whole, _ = checkpoint.newest_complete(folder)
    if whole is None:
        raise DoesNotLoadError("checkpoint", f"no whole checkpoint was written to {folder.path}")
    again = recorder()
    try:
        arguments = run.configure(plan, folder)
        arguments.eval_strategy = "no"
        parts = run.build(plan, folder, arguments, found)
        parts.trainer.add_callbacks([again])
        parts.trainer.train(resume_from_checkpoint=str(whole))
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
