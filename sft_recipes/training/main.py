"""Main program of every rank: trains the model of a plan on its prepared rows. Read from top to bottom.

Started by `accelerate launch … -m sft_recipes.training.main PLAN`, never by hand. Rank 0 writes `outcome.json`, which
gives the launcher the exit code: `accelerate launch` reports every failure as 1.
"""

import importlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import env, heartbeat, library_imports
from sft_recipes.runtime import log as run_log
from sft_recipes.runtime.errors import SetupError, TrainingError, UserError
from sft_recipes.runtime.run_dir import EXIT_DIVERGED, EXIT_ERROR, EXIT_STOPPED, EXIT_USER, RunDir, read_json
from sft_recipes.training import manifest, out_of_memory, patches, rank_heartbeat, stop_signal
from sft_recipes.training.library_logging import silence_libraries

log = logging.getLogger("sft_recipes.training.main")  # __name__ is "__main__" in a rank


def run_rank(plan_file: str, program: Callable[[Plan, RunDir], None]) -> NoReturn:
    """Run a program on this rank and exit; with 0 also at an error that is the same on all ranks, which rank 0 records
    in `outcome.json`."""
    plan, folder, rank = begin(plan_file)
    with rank_heartbeat.record_exit():
        try:
            program(plan, folder)
        except (UserError, TrainingError) as error:
            is_user_error = isinstance(error, UserError)
            if rank == 0:
                manifest.end(folder, "failed", EXIT_USER if is_user_error else EXIT_ERROR, error=str(error))
            if is_user_error:
                raise
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            line = out_of_memory.describe(plan, rank, error)
            manifest.end(folder, "failed", EXIT_ERROR, error=line, out_of_memory=True)
            sys.exit(EXIT_ERROR)  # the other ranks wait in a collective: the launcher terminates them
    exit_process()


def begin(plan_file: str) -> tuple[Plan, RunDir, int]:
    """Start a program of a rank: handle signals, start the heartbeat, read the plan, import libraries.

    Returns:
        The plan, its run directory and the rank.
    """
    heartbeat.die_with_parent(int(os.environ[heartbeat.LAUNCHER_PID]))
    folder, rank = RunDir(Path(plan_file).parent), int(os.environ.get("RANK", "0"))
    _redirect_output(rank)
    stop_signal.handle()
    rank_heartbeat.start(folder, rank)
    plan = plans.read(folder.plan)
    import_libraries(plan)
    return plan, folder, rank


def import_libraries(plan: Plan) -> None:
    """Import the trainer with the libraries that a plan needs."""
    optimizer = plan.sections.trainer.get("optim", "adamw_torch_fused")
    trusted = plan.sections.model.trust_remote_code
    with library_imports.without_garbage_collection():
        library_imports.skip_unused_libraries(plan.method, optimizer, env.reporters(), plan.strategy.deepspeed, trusted)
        silence_libraries()
        importlib.import_module("sft_recipes.training.trainer")


def _redirect_output(rank: int) -> None:
    """Write the output of a rank other than 0 to a separate file in a job of several nodes (SFT_RECIPES_LOGS)."""
    logs = os.environ.get("SFT_RECIPES_LOGS")
    if logs and rank:
        with (Path(logs) / f"rank-{rank}.txt").open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)


