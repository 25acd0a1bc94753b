"""Main program of every rank of the sanity check, in two parts: the trial trains a plan for a few steps on a copy of
some rows, and runs the checks; the reload, in `reload/` of the trial's directory, resumes from its checkpoint.

Started by `accelerate launch … -m sft_recipes.sanity.worker PLAN`, never by hand. Rank 0 writes `result.json`. The
reload has new processes: two trainers do not fit into the memory planned for one, and dropping all references to a
trainer does not free it, since the Trainer's callback handler and DeepSpeed keep its tensors.
"""

import math
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_recipes.data import tokenizer_files
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import EXIT_STOPPED, RunDir, read_json, write_json
from sft_recipes.sanity import checks, trial
from sft_recipes.sanity.checks import Check
from sft_recipes.training import main, out_of_memory

# Training rows that are evaluated before and after: enough passes to separate the fall of the loss from noise.
_EVAL_ROWS, _EVAL_PASSES = 24, 8
_HELD_OUT_ROWS = 8
_ROWS = "prepared"  # folder of the trial's copy of the rows

Result = tuple[list[Check], dict[str, Any]]  # checks, and measurements


def run_part(plan: Plan, run_dir: RunDir) -> None:
    """Run one part and write its result."""
    from sft_recipes.training.callbacks.graceful_stop import StoppedAtStartError

    is_reload, rank = run_dir.path.name == trial.RELOAD, int(os.environ.get("RANK", "0"))
    try:
        results, measured = reload(plan, run_dir) if is_reload else run_trial(plan, run_dir)
    except StoppedAtStartError:
        if rank == 0:
            write_json(run_dir.outcome, {"exit_code": EXIT_STOPPED})
        return
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        # The launcher adds the fix: it has the recipe.
        _write_result(run_dir, [Check(checks.MEMORY, False, out_of_memory.describe(plan, rank, error))], {})
        sys.exit(1)  # perhaps on this rank only: the launcher terminates the others, which wait for it
    if rank == 0:
        _write_result(run_dir, results, measured)


def _write_result(run_dir: RunDir, results: Sequence[Check], measured: dict[str, Any]) -> None:
    write_json(run_dir.result, {"checks": [vars(check) for check in results], "measured": measured})


def run_trial(plan: Plan, run_dir: RunDir) -> Result:
    """Train the trial and run its checks. Collective: call on every rank; rank 0's result counts.

    Raises:
        UserError: a run would fail with it too.
    """
    from sft_recipes.training.nan_guard import DivergedError
    from sft_recipes.training.trainer import mean_loss

    arguments = main.configure(plan, run_dir)
    data = _copy_rows(plan, run_dir, arguments.distributed_state)
    original = read_json(Path(read_json(run_dir.prepared)["folder"]) / "details.json")
    trainer = main.build(plan, run_dir, arguments, data)
    results = [checks.check_loss_mask(trainer)]
    if not results[0].passed:
        return results, {}
    arguments.eval_on_start = True
    try:
        evaluations = train(trainer)
    except DivergedError as error:
        fix = f"check {', '.join(error.rows) or 'the rows'}, or lower trainer.learning_rate"
        return [*results, Check("finite values", False, f"step {error.step}: {error}", fix)], {}
    writer, vocabulary_size = trainer.checkpoint_writer, int(trainer.model.config.get_text_config().vocab_size)
    (first, _), (last, held_out) = (evaluation.values() for evaluation in (evaluations[0], evaluations[-1]))
    eval_loss = mean_loss(held_out)
    results += [
        checks.check_initial_loss(plan, mean_loss(first), vocabulary_size),
        checks.check_loss_falls(plan, first, last),
        Check("finite values", True, "no NaN or Inf in losses and gradients"),
        checks.check_gradient_norm(plan, _logged(trainer, "grad_norm")),
        checks.check_memory(plan, trainer),
        Check("evaluation", math.isfinite(eval_loss), f"loss {eval_loss:.4f} on held-out rows", "run `make inspect`"),
        checks.check_completions(plan, trainer, checks.is_better_than_chance(mean_loss(first), vocabulary_size)),
    ]
    if not trial.checks_resume(plan):
        results.append(Check("checkpoint", None, "above 13B parameters saving and loading take minutes"))
    elif trainer.accelerator.is_main_process:
        write_json(run_dir.trial, {"losses": _logged(trainer, "loss")})
    measured = {
        "step_seconds": statistics.median(_logged(trainer, "step_seconds")[trial.WARMUP_STEPS :]),
        "tokens_per_second": statistics.median(_logged(trainer, "tokens_per_second")[trial.WARMUP_STEPS :]),
        "accumulation": plan.gradient_accumulation_steps,
        "eval_seconds_per_row": _logged(trainer, "eval_runtime")[-1] / len(trainer.eval_dataset),
        "eval_rows": sum(original["validation_rows"].values()) + original.get("retention_eval_rows", 0),
        "save_seconds": writer.save_seconds or None,
        "save_bytes": writer.expected_bytes if writer.save_seconds else None,
    }
    return results, measured


