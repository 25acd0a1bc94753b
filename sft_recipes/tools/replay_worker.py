"""Main program of every rank of `verify-resume`: loads a run's checkpoint as a resume does, records the fingerprints of
the loaded state, and repeats the steps after it.

Started by `accelerate launch … -m sft_recipes.tools.replay_worker PLAN` in its own directory, never by hand; the run
directory is only read. Rank 0 writes `result.json`; the fingerprints of the steps go to `integrity.jsonl`, as in a run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import TrainingError, UserError
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_USER, RunDir, read_json, write_json
from sft_recipes.training import main as training_main
from sft_recipes.training import manifest, rank_heartbeat
from sft_recipes.training.checkpoint import resume

if TYPE_CHECKING:
    from sft_recipes.training.checkpoint.resume import ResumePoint


def main(plan_file: str) -> None:
    """Repeat the steps; exit with 0 if there is a result, or an error in `outcome.json`."""
    plan, run_dir, rank = training_main.begin(plan_file)
    with rank_heartbeat.record_exit():
        try:
            replay(plan, run_dir)
        except (UserError, TrainingError) as error:  # the same on all ranks
            if rank == 0:
                code = EXIT_USER if isinstance(error, UserError) else EXIT_ERROR
                write_json(run_dir.outcome, {"exit_code": code, "error": str(error)})


def replay(plan: Plan, run_dir: RunDir) -> None:
    """Resume from the first valid checkpoint in `replay.json`, and train to the step given there.

    Raises:
        UserError: a run would fail with it too.
        NoValidCheckpointError: none of the checkpoints is valid.
    """
    arguments = training_main.configure(plan, run_dir)
    # Neither changes what a step does: an evaluation draws no random number, and nothing is saved here.
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.eval_on_start = False
    trainer = training_main.build(plan, run_dir, arguments, read_json(run_dir.prepared)).trainer
    request = read_json(run_dir.replay)
    point, until, skipped = _find_valid_checkpoint(request, plan, trainer)
    trainer.integrity.restore_state(point.record["integrity"])
    recorder = _loaded_state_recorder(point, until, run_dir, {"skipped": skipped, "saved": point.record["integrity"]})
    trainer.add_callbacks([recorder])
    if trainer.accelerator.is_main_process:
        manifest.begin(run_dir, plan)
    trainer.train(resume_from_checkpoint=str(point.path))


def _find_valid_checkpoint(request: dict[str, Any], plan: Plan, trainer: Any) -> tuple[ResumePoint, int, list[str]]:
    """Find the first valid checkpoint; return it, the step to train to, and why others were skipped."""
    skipped = []
    for step, until in request["candidates"]:
        point = resume.verify_checkpoint(RunDir(Path(request["run"])), step, plan.run_id, trainer.accelerator)
        if not isinstance(point, str):
            return point, until, skipped
        skipped.append(f"checkpoint-{step}: {point}")
    raise resume.NoValidCheckpointError(f"{request['run']}: no valid checkpoint of this run ({'; '.join(skipped)})")


def _loaded_state_recorder(point: ResumePoint, until: int, run_dir: RunDir, result: dict[str, Any]) -> Any:
    """Return a callback that writes the result, and stops after the last step that can be compared."""
    from accelerate.utils import gather_object
    from transformers import TrainerCallback

    from sft_recipes.training.integrity import fingerprint

    class LoadedStateRecorder(TrainerCallback):  # type: ignore[misc]
        """At the start of training all state is loaded, except random number states: the Trainer restores these from
        the same file after the first batch, or before the first batch of an epoch."""

        trainer: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.trainer._load_rng_state(str(point.path))
            ranks = gather_object([fingerprint.of_rank(self.trainer)])
            if state.is_world_process_zero:
                write_json(run_dir.result, {**result, "step": point.step, "loaded": ranks})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Without a step to compare, the first one is discarded: the Trainer takes at least one.
            control.should_training_stop = state.global_step >= until

    return LoadedStateRecorder()


if __name__ == "__main__":
    main(sys.argv[1])
    training_main.exit_process()