def exit_process() -> NoReturn:
    """Exit with 0 without Python's finalization, where a gloo thread that frees its last tensor can abort the process
    (seen once; compare https://github.com/pytorch/pytorch/issues/65231): a run that is complete on disk would fail."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def train(plan: Plan, folder: RunDir) -> None:
    """Run one attempt, from the latest valid checkpoint.

    Raises:
        SetupError: the model cannot be loaded, or the ranks are not the plan's.
        TrainingError: the run stopped with an error that is the same on all ranks.
    """
    from sft_recipes.training import completions, parameter_table
    from sft_recipes.training.weight_files import PublishedCopy

    started = time.monotonic()
    arguments = configure(plan, folder)
    is_main = arguments.distributed_state.is_main_process
    if is_main:
        run_log.to_console()
        run_log.to_file(folder.log)
        manifest.begin(folder, plan)
        # `to_dict` hides tokens.
        folder.configuration.write_text(json.dumps(arguments.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")
    else:
        run_log.silence()
    data = read_json(folder.prepared)
    trainer = build(plan, folder, arguments, data)
    base = plan.parent.final if plan.parent else Path(data["model"])  # whose dtypes final/ gets
    copy_file = PublishedCopy(base) if plan.method == "full" else shutil.copy2
    table = parameter_table.count(trainer.model)
    for line in parameter_table.lines(plan, table):
        log.info(line)
    if is_main:
        manifest.update(folder, parameters=table)
    trainer.add_callbacks(make_callbacks())
    trainer.check_first_save()
    before = completions.complete_before_training(trainer)

    training_started = time.monotonic()
    diverged = run_steps(plan, folder, trainer)
    times = {"training_seconds": time.monotonic() - training_started}
    finished = diverged is None and not trainer.stopping.stopped
    results = publish(plan, folder, trainer, copy_file) if finished else {}
    if not is_main:
        return
    if finished:
        rank_heartbeat.beat(trainer.state.global_step, "ending")
        after = completions.complete_after_training(trainer)
    times["seconds"] = time.monotonic() - started
    if diverged is not None:
        record_divergence(folder, trainer, diverged, times)
    elif trainer.stopping.stopped:
        record_stop(folder, trainer, times)
    else:
        record_result(plan, folder, {**results, **times}, before, after)


def configure(plan: Plan, folder: RunDir) -> Any:
    """Initialize the process group and return the trainer's arguments.

    Raises:
        SetupError: TRL rejects a value, an operator of DeepSpeed does not compile, or the number of ranks is not the
            plan's: accelerate can silently start one process.
    """
    from sft_recipes.training import deepspeed_ops, sft_config

    try:
        arguments = sft_config.make_sft_config(plan, folder)
    except (ValueError, TypeError) as error:
        raise SetupError(f"trainer: {str(error).splitlines()[0]}") from error
    if arguments.world_size != plan.world_size:
        raise SetupError(f"ranks: found {arguments.world_size}, expected {plan.world_size} as in the plan")
    if plan.strategy.deepspeed:
        deepspeed_ops.build_operators(plan)
    patches.apply(plan)
    return arguments


def build(plan: Plan, folder: RunDir, arguments: Any, data: dict[str, Any]) -> Any:
    """Return the trainer over prepared rows.

    Args:
        data: `prepared.json`: folders of the rows and of the base model, and its architecture.

    Raises:
        SetupError: the model cannot be loaded, or does not fit the rows.
    """
    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import dataset, initial_weights, lora, model
    from sft_recipes.training.callbacks.heartbeat_callback import HeartbeatCallback
    from sft_recipes.training.strategy import StrategyCheckCallback
    from sft_recipes.training.trainer import RecipeTrainer

    if plan.parent:
        initial_weights.verify(plan.parent.last, arguments.distributed_state)
    section, base, prepared = plan.sections.model, data["model"], Path(data["folder"])
    details = read_json(prepared / "details.json")
    tokenizer = load_tokenizer(base, section.chat_template, section.trust_remote_code, section.add_tokens)
    loaded, attention, end_of_turn_ids = model.build_model(plan, base, tokenizer, details)
    log.info("attention: %s", attention)
    rows_per_pass = plan.per_device_train_batch_size * plan.world_size
    rows, validation, passes = dataset.read_rows(prepared, details, rows_per_pass)
    trainer = RecipeTrainer(
        plan,
        passes,
        data,
        model=loaded,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=dataset.make_collator(plan, tokenizer.pad_token_id, attention.name),
        peft_config=lora.make_lora_config(plan, Path(base), loaded),
    )
    trainer.end_of_turn_ids = end_of_turn_ids
    trainer.add_callbacks([HeartbeatCallback(), StrategyCheckCallback()])
    if plan.parent and plan.method != "full":
        trainer.load_weights(plan.parent.last)
    if plan.parent and plan.dtypes["weights"] != plan.dtypes["master"]:
        trainer.add_callbacks([initial_weights.MasterWeightsCallback()])
    return trainer


def make_callbacks() -> list[Any]:
    """Return the callbacks of a run, in the order in which they are called."""
    from sft_recipes.training.callbacks import alerts, console, generation, keep_best, metrics, trackers

    return [
        keep_best.RetentionCallback(),
        metrics.MetricsCallback(),
        generation.GenerationCallback(),
        *(trackers.TrackerCallback(name) for name in env.reporters()),
        console.ConsoleCallback(),
        alerts.AlertCallback(),
    ]


def run_steps(plan: Plan, folder: RunDir, trainer: Any) -> Any:
    """Take the remaining steps from the latest valid checkpoint. Collective: call on every rank.

    Returns:
        The `DivergedError` that stopped the run, if one did.
    """
    from transformers import TrainerState

    from sft_recipes.training.callbacks import alerts, metrics
    from sft_recipes.training.callbacks.graceful_stop import StoppedAtStartError
    from sft_recipes.training.checkpoint import reshard, resume, retention
    from sft_recipes.training.nan_guard import DivergedError

    arguments, resume_from = trainer.args, None
    checkpoint = resume.find_latest_valid(plan, folder, trainer.accelerator)
    try:
        if checkpoint is not None:
            log.info("resuming from %s", checkpoint.path.name)
            trainer.supervised_tokens_seen = checkpoint.record["supervised_tokens_seen"]
            trainer.integrity.data_order.rows_hash = checkpoint.record["integrity"]["rows_hash"]
            # Without the weights, which `train` or `copy_model` bring.
            trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
            if checkpoint.step == plan.optimizer_steps or alerts.is_stopped_early(plan, trainer.state):
                metrics.write_summary(trainer)  # the Trainer itself would take one more step
                return None
        if trainer.stopping.stop_requested():
            return None
        if checkpoint is None:
            arguments.eval_on_start |= bool(plan.sections.data.retention_eval)  # which needs a baseline
        else:  # repeat an interrupted evaluation
            step, losses = checkpoint.step, retention.validation_losses(trainer.state.log_history)
            due = step % arguments.eval_steps == 0 and step >= arguments.eval_delay
            arguments.eval_on_start = due and step not in losses
            resume_from = str(reshard.prepare_checkpoint(plan, folder, checkpoint, trainer))
        trainer.train(resume_from_checkpoint=resume_from)
    except StoppedAtStartError:
        trainer.end_callbacks()
    except DivergedError as error:
        return error
    except TrainingError as error:
        trainer.end_callbacks()
        raise TrainingError(f"{folder.path}: {error}") from error
    return None


def publish(plan: Plan, folder: RunDir, trainer: Any, copy_file: Callable[[Path, Path], Any]) -> dict[str, Any]:
    """Write `last/`, in fp32 where the strategy exports it, and `final/`, the best step copied by `copy_file`.

    Collective: call on every rank.

    Returns:
        The run's results for the manifest.

    Raises:
        TrainingError: the disk refuses them; saved checkpoints stay complete, and a new attempt tries again.
    """
    from accelerate.utils import broadcast_object_list

    from sft_recipes.training.checkpoint import checkpoint_format, retention

    step, is_main = trainer.state.global_step, trainer.accelerator.is_main_process
    losses = retention.validation_losses(trainer.state.log_history)
    saved = step in checkpoint_format.list_own(folder, "checkpoint", plan.run_id)
    broadcast = [saved, retention.find_best_step(folder, losses, plan.run_id) if is_main else None]
    broadcast_object_list(broadcast)
    saved, best = broadcast
    is_16_bit = plan.dtypes["weights"] != plan.dtypes["master"]
    if saved and is_16_bit and plan.strategy.exports_master_weights:
        failure = trainer.save_weights(folder.last, masters_of=folder.checkpoint(step))
    elif saved:
        failure = trainer.copy_model(folder.checkpoint(step), folder.last)
    else:
        failure = trainer.save_weights(folder.last)
    failure = failure or trainer.copy_model(folder.best(best) if best else folder.last, folder.final, copy_file)
    if failure:
        raise TrainingError(f"{folder.path}: final model not saved: {failure}. Repeat the command to try again")
    if is_main:
        retention.remove_others(folder, losses, plan.run_id)
    return {
        "steps": step,
        "first_eval_loss": losses[min(losses)],
        "last_eval_loss": losses[max(losses)],
        "best_step": best,
        "best_eval_loss": losses.get(best),
        "tokens_seen": int(trainer.state.num_input_tokens_seen),
        "supervised_tokens_seen": trainer.supervised_tokens_seen,
    }


def record_divergence(folder: RunDir, trainer: Any, error: Any, times: dict[str, float]) -> None:
    """Record a divergence in metrics, trackers, manifest and outcome."""
    norm = {} if error.grad_norm is None else {"grad_norm": error.grad_norm}
    metrics = {"loss": error.loss, **norm, "learning_rate": trainer._get_learning_rate()}
    trainer.state.global_step = error.step
    trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, metrics)
    trainer.end_callbacks()
    steps = error.step if error.applied else error.step - 1
    applied = "stopped by the monitor after the step" if error.applied else "no rank applied the step"
    rows = f"; rows: {', '.join(error.rows)}" if error.rows else ""
    line = f"{folder.path}: step {error.step}: {error}; {applied}{rows}. Run `make diagnose RUN={folder.name}`"
    manifest.end(folder, "diverged", EXIT_DIVERGED, error=line, steps=steps, diverged=error.record(), **times)


def record_stop(folder: RunDir, trainer: Any, times: dict[str, float]) -> None:
    """Record a run that stopped on request."""
    step, saved = trainer.state.global_step, read_json(folder.manifest).get("saved_step")
    manifest.end(folder, "stopped", EXIT_STOPPED, steps=step, **times)
    restart = "saved; repeat the command to resume" if saved == step else folder.describe_restart()
    log.info("stopped at step %d, %s", step, restart)


def record_result(plan: Plan, folder: RunDir, results: dict[str, Any], before: Any, after: Any) -> None:
    """Record a finished run and print its summary.

    Args:
        before: `Completions` before training, as stored; None if there are none.
        after: `Completions` after training; None if there are none.
    """
    import torch

    from sft_recipes.training import completions, summary
    from sft_recipes.training.callbacks import metrics

    started, values = before["metrics"] if before else {}, dict[str, Any]()
    results["held_out_metrics"] = {}
    for name, found in (after.metrics if after else {}).items():
        first = started.get(name, {}).get("mean")
        results["held_out_metrics"][name] = {"before": first, "after": found["mean"], "prompts": found["prompts"]}
        values |= {f"final/{name}": found["mean"]} | ({} if first is None else {f"final/{name}_before": first})
    metrics.add_to_summary(folder.metrics, values)
    if torch.cuda.is_available():
        results["peak_memory_bytes"] = torch.cuda.max_memory_reserved()
    error = summary.describe_overfit_failure(plan, folder, results)
    recorded = manifest.end(folder, "finished", EXIT_ERROR if error else 0, error=error, **results)
    if after is not None and plan.sections.generation.show:
        log.info("\n%s", completions.format_examples(before, after, plan.sections.generation.show))
    log.info("\n%s", summary.format_summary(plan, folder, recorded))


if __name__ == "__main__":
    run_rank(sys.argv[1], train)
