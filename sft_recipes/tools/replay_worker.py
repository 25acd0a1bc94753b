"""The main program of every rank of `verify-resume`: loads a run's checkpoint as a resume does, tells what was loaded,
and takes the steps behind it again.

Started by `accelerate launch … -m sft_recipes.tools.replay_worker PLAN` in its own folder, never by hand; the run's
folder is only read. Rank 0 writes `verdict.json`; the steps' digests come into `integrity.jsonl`, as in every run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import TrainingError, UserError
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.training import main as training_main
from sft_recipes.training import manifest, rank_heartbeat
from sft_recipes.training.checkpoint import resume

if TYPE_CHECKING:
    from sft_recipes.training.checkpoint.resume import ResumePoint


def main(plan_file: str) -> None:
    """Takes the steps again; leaves with 0 wherever there is a verdict, or a reason why there is none."""
    plan, folder, rank = training_main.begin(plan_file)
    with rank_heartbeat.until_it_ends():
        try:
            replay(plan, folder)
        except (UserError, TrainingError) as error:  # on all ranks alike
            if rank == 0:
                code = 2 if isinstance(error, UserError) else 1
                write_json(folder.outcome, {"exit_code": code, "error": str(error)})


def replay(plan: Plan, folder: RunDir) -> None:
    """From the newest whole one of the checkpoints that `replay.json` names, to the step that it names beside it.

    Raises:
        UserError: what a run would refuse as well.
        NoValidCheckpointError: none of the checkpoints is whole.
    """
    arguments = training_main.configure(plan, folder)
    # Neither changes what a step does: an evaluation draws no random number, and nothing is saved here.
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.eval_on_start = False
    parts = training_main.build(plan, folder, arguments, read_json(folder.prepared))
    sft = parts.trainer
    asked = read_json(folder.replay)
    point, until, passed_over = _first_whole(asked, plan, sft)
    sft.integrity.restore_state(point.record["integrity"])
    loaded = _loaded(point, until, folder, {"passed_over": passed_over, "saved": point.record["integrity"]})
    sft.add_callbacks([loaded])
    if sft.accelerator.is_main_process:
        manifest.begin(folder, plan)
    sft.train(resume_from_checkpoint=str(point.path))


def _first_whole(asked: dict[str, Any], plan: Plan, sft: Any) -> tuple[ResumePoint, int, list[str]]:
    """The first whole checkpoint of those asked for, the step to go to, and why others were passed over."""
    passed_over = []
    for step, until in asked["candidates"]:
        found = resume.verify_checkpoint(RunDir(Path(asked["run"])), step, plan.run_id, sft.accelerator)
        if not isinstance(found, str):
            return found, until, passed_over
        passed_over.append(f"checkpoint-{step}: {found}")
    raise resume.NoValidCheckpointError(
        f"{asked['run']}: no checkpoint of this run is whole ({'; '.join(passed_over)})"
    )


def _loaded(point: ResumePoint, until: int, folder: RunDir, verdict: dict[str, Any]) -> Any:
    """A callback that tells what was loaded, and stops behind the last step that can be compared."""
    from accelerate.utils import gather_object
    from transformers import TrainerCallback

    from sft_recipes.training.integrity import fingerprint

    class Loaded(TrainerCallback):  # type: ignore[misc]
        """When all is loaded but random numbers, which the Trainer restores from the same file once it has drawn the
        first batch, or before the first batch of an epoch."""

        trainer: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.trainer._load_rng_state(str(point.path))
            ranks = gather_object([fingerprint.of_rank(self.trainer)])
            if state.is_world_process_zero:
                write_json(folder.verdict, {**verdict, "step": point.step, "loaded": ranks})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Where nothing is to be compared the first step is thrown away: the Trainer takes one at least.
            control.should_training_stop = state.global_step >= until

    return Loaded()


if __name__ == "__main__":
    main(sys.argv[1])
    training_main.leave()
