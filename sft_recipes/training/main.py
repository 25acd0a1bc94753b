"""The main program of every rank: from a plan and prepared rows to a trained model, read from top to bottom.

Started by `accelerate launch … -m sft_recipes.training.main PLAN`, never by hand. Rank 0 writes the outcome, from which
the launcher takes the exit code, since `accelerate launch` makes every failure 1.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import cuda, env, heartbeat, library_imports, log
from sft_recipes.runtime.errors import SetupError, TrainingError, UserError
from sft_recipes.runtime.run_dir import EXIT_DIVERGED, EXIT_STOPPED, RunDir, read_json, write_json
from sft_recipes.training import manifest, out_of_memory, rank_heartbeat, stop_signal
from sft_recipes.training.library_logging import quiet

if TYPE_CHECKING:
    from sft_recipes.training.checkpoint.resume import ResumePoint
    from sft_recipes.training.nan_guard import DivergedError

logger = logging.getLogger("sft_recipes.training.main")  # __name__ is "__main__" in a rank


class SaveFailedError(TrainingError):
    """The trained model could not be written."""


def main(plan_file: str) -> None:
    """Carries out the plan; leaves with 0 also where the user's input was wrong, which the outcome tells."""
    plan, folder, rank = begin(plan_file)
    with rank_heartbeat.record_exit():
        try:
            train(plan, folder)
        except UserError as error:
            if rank == 0:
                manifest.end(folder, "failed", 2)
                write_json(folder.outcome, {"exit_code": 2, "error": str(error)})
            raise
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.ran_out(error):
                raise
            line = out_of_memory.what_ran_out(plan, rank, error)
            manifest.end(folder, "failed", 1, error=line)
            write_json(folder.outcome, {"exit_code": 1, "error": line, "out_of_memory": True})
            sys.exit(1)  # the other ranks wait in a collective: the parent ends them
        except TrainingError as error:  # on all ranks alike
            if rank == 0:
                manifest.end(folder, "failed", 1, error=str(error))
                write_json(folder.outcome, {"exit_code": 1, "error": str(error)})


def begin(plan_file: str) -> tuple[Plan, RunDir, int]:
    """What every program of a rank begins with: it ends with its launcher, hears signals, is watched, knows plan and
    rank, and has its libraries."""
    heartbeat.die_with_parent(int(os.environ[heartbeat.LAUNCHER_PID]))
    folder, rank = RunDir(Path(plan_file).parent), int(os.environ.get("RANK", "0"))
    _write_to_a_log_of_its_own(rank)
    stop_signal.handle()
    rank_heartbeat.start(folder, rank)
    plan = plans.read(folder.plan)
    with library_imports.swiftly():
        library_imports.leave_out_what_is_not_used(plan)
        quiet()
        importlib.import_module("sft_recipes.training.trainer")
        if plan.strategy.deepspeed:
            library_imports.deepspeed()
    return plan, folder, rank


def _write_to_a_log_of_its_own(rank: int) -> None:
    """In a job of several nodes (SFT_RECIPES_LOGS) what ranks print lies apart; rank 0 speaks for all where it is."""
    logs = os.environ.get("SFT_RECIPES_LOGS")
    if logs and rank:
        log = os.open(Path(logs) / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)


