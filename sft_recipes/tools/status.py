"""Says where a run stands: its state and that of its job, the newest figures, and how long it will take."""

from __future__ import annotations

import statistics
from typing import Any

from sft_recipes.monitor import metrics_log
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json

_STEPS_LOOKED_AT = 20
_FIGURES = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


def facts(folder: RunDir, held_by: str | None, job: dict[str, str] | None) -> dict[str, Any]:
    """What is known of a run; None for what is not.

    Args:
        held_by: the live process that carries it out.
        job: what Slurm says of the run's newest job.
    """
    manifest, plan = read_json(folder.manifest), read_json(folder.plan)
    state = folder.state()
    if held_by is None and state == "running":
        state = "cut off"
    elif held_by is not None and state != "running":
        state = "starting"
    try:
        run = metrics_log.read(folder)
    except UserError:  # nothing is logged yet
        run = None
    last = run.training[-1] if run and run.training else {}
    validation = run.points("eval_loss")[-1:] if run else []
    step, steps = run.last_step if run else 0, manifest.get("optimizer_steps") or plan.get("optimizer_steps")
    paces = [pace for _, pace in run.points("step_seconds")[-_STEPS_LOOKED_AT:]] if run else []
    going = steps is not None and paces and state in ("running", "stopped", "cut off", "starting")
    return {
        "run": str(folder.path),
        "state": state,
        "held_by": held_by,
        "job": job,
        "step": step,
        "optimizer_steps": steps,
        "epoch": last.get("epoch"),
        **{key: last.get(key) for key in _FIGURES},
        "eval_loss": validation[0][1] if validation else None,
        "eval_step": validation[0][0] if validation else None,
        "seconds_left": round((steps - step) * statistics.median(paces)) if going else None,
        "checkpoint": folder.latest_complete() or None,
        "error": manifest.get("error"),
    }


def text(found: dict[str, Any]) -> list[str]:
    """The facts as lines for a person."""
    lines = [f"run        {found['run']}: {found['state']}{_by(found['held_by'])}"]
    if found["job"]:
        lines.append(of_job(found["job"]))
    of = f" of {found['optimizer_steps']:,}" if found["optimizer_steps"] else ""
    epoch = f", epoch {found['epoch']:.2f}" if found["epoch"] is not None else ""
    kept = f"checkpoint-{found['checkpoint']} is the newest whole one" if found["checkpoint"] else "none saved yet"
    lines.append(f"step       {found['step']:,}{of}{epoch}; {kept}")
    shown = [f"{key} {found[key]:.4g}" for key in _FIGURES if isinstance(found[key], float)]
    if found["eval_loss"] is not None:
        shown.append(f"eval_loss {found['eval_loss']:.4g} at step {found['eval_step']:,}")
    if shown:
        lines.append(f"last       {', '.join(shown)}")
    if found["seconds_left"] is not None:
        lines.append(f"left       {_duration(found['seconds_left'])} of training")
    if found["error"]:
        lines.append(f"error      {found['error']}")
    return lines


def of_job(job: dict[str, str]) -> str:
    """What Slurm says of a job, as a line."""
    return f"job        {', '.join(f'{key} {value}' for key, value in job.items() if value)}"


def _by(held_by: str | None) -> str:
    return f", carried out by {held_by}" if held_by else ""


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"about {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"about {max(minutes, 1)} min"
