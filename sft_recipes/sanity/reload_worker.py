"""Main program of every rank of the sanity check's second part: reloads the trial's checkpoint in new processes.

Started by `accelerate launch … -m sft_recipes.sanity.reload_worker PLAN` in `reload/` of the trial's directory, never
by hand, after the trial's processes (`worker.py`) have exited and freed their memory. Rank 0 writes `result.json`.
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

_DISK = "check that the disk of RUNS_DIR is writable and not full; a run could not resume on this machine"


class DoesNotLoadError(Exception):
    """A file that the trial saved does not load."""

    def __init__(self, check: Check):
        super().__init__(check.detail)
        self.check = check


def reload(plan: Plan, run_dir: RunDir) -> Result:
    """Check completions of the saved model, if training shards it, and the steps after the checkpoint. Collective: call
    on every rank; rank 0's result counts.

    Raises:
        RankAloneError: something does not load, perhaps on this rank only.
        StopRequestedError: a signal interrupted the steps.
    """
    import torch

    trial_dir = RunDir(run_dir.path.parent)
    state = TrialState(**read_json(trial_dir.trial))
    checks: list[Check] = []
    try:
        if plan.shards_parameters and _rank() == 0:
            checks.append(check_saved_completions(plan, trial_dir, state))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # for the trainer, and for other processes on this GPU
        checks.append(check_resume(plan, run_dir, trial_dir, state))
    except DoesNotLoadError as error:
        raise RankAloneError([*checks, error.check]) from error
    return checks, {}


def check_saved_completions(plan: Plan, trial_dir: RunDir, state: TrialState) -> Check:
    """Load the saved model on rank 0 and check its completions; before any process group or trainer exists, so the
    model is not sharded and has the device to itself.

    Raises:
        DoesNotLoadError: the checkpoint does not contain the model.
    """
    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training.model import load_model

    section, checkpoint = plan.sections.model, str(trial_dir.checkpoint(trial.SAVED_AT))
    try:
        # In the dtype that training computes in: fp32 weights would need twice the memory.
        model = load_model(dataclasses.replace(plan, dtypes={"weights": plan.precision}), checkpoint)
        base = read_json(trial_dir.prepared)["model"]
        tokenizer = load_tokenizer(base, section.chat_template, section.trust_remote_code, section.add_tokens)
        model = model.to("cuda" if plan.uses_gpu else "cpu")
        return worker.check_completions(plan, worker.copied_rows(trial_dir), model, tokenizer, state)
    except UserError as error:
        raise DoesNotLoadError(Check("completions", False, str(error), _DISK)) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        reason = out_of_memory.describe(plan, 0, error)
        return Check("completions", None, f"the unsharded model, which training never builds, does not fit: {reason}")


def check_resume(plan: Plan, run_dir: RunDir, trial_dir: RunDir, state: TrialState) -> Check:
    """Resume from the trial's checkpoint; the steps after it must repeat the trial's losses.

    Raises:
        DoesNotLoadError: the checkpoint is incomplete or corrupt, or the trainer cannot load it.
        StopRequestedError: a signal interrupted the steps.
    """
    name = trial_dir.checkpoint(trial.SAVED_AT).name
    try:
        resumed = _losses_after_resume(plan, run_dir, trial_dir)
    except (StopRequestedError, DoesNotLoadError):
        raise
    except Exception as error:
        if out_of_memory.is_out_of_memory(error):
            detail = f"resuming from {name}: {out_of_memory.describe(plan, _rank(), error)}"
            raise DoesNotLoadError(Check("checkpoint", False, detail)) from error
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise DoesNotLoadError(Check("checkpoint", False, f"{name} does not load: {reason}", _DISK)) from error
    expected = state.losses[trial.SAVED_AT :]
    tolerance = 1e-5 if plan.precision == "fp32" else 1e-2
    equal = len(expected) == len(resumed) and all(
        math.isclose(loss, other, rel_tol=tolerance) for loss, other in zip(expected, resumed, strict=True)
    )
    if equal:
        return Check("checkpoint", True, f"{name} resumes with the same losses: {_numbers(resumed)}")
    detail = f"{name} resumes with other losses: found {_numbers(resumed)}, expected {_numbers(expected)}"
    return Check("checkpoint", False, detail, "a resumed run would differ; report this with the output of `make plan`")


def _losses_after_resume(plan: Plan, run_dir: RunDir, trial_dir: RunDir) -> list[float]:
    from sft_recipes.training.checkpoint import resume

    arguments = main.configure(plan, run_dir)
    arguments.eval_strategy = "no"
    rows = str(worker.copied_rows(trial_dir))
    parts = main.build(plan, run_dir, arguments, {**read_json(run_dir.prepared), "folder": rows})
    point, skipped = resume.find_valid(trial_dir, [trial.SAVED_AT], plan.run_id, parts.trainer.accelerator)
    if point is None:
        raise DoesNotLoadError(Check("checkpoint", False, skipped[0], _DISK))
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
    main.exit_process()