def reload(plan: Plan, run_dir: RunDir) -> Result:
    """Resume from the trial's checkpoint; the steps after it must repeat the trial's losses. Collective: call on every
    rank; rank 0's result counts."""
    from sft_recipes.training.checkpoint import resume

    trial_dir = RunDir(run_dir.path.parent)
    name = trial_dir.checkpoint(trial.SAVED_AT).name
    arguments = main.configure(plan, run_dir)
    arguments.eval_strategy = "no"
    data = {**read_json(run_dir.prepared), "folder": str(trial_dir.path / _ROWS)}
    trainer = main.build(plan, run_dir, arguments, data)
    point, skipped = resume.find_valid(trial_dir, [trial.SAVED_AT], plan.run_id, trainer.accelerator)
    if point is None:
        return [Check("checkpoint", False, skipped[0], "check that the disk of RUNS_DIR is writable and not full")], {}
    train(trainer, point.path)
    losses = _logged(trainer, "loss"), read_json(trial_dir.trial)["losses"]
    resumed, expected = (values[trial.SAVED_AT :] for values in losses)
    tolerance = 1e-5 if plan.precision == "fp32" else 1e-2
    equal = all(math.isclose(loss, other, rel_tol=tolerance) for loss, other in zip(resumed, expected, strict=True))
    shown = [" and ".join(f"{loss:.5f}" for loss in values) for values in (resumed, expected)]
    detail = f"{name} resumes with {'the same' if equal else 'other'} losses: found {shown[0]}, expected {shown[1]}"
    return [Check("checkpoint", equal, detail, "a resumed run would differ: report this with `make plan`")], {}


def train(trainer: Any, checkpoint: Path | None = None) -> list[dict[str, Any]]:
    """Train to the last step of the trial; return `RecipeTrainer.eval_sums` of each evaluation.

    Raises:
        StoppedAtStartError: a signal interrupted the steps: an interrupted trial has no result.
    """
    from sft_recipes.training.callbacks import RunCallback
    from sft_recipes.training.callbacks.graceful_stop import StoppedAtStartError

    evaluations: list[dict[str, Any]] = []

    class TrialCallback(RunCallback):
        """Saves at one step only, and records evaluations."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == trial.SAVED_AT and trial.checks_resume(self.trainer.plan)

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            evaluations.append(self.trainer.eval_sums)

    trainer.add_callbacks([TrialCallback()])
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopping.stopped:
        raise StoppedAtStartError
    return evaluations


def _logged(trainer: Any, key: str) -> list[float]:
    """Return the logged values of a key, from the first step on."""
    return [line[key] for line in trainer.state.log_history if key in line]


def _copy_rows(plan: Plan, run_dir: RunDir, state: Any) -> dict[str, Any]:
    """Copy the trial's rows: the longest and a sample of the others, cycled to complete effective batches. The
    validation rows are some of these and a few held-out ones."""
    from datasets import concatenate_datasets, load_from_disk

    prepared = read_json(run_dir.prepared)
    original, copy = Path(prepared["folder"]), run_dir.path / _ROWS
    with state.main_process_first():
        if state.is_main_process:
            train, validation = (load_from_disk(str(original / part)) for part in ("train", "validation"))
            # From the offsets in the file: the tokens of a large dataset are not loaded into memory.
            chunks = train.data.column("input_ids").chunks
            lengths = [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]
            rows = train.select(select_rows(lengths, plan.rows or 0))
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
    return {**prepared, "folder": str(copy)}


def select_rows(lengths: Sequence[int], count: int) -> list[int]:
    """Select the longest rows, then others of all lengths; repeat them if there are fewer than `count`."""
    by_length = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    others, n_others = by_length[trial.LONGEST :], trial.ROWS - trial.LONGEST
    spread = others[:: max(len(others) // n_others, 1)][:n_others]
    selected = [*by_length[: trial.LONGEST], *spread][:count]
    return [selected[index % len(selected)] for index in range(count)]


if __name__ == "__main__":
    main.run_rank(sys.argv[1], run_part)
