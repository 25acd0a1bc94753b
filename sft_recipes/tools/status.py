"""Report the status of a run: its state, its Slurm job, the latest metrics, and the remaining time."""

import statistics
from typing import Any

from sft_recipes.launch import run_lock, slurm
from sft_recipes.monitor import metrics_log
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.runtime.units import format_duration

_RECENT_LINES = 20  # whose median step time gives the remaining time
_METRICS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


def facts(folder: RunDir) -> dict[str, Any]:
    """Collect the status of a run: its state, the live process that executes it (`held_by`), Slurm's record of its
    latest job, and its metrics; unknown values are None."""
    manifest, plan = read_json(folder.manifest), read_json(folder.plan)
    starts = manifest.get("starts") or [{}]
    state, held_by = folder.state(), run_lock.holder(folder)
    if held_by is None and state == "running":
        state = "interrupted"
    elif held_by is not None and state != "running":
        state = "starting"
    try:
        run = metrics_log.read(folder)
    except UserError:  # nothing logged yet
        run = None
    last = next((line for line in reversed(run.lines) if "loss" in line), {}) if run else {}
    eval_step, eval_loss = next(reversed(run.points("eval_loss")), (None, None)) if run else (None, None)
    step, steps = run.last_step if run else 0, manifest.get("optimizer_steps") or plan.get("optimizer_steps")
    step_seconds = [seconds for _, seconds in run.points("step_seconds")[-_RECENT_LINES:]] if run else []
    unfinished = steps is not None and step_seconds and state in ("running", "stopped", "interrupted", "starting")
    return {
        "run": str(folder.path),
        "state": state,
        "held_by": held_by,
        "job": slurm.query_job(starts[-1].get("job", {}).get("id")),
        "init_from": plan.get("init_from"),
        "step": step,
        "optimizer_steps": steps,
        "epoch": last.get("epoch"),
        **{key: last.get(key) for key in _METRICS},
        "eval_loss": eval_loss,
        "eval_step": eval_step,
        "seconds_left": round((steps - step) * statistics.median(step_seconds)) if unfinished else None,
        "checkpoint": folder.latest_complete() or None,
        "error": manifest.get("error"),
    }


def text(status: dict[str, Any]) -> list[str]:
    """The status as `key: value` lines, without unknown values."""
    parent, job, seconds = status["init_from"], status["job"], status["seconds_left"]
    lines = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in status.items()} | {
        "job": job and ", ".join(f"{key} {value}" for key, value in job.items() if value),
        "init_from": parent and f"{parent['run']} (step {parent['step']:,})",
        "seconds_left": seconds and f"{seconds} ({format_duration(seconds)})",
    }
    return [f"{key}: {value}" for key, value in lines.items() if value is not None]