def leave() -> NoReturn:
    """Ends a rank that is done, past Python's own way out, where a thread of gloo that lets go of its last tensor can
    abort the process (seen once; of such an end tells https://github.com/pytorch/pytorch/issues/65231): a run that is
    whole on disk would have failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def train(plan: Plan, folder: RunDir) -> None:
    """One start of a run, from where its newest whole checkpoint left it.

    Raises:
        SetupError: the model cannot be loaded, or the ranks are not those of the plan.
    """
    started = time.monotonic()
    from sft_recipes.training.nan_guard import DivergedError
    from sft_recipes.training.weight_files import PublishedCopy

    arguments = configure(plan, folder)
    main = arguments.distributed_state.is_main_process
    found = read_json(folder.prepared)
    prepared = Path(found["folder"])
    if main:
        manifest.begin(folder, plan)
        _write_configuration(arguments, folder)
    parts = build(plan, folder, arguments, found)
    published = PublishedCopy(Path(found["model"])) if plan.method == "full" else shutil.copy2
    sft = parts.trainer
    if main:
        log.to_console()
        log.to_file(folder.log)
    else:
        log.silence()
    sft.say = logger.info
    sft.say(parts.attention)
    sft.add_callbacks(watchers(plan, folder, prepared, parts))
    point = _newest(plan, folder, sft)
    before = _before(plan, folder, sft, prepared, parts.ends_of_turn)

    training_started = time.monotonic()

    def seconds() -> dict[str, float]:
        return {"seconds": time.monotonic() - started, "training_seconds": training_ended - training_started}

    try:
        _train(plan, folder, parts, point)
        diverged = None
    except DivergedError as error:
        diverged = error
    except TrainingError as error:
        sft.end_callbacks()
        raise TrainingError(f"{folder.path}: {error}") from error
    training_ended = time.monotonic()
    if diverged is None and not parts.stopping.stopped:
        figures = _publish(plan, folder, sft, point, published)
    if not main:
        return
    if diverged is not None:
        _diverged(folder, sft, diverged, seconds())
        return
    if parts.stopping.stopped:
        _stopped(folder, sft, seconds())
        return
    rank_heartbeat.beat(sft.state.global_step, "ending")
    after = _after(plan, folder, sft, prepared, parts.ends_of_turn)
    figures["exact_match_before"] = before.exact_match if before else None
    figures["exact_match_after"] = after.exact_match if after else None
    recorded = manifest.end(folder, "finished", 0, **seconds(), **figures, **manifest.peak_memory())
    write_json(folder.outcome, {"exit_code": 0})
    sft.say(summary(plan, folder, recorded, before, after))


def _newest(plan: Plan, folder: RunDir, sft: Any) -> ResumePoint | None:
    """The whole checkpoint that this start goes on from, and what the user is told of it."""
    from sft_recipes.training.checkpoint import resume

    point = resume.find_latest_valid(plan, folder, sft.accelerator)
    if sft.accelerator.is_main_process:
        resume.remove_incomplete(folder)
    if point is not None:
        sft.supervised_tokens_seen = point.record["supervised_tokens_seen"]
        sft.integrity.restore_state(point.record["integrity"])
        logger.info("resuming from %s", point.path.name)
    if plan.shards_parameters and plan.sections.generation.show:
        sft.say(f"no answers are shown while it trains: under {plan.parallelism} no rank holds the whole model")
    return point


def _train(plan: Plan, folder: RunDir, parts: Parts, point: ResumePoint | None) -> None:
    """The steps that are left."""
    from sft_recipes.training.callbacks import alerts
    from sft_recipes.training.callbacks.graceful_stop import StoppedAtStartError
    from sft_recipes.training.checkpoint import reshard

    sft = parts.trainer
    if point is not None:
        sft.restore_state(point.path)
        if point.step == plan.optimizer_steps or alerts.is_stopped_early(plan, sft.state):
            sft.write_summary()  # the Trainer itself would take one step more
            return
    if parts.stopping.stop_requested():
        return
    # What the model could do before is measured before its first step; and an evaluation that a stop cut short again.
    asked = sft.args.eval_on_start or bool(plan.sections.data.retention_eval)
    sft.args.eval_on_start = asked if point is None else _evaluation_is_missing(sft)
    try:
        sft.train(resume_from_checkpoint=str(reshard.prepare_checkpoint(plan, folder, point, sft)) if point else None)
    except StoppedAtStartError:
        sft.end_callbacks()


def _evaluation_is_missing(sft: Any) -> bool:
    from sft_recipes.training.checkpoint import retention

    step = sft.state.global_step
    due = step % sft.args.eval_steps == 0 and step >= sft.args.eval_delay
    return due and step not in retention.validation_losses(sft.state.log_history)


def _stopped(folder: RunDir, sft: Any, seconds: dict[str, float]) -> None:
    """Records a run that was asked to stop."""
    step, saved = sft.state.global_step, read_json(folder.manifest).get("saved_step")
    manifest.end(folder, "stopped", EXIT_STOPPED, steps=step, **seconds)
    write_json(folder.outcome, {"exit_code": EXIT_STOPPED})
    where = f"step {step}, saved" if saved == step else f"step {step}, the newest checkpoint is of step {saved or 0}"
    sft.say(f"stopped at {where}; the same command goes on from it")


def configure(plan: Plan, folder: RunDir) -> Any:
    """The trainer's arguments, once the ranks that were started are the plan's.

    Raises:
        SetupError: PyTorch cannot use the GPUs, TRL does not take a value, or the ranks are not those of the plan.
    """
    from sft_recipes.training import deepspeed_ops, strategy, torch_probe, trainer

    if plan.uses_gpu:  # not only by the launcher: a node's state may change, and this process may see other devices
        cuda.check(torch_probe.probe_cuda(), plan.gpus // plan.nodes, os.environ)
    if plan.strategy.deepspeed:
        deepspeed_ops.let_no_build_outlive_its_process()

    try:
        arguments = trainer.sft_config(plan, folder)
    except (ValueError, TypeError) as error:
        raise SetupError(f"trainer: {str(error).splitlines()[0]}") from error
    check_ranks(plan, arguments.world_size, os.environ)
    if plan.strategy.deepspeed:
        deepspeed_ops.build_operators(plan)
    if plan.uses_gpu or "SLURM_JOB_ID" in os.environ:
        check_cores(plan.world_size // plan.nodes, len(os.sched_getaffinity(0)), os.cpu_count() or 1)
    strategy.shard_on_the_cpu(plan)
    return arguments


@dataclass(frozen=True)
class Parts:
    """A trainer over prepared rows and what belongs to it; `ends_of_turn` are ids, `attention` is said to the user."""

    trainer: Any
    ends_of_turn: list[int]
    stopping: Any
    progress: Any
    attention: str


def build(plan: Plan, folder: RunDir, arguments: Any, found: dict[str, Any]) -> Parts:
    """The trainer over prepared rows, as `prepared.json` found them."""
    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import attention, lora, trainer, vocabulary
    from sft_recipes.training.callbacks.console import ConsoleCallback
    from sft_recipes.training.callbacks.heartbeat_callback import HeartbeatCallback
    from sft_recipes.training.callbacks.strategy_check import StrategyCheckCallback

    section, base, prepared = plan.sections.model, found["model"], Path(found["folder"])
    tokenizer = load_tokenizer(base, section.chat_template, section.trust_remote_code, section.add_tokens)
    model = load_model(plan, base)
    way = attention.settle(plan, model)
    details = read_json(prepared / "details.json")
    vocabulary.resize_embeddings(plan, model, tokenizer, details)
    ends_of_turn = vocabulary.set_stop_tokens(model, tokenizer, details)
    rows, held_out, passes = trainer.read_rows(prepared, details, plan.per_device_train_batch_size * plan.world_size)
    progress = ConsoleCallback(folder)
    sft = trainer.RecipeTrainer(
        plan,
        passes,
        found["architecture"],
        prepared,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=trainer.collator(plan, tokenizer.pad_token_id, way.name),
        peft_config=lora.configuration(plan, Path(base)),
    )
    sft.add_callbacks([HeartbeatCallback(), StrategyCheckCallback(plan, folder)])
    return Parts(sft, ends_of_turn, sft.stopping, progress, f"attention  {way}")


def watchers(plan: Plan, folder: RunDir, prepared: Path, parts: Parts) -> list[Any]:
    """What keeps, writes, shows and guards a run, in the order in which each is told."""
    from sft_recipes.training.callbacks import trackers
    from sft_recipes.training.callbacks.alerts import AlertCallback
    from sft_recipes.training.callbacks.generation import GenerationCallback
    from sft_recipes.training.callbacks.keep_best import RetentionCallback
    from sft_recipes.training.callbacks.metrics import MetricsCallback

    reporters = trackers.build(env.reporters(), plan, folder, parts.stopping)
    return [
        RetentionCallback(folder),
        MetricsCallback(folder, parts.stopping),
        GenerationCallback(plan, folder, prepared, reporters, parts.ends_of_turn),
        *reporters,
        parts.progress,
        AlertCallback(plan, folder),
    ]


def _diverged(folder: RunDir, sft: Any, error: DivergedError, seconds: dict[str, float]) -> None:
    """Records what was seen, where everybody looks: metrics and trackers, the manifest, the outcome."""
    what = error.what
    norm = {} if what.grad_norm is None else {"grad_norm": what.grad_norm}
    raw = {"loss": what.loss, **norm, "learning_rate": sft._get_learning_rate()}
    sft.state.global_step = what.step
    sft.callback_handler.on_log(sft.args, sft.state, sft.control, raw)
    sft.end_callbacks()
    taken = what.step if what.applied else what.step - 1
    manifest.end(folder, "diverged", EXIT_DIVERGED, steps=taken, diverged=error.record(), **seconds)
    stopped = "the recipe's guards stopped the run behind it" if what.applied else "it was not applied on any rank"
    line = f"{folder.path}: step {what.step}: {error}; {stopped}"
    if what.rows:
        line += f"; its rows: {', '.join(what.rows)}"
    write_json(folder.outcome, {"exit_code": EXIT_DIVERGED, "error": f"{line}; `make diagnose RUN={folder.name}`"})


def _publish(
    plan: Plan, folder: RunDir, sft: Any, point: ResumePoint | None, copy: Callable[[Path, Path], Any]
) -> dict[str, Any]:
    """Writes `last/` in the dtype of training and `final/`, the best step's weights copied by `copy`; returns the
    run's results.

    Collective: call on every rank.

    Raises:
        SaveFailedError: the disk does not take them; what the run has saved is whole, and a new start tries again.
    """
    from accelerate.utils import broadcast_object_list

    from sft_recipes.training.checkpoint import retention

    step = sft.state.global_step
    trained = point is None or point.step != step
    refused = sft.save_weights(folder.last) if trained else sft.copy_model(point.path, folder.last)
    losses = retention.validation_losses(sft.state.log_history)
    chosen = [retention.find_best_step(folder, losses, plan.run_id) if sft.accelerator.is_main_process else None]
    broadcast_object_list(chosen)
    refused = refused or sft.copy_model(folder.best(chosen[0]) if chosen[0] else folder.last, folder.final, copy)
    if refused:
        raise SaveFailedError(f"{folder.path}: the trained model is not saved: {refused}; the same command tries again")
    if sft.accelerator.is_main_process:
        retention.remove_others(folder, losses, plan.run_id)
    return {
        "steps": step,
        "first_eval_loss": losses[min(losses)],
        "best_step": chosen[0],
        "best_eval_loss": losses.get(chosen[0]),
        "tokens_seen": int(sft.state.num_input_tokens_seen),
        "supervised_tokens_seen": sft.supervised_tokens_seen,
    }


def check_ranks(plan: Plan, world_size: int, environment: Any) -> None:
    """Stops a run that is not the plan's: accelerate can start one process, or another engine, and say nothing.

    Raises:
        SetupError: another number of ranks, or DeepSpeed where the plan has none, or the other way round.
    """
    if world_size != plan.world_size:
        raise SetupError(f"{world_size} ranks were started where the plan has {plan.world_size}; nothing was trained")
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed != plan.strategy.deepspeed:
        got = "DeepSpeed" if deepspeed else "no DeepSpeed"
        raise SetupError(
            f"the launcher started {got} where the plan has parallelism {plan.parallelism}; nothing was trained"
        )


def check_cores(ranks: int, allowed: int, there: int) -> None:
    """Stops ranks that share fewer cores than they are, on a machine that has more: a night at a tenth of the speed.

    Args:
        ranks: of this node.
        allowed: cores that this rank may run on.
        there: cores of the machine.

    Raises:
        SetupError: with where that comes from.
    """
    if allowed < min(ranks, there):
        raise SetupError(
            f"{ranks} ranks may run on {allowed} of this node's {there} cores; give the task all of them: srun wants "
            f"SRUN_CPUS_PER_TASK (sbatch's --cpus-per-task does not reach it), a container --cpuset-cpus"
        )


def load_model(plan: Plan, folder: str) -> Any:
    """The model in a local folder, in the dtype that the plan has for its weights.

    Raises:
        SetupError: it cannot be loaded, or a weight that it needs is not in its files.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from sft_recipes.training import attention, lora

    section = plan.sections.model
    named = section.name_or_path or folder
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=lora.loaded_dtype(plan),
            attn_implementation=attention.loaded_with(plan),
            quantization_config=lora.quantization(plan),
            trust_remote_code=section.trust_remote_code,
            allow_all_kernels="/" in section.attention,  # the recipe names it, by its commit
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if out_of_memory.ran_out(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SetupError(
            f"model.name_or_path: {named} cannot be loaded ({reason}); name a folder that save_pretrained wrote, or a "
            f"model on the Hub of a kind that this version of transformers knows"
        ) from error
    absent = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
    if absent:
        raise SetupError(
            f"model.name_or_path: the weights of {named} lack {absent[0]} and {len(absent) - 1} more, which would be "
            f"random; bring the whole model"
        )
    if section.name_or_path and not Path(section.name_or_path).is_dir():
        # What adapters name as their base: the Hub's name, not the place of its cache on this machine.
        model.name_or_path = model.config._name_or_path = section.name_or_path
    return model


def summary(plan: Plan, folder: RunDir, figures: dict[str, Any], before: Any, after: Any) -> str:
    """The last lines of a run: some answers, what was trained, how well, how long, where it lies, what to type next."""
    from sft_recipes.training import completions

    lines = [""]
    if after is not None and plan.sections.generation.show:
        lines += [completions.show(before, after, plan.sections.generation.show), ""]
    tokens, minutes = figures["supervised_tokens_seen"], figures["training_seconds"] / 60
    lines.append(
        f"trained    {plan.model} on {tokens:,} supervised tokens: {figures['steps']} steps in {minutes:.1f} minutes"
    )
    best = "no best step's weights are whole, the last step's are taken"
    if figures["best_step"] is not None:
        best = f"{figures['best_eval_loss']:.4f} at the best (step {figures['best_step']})"
    lines.append(f"eval_loss  {figures['first_eval_loss']:.4f} at the first evaluation, {best}")
    if figures["exact_match_after"] is not None:
        was, now = figures["exact_match_before"], figures["exact_match_after"]
        started = f"{was:.3f} before, " if was is not None else ""
        lines.append(f"exact      {started}{now:.3f} after, of {after.compared} held-out prompts")
    lines.append(f"model      {folder.final} (the best; {folder.last.name}/ is the last step's)")
    lines.append(f"next       make generate RUN={folder.name} PROMPT='...'")
    return "\n".join(lines)


def _before(plan: Plan, folder: RunDir, sft: Any, prepared: Path, stop: list[int]) -> Any:
    """What the model answers before the first step; remembered across a resume."""
    from sft_recipes.training import completions

    if not sft.accelerator.is_main_process or not plan.strategy.replicated:
        return None  # under DeepSpeed and FSDP2 the model is not on its device before the first step
    if not folder.generations.is_file():
        answered = _answer(plan, sft, prepared, stop)
        write_json(folder.generations, {"before": asdict(answered) if answered else None})
    return completions.remembered(read_json(folder.generations).get("before"))


def _after(plan: Plan, folder: RunDir, sft: Any, prepared: Path, stop: list[int]) -> Any:
    """Answers of the published model to held-out prompts, after training."""
    if not plan.shards_parameters:
        sft.load_weights(folder.final)
    answered = _answer(plan, sft, prepared, stop)
    write_json(folder.generations, {**read_json(folder.generations), "after": asdict(answered) if answered else None})
    return answered


def _answer(plan: Plan, sft: Any, prepared: Path, stop: list[int]) -> Any:
    """Answers to held-out prompts; None where none are asked for, or no rank holds the whole model (ZeRO-3, FSDP2)."""
    from sft_recipes.training import completions

    asked = plan.sections.generation
    prompts = completions.read_prompts(prepared, asked.show, asked.exact_match)
    if not prompts or plan.shards_parameters:
        return None
    model = sft.accelerator.unwrap_model(sft.model)
    with sft.compute_loss_context_manager():  # fp32 weights compute in bf16 here too: flash attention takes no fp32
        return completions.answer(model, sft.processing_class, prompts, asked.exact_match, asked.max_new_tokens, stop)


def _write_configuration(arguments: Any, folder: RunDir) -> None:
    """The resolved SFTConfig; `to_dict` hides tokens."""
    folder.configuration.write_text(json.dumps(arguments.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
