"""Main program of every rank of `verify-resume`: loads a run's checkpoint as a resume does, records the fingerprints of
the loaded state, and repeats the steps after it.

Started by `accelerate launch … -m sft_recipes.tools.replay_worker PLAN` in its own directory, never by hand; the run
directory is only read. Rank 0 writes `result.json`; the fingerprints of the steps go to `integrity.jsonl`, as in a run.
"""

import sys
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.training import main as training_main


def replay(plan: Plan, run_dir: RunDir) -> None:
    """Resume from the first valid checkpoint in `replay.json`, and train to the step given there.

    Raises:
        UserError: a run would fail with it too.
        NoValidCheckpointError: none of the checkpoints is valid.
    """
    from accelerate.utils import gather_object
    from transformers import TrainerCallback

    from sft_recipes.training.checkpoint import resume
    from sft_recipes.training.integrity import fingerprint

    arguments = training_main.configure(plan, run_dir)
    # Neither changes what a step does: an evaluation draws no random number, and nothing is saved here.
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.eval_on_start = False
    trainer = training_main.build(plan, run_dir, arguments, read_json(run_dir.prepared))
    request = read_json(run_dir.replay)
    until = dict(request["candidates"])
    point, skipped = resume.find_valid(RunDir(Path(request["run"])), list(until), plan.run_id, trainer.accelerator)
    if point is None:
        raise resume.NoValidCheckpointError(f"{request['run']}: no valid checkpoint of this run ({'; '.join(skipped)})")
    integrity = point.record["integrity"]
    trainer.integrity.data_order.rows_hash = integrity["rows_hash"]

    class LoadedStateRecorder(TrainerCallback):  # type: ignore[misc]
        """Writes the result at the start of training, and stops after the last step that can be compared.

        All state is loaded then, except random number states: the Trainer restores these from the same file after the
        first batch, or before the first batch of an epoch.
        """

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer._load_rng_state(str(point.path))
            loaded = gather_object([fingerprint.of_rank(trainer)])
            if state.is_world_process_zero:
                result = {"step": point.step, "saved": integrity["fingerprints"], "loaded": loaded, "skipped": skipped}
                write_json(run_dir.result, result)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Without a step to compare, the first one is discarded: the Trainer takes at least one.
            control.should_training_stop = state.global_step >= until[point.step]

    trainer.add_callbacks([LoadedStateRecorder()])
    trainer.train(resume_from_checkpoint=str(point.path))


if __name__ == "__main__":
    training_main.run_rank(sys.argv[1], replay)
