"""Report the status of a run: its state, its Slurm job, the latest metrics, and the remaining time."""

from __future__ import annotations

import statistics
from typing import Any

from sft_recipes.monitor import metrics_log
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.runtime.units import format_duration

_RECENT_LINES = 20  # whose median step time gives the remaining time
_METRICS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


def facts(folder: RunDir, held_by: str | None, job: dict[str, str] | None) -> dict[str, Any]:
    """Collect the status of a run; unknown values are None.

    Args:
        held_by: the live process that executes the run.
        job: Slurm's record of the run's latest job.
    """
    manifest, plan = read_json(folder.manifest), read_json(folder.plan)
    state = folder.state()
    if held_by is None and state == "running":
        state = "interrupted"
    elif held_by is not None and state != "running":
        state = "starting"
    try:
        run = metrics_log.read(folder)
    except UserError:  # nothing logged yet
        run = None
    last = run.training[-1] if run and run.training else {}
    validation = run.points("eval_loss")[-1:] if run else []
    step, steps = run.last_step if run else 0, manifest.get("optimizer_steps") or plan.get("optimizer_steps")
    step_seconds = [seconds for _, seconds in run.points("step_seconds")[-_RECENT_LINES:]] if run else []
    unfinished = steps is not None and step_seconds and state in ("running", "stopped", "interrupted", "starting")
    return {
        "run": str(folder.path),
        "state": state,
        "held_by": held_by,
        "job": job,
        "init_from": plan.get("init_from"),
        "step": step,
        "optimizer_steps": steps,
        "epoch": last.get("epoch"),
        **{key: last.get(key) for key in _METRICS},
        "eval_loss": validation[0][1] if validation else None,
        "eval_step": validation[0][0] if validation else None,
        "seconds_left": round((steps - step) * statistics.median(step_seconds)) if unfinished else None,
        "checkpoint": folder.latest_complete() or None,
        "error": manifest.get("error"),
    }


def text(status: dict[str, Any]) -> list[str]:
    """The status as `key: value` lines."""
    process = f" ({status['held_by']})" if status["held_by"] else ""
    lines = [f"run: {status['run']}", f"state: {status['state']}{process}"]
    if status["job"]:
        lines.append(job_line(status["job"]))
    if status["init_from"]:
        lines.append(f"init_from: {status['init_from']['run']} (step {status['init_from']['step']:,})")
    total = f" of {status['optimizer_steps']:,}" if status["optimizer_steps"] else ""
    epoch = f", epoch {status['epoch']:.2f}" if status["epoch"] is not None else ""
    lines.append(f"step: {status['step']:,}{total}{epoch}")
    checkpoint = f"checkpoint-{status['checkpoint']}" if status["checkpoint"] else "none"
    lines.append(f"checkpoint: {checkpoint}")
    lines += [f"{key}: {status[key]:.4g}" for key in _METRICS if isinstance(status[key], float)]
    if status["eval_loss"] is not None:
        lines.append(f"eval_loss: {status['eval_loss']:.4g} (step {status['eval_step']:,})")
    if status["seconds_left"] is not None:
        lines.append(f"eta: {format_duration(status['seconds_left'])}")
    if status["error"]:
        lines.append(f"error: {status['error']}")
    return lines


def job_line(job: dict[str, str]) -> str:
    """Slurm's record of a job as a line."""
    return f"job: {', '.join(f'{key} {value}' for key, value in job.items() if value)}"
