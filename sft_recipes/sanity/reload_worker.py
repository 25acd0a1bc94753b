"""The main program of every rank of the sanity check's second part: reloads what the trial saved, in new processes.

Started by `accelerate launch … -m sft_recipes.sanity.reload_worker PLAN` in `reload/` of the trial's folder, never by
hand, once the trial's processes (`sanity.py`) have exited and freed their memory. Rank 0 writes `verdict.json`.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import sys
from collections.abc import Sequence

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.sanity import trial, worker
from sft_recipes.sanity.checks import Check
from sft_recipes.sanity.worker import RankAloneError, Result, StopRequestedError, TrialState
from sft_recipes.training import main, out_of_memory

_DISK = "is the disk of RUNS_DIR full or read-only? a run could not be resumed on this machine"


class DoesNotLoadError(Exception):
    """What the trial saved cannot be loaded."""

    def __init__(self, check: Check):
        super().__init__(check.said)
        self.check = check


def reload(plan: Plan, folder: RunDir) -> Result:
    """Judge the saved model's answers, where training shards the model, and the steps after the checkpoint. Collective:
    call on every rank; rank 0's result counts.

    Raises:
        RankAloneError: something does not load, perhaps on this rank only.
        StopRequestedError: a signal interrupted the steps.
    """
    import torch

    tried = RunDir(folder.path.parent)
    state = TrialState(**read_json(tried.trial))
    checks: list[Check] = []
    try:
        if plan.shards_parameters and _rank() == 0:
            checks.append(saved_answers_are_text(plan, tried, state))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # for the trainer, and for other processes on this GPU
        checks.append(checkpoint_resumes(plan, folder, tried, state))
    except DoesNotLoadError as error:
        raise RankAloneError([*checks, error.check]) from error
    return checks, {}


def saved_answers_are_text(plan: Plan, tried: RunDir, state: TrialState) -> Check:
    """Load the saved model on rank 0 and judge its answers; before any process group or trainer exists, so the model is
    not sharded and has the device to itself.

    Raises:
        DoesNotLoadError: the checkpoint does not hold the model.
    """
    from sft_recipes.data.tokenizer import load_tokenizer

    section, whole = plan.sections.model, str(tried.checkpoint(trial.SAVED_AT))
    try:
        # In the dtype that training computes in: fp32 weights would take twice the memory of the model that answers.
        model = main.load_model(dataclasses.replace(plan, dtypes={"weights": plan.precision}), whole)
        base = read_json(tried.prepared)["model"]
        tokenizer = load_tokenizer(base, section.chat_template, section.trust_remote_code, section.add_tokens)
        model = model.to("cuda" if plan.uses_gpu else "cpu")
        return worker.answers_are_text(plan, worker.prepared_copy(tried), model, tokenizer, state)
    except UserError as error:
        raise DoesNotLoadError(Check("answers", False, str(error), _DISK)) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory.ran_out(error):
            raise
        reason = out_of_memory.what_ran_out(plan, 0, error)
        return Check(
            "answers", None, f"skipped: the unsharded model, which training never builds, does not fit: {reason}"
        )


def checkpoint_resumes(plan: Plan, folder: RunDir, tried: RunDir, state: TrialState) -> Check:
    """Resume from the trial's checkpoint; the steps after it must repeat the trial's losses.

    Raises:
        DoesNotLoadError: the checkpoint is incomplete or corrupt, or the trainer cannot load it.
        StopRequestedError: a signal interrupted the steps.
    """
    name = tried.checkpoint(trial.SAVED_AT).name
    try:
        second = _losses_after_resume(plan, folder, tried)
    except (StopRequestedError, DoesNotLoadError):
        raise
    except Exception as error:
        if out_of_memory.ran_out(error):
            said = f"resuming from {name}: {out_of_memory.what_ran_out(plan, _rank(), error)}"
            raise DoesNotLoadError(Check("checkpoint", False, said)) from error
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise DoesNotLoadError(Check("checkpoint", False, f"{name} does not load: {reason}", _DISK)) from error
    first = state.losses[trial.SAVED_AT :]
    tolerance = 1e-5 if plan.precision == "fp32" else 1e-2
    said = f"{name} resumes: losses {_numbers(second)} after it, {_numbers(first)} in the trial"
    if len(first) == len(second) and all(
        math.isclose(one, other, rel_tol=tolerance) for one, other in zip(first, second, strict=True)
    ):
        return Check("checkpoint", True, said)
    return Check("checkpoint", False, said, "a resumed run would not be the same run; report this with `make plan`")


def _losses_after_resume(plan: Plan, folder: RunDir, tried: RunDir) -> list[float]:
    from sft_recipes.training.checkpoint import resume

    arguments = main.configure(plan, folder)
    arguments.eval_strategy = "no"
    prepared = str(worker.prepared_copy(tried))
    parts = main.build(plan, folder, arguments, {**read_json(folder.prepared), "folder": prepared})
    point = resume.verify_checkpoint(tried, trial.SAVED_AT, plan.run_id, parts.trainer.accelerator)
    if isinstance(point, str):
        name = tried.checkpoint(trial.SAVED_AT).name
        raise DoesNotLoadError(Check("checkpoint", False, f"{name}: {point}", _DISK))
    record = worker.recorder()
    parts.trainer.add_callbacks([record])
    worker.train(parts.trainer, point.path)
    return list(record.losses)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _numbers(losses: Sequence[float]) -> str:
    return " and ".join(f"{loss:.5f}" for loss in losses)


if __name__ == "__main__":
    worker.execute(sys.argv[1], reload)
    main.leave()
