"""The last lines of a finished run."""

from typing import Any

from sft_recipes.config.schema import OVERFIT_LOSS
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir


def describe_overfit_failure(plan: Plan, folder: RunDir, results: dict[str, Any]) -> str | None:
    """Return the error of a run that should overfit (OVERFIT=1) and has not; None for any other."""
    loss = results["last_eval_loss"]
    if plan.sections.data.overfit_rows is None or loss < OVERFIT_LOSS:
        return None
    steps = results["steps"]
    fix = f"Set trainer.max_steps={2 * steps} or another trainer.learning_rate, or check `make inspect OVERFIT=1`"
    return f"{folder.path}: overfit: found loss {loss:.4f} after {steps} steps, expected below {OVERFIT_LOSS}. {fix}"


def format_summary(plan: Plan, folder: RunDir, results: dict[str, Any]) -> str:
    """Return what was trained, how well, and the next command, one `key  value` per line.

    Args:
        results: content of `manifest.json`.
    """
    best = "no complete best step, final/ is the last step"
    if results["best_step"] is not None:
        best = f"{results['best_eval_loss']:.4f} best (step {results['best_step']})"
    tokens, minutes = results["supervised_tokens_seen"], results["training_seconds"] / 60
    lines = {
        "trained": f"{plan.model}, {results['steps']} steps, {tokens:,} supervised tokens, {minutes:.1f} minutes",
        "eval_loss": f"{results['first_eval_loss']:.4f} first, {best}",
    }
    for name, found in results["held_out_metrics"].items():
        start = "" if found["before"] is None else f"{found['before']:.3f} before, "
        lines[name] = f"{start}{found['after']:.3f} after, {found['prompts']} held-out prompts"
    if rows := plan.sections.data.overfit_rows:
        lines["overfit"] = f"loss {results['last_eval_loss']:.4f} on at most {rows} rows, expected below {OVERFIT_LOSS}"
    lines["model"] = f"{folder.final} (best step), {folder.last.name}/ (last step)"
    lines["next"] = f"make generate RUN={folder.name} PROMPT='...'"
    return "\n".join(f"{key:<11}  {value}" for key, value in lines.items())
