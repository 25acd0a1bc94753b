"""Compares values of a recipe key by short runs: each trains on a fraction of an epoch, with a schedule of its length.

Every run is a normal one in `runs/`, named after its value; the sweep's results are in `runs/.sweeps/NAME/`.
"""

import dataclasses
import logging
import math
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import TABLE_KEYS, Recipe, key_types
from sft_recipes.config.sizes import scientific, size_class_of, size_classes
from sft_recipes.monitor import plots
from sft_recipes.planner import render
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import EXIT_DIVERGED, RunDir, read_json, runs_root, write_json
from sft_recipes.runtime.units import format_duration

log = logging.getLogger(__name__)

LEARNING_RATE = "trainer.learning_rate"
# Two-sided 95% quantiles of Student's t by degrees of freedom, 1 to 10; more have a smaller one.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
CAVEAT = (
    "short runs favour larger learning rates: their schedule ends early, and overfitting and instability need time to "
    "show. Compare the winner with the recipe's value in a full run before you rely on it"
)


@dataclass(frozen=True)
class Sweep:
    """What is compared; a repeated command continues the sweep that has the same.

    Attributes:
        fraction: epochs of each run.
        seeds: runs of each value, which differ in the order of rows and, from scratch, in the initial weights.
        overrides: of the command, for every run.
    """

    name: str
    recipe: str
    key: str
    values: list[str]
    seeds: int
    fraction: float
    overrides: list[str]

    def run_name(self, value: str, seed: int) -> str:
        """Return the name of a run."""
        suffix = f"-seed-{seed + 1}" if self.seeds > 1 else ""
        return RunDir.named(f"{self.name}-{re.sub(r'[^A-Za-z0-9.]+', '-', value)}{suffix}").name

    def overrides_of(self, recipe: Recipe, value: str, seed: int) -> list[str]:
        """Return the overrides of a run: the value, the fraction, and no intermediate checkpoints."""
        swept = self.key.rpartition(".")[2]
        allowed = {*recipe.allow_out_of_range, "num_train_epochs", *({swept} & set(TABLE_KEYS))}
        return [
            *self.overrides,
            f"{self.key}={value}",
            f"trainer.num_train_epochs={self.fraction:g}",
            "trainer.max_steps=-1",
            "trainer.save_steps=100000",
            f"trainer.seed={recipe.trainer['seed'] + seed}",
            f"trainer.data_seed={recipe.trainer['data_seed'] + seed}",
            f"allow_out_of_range=[{','.join(sorted(allowed))}]",
            "generation.show=0",
            "generation.score=0",
        ]

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return runs_root() / ".sweeps" / self.name


def make(recipe: Recipe, name: str | None, rates: str | None, swept: str | None, **rest: Any) -> Sweep:
    """Return the sweep of a command.

    Args:
        rates: learning rates with commas; without it and `swept` three over the range of the size class.
        swept: `key=value,value`.

    Raises:
        UserError: both are set, the key is unknown, or there are fewer than two values.
    """
    if rates and swept:
        raise UserError("LR, SWEEP: found both. Set one of them")
    key, _, text = swept.partition("=") if swept else (LEARNING_RATE, "", rates or default_rates(recipe))
    if key not in key_types():
        raise UserError(f"SWEEP: found the key {key!r}, expected a recipe key: SWEEP='trainer.weight_decay=0.01,0.1'")
    values = [value for value in text.split(",") if value]
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(f"{'SWEEP' if swept else 'LR'}: found {text!r}, expected two or more different values")
    return Sweep(name or f"{recipe.name}-sweep-{key.rpartition('.')[2]}", recipe.name, key, values, **rest)


def default_rates(recipe: Recipe) -> str:
    """Return the ends of the size class's range of learning rates, and their geometric mean."""
    low, high = size_classes()[size_class_of(recipe)].ranges["learning_rate"].range or (0.0, 0.0)
    return ",".join(scientific(rate) for rate in (low, math.sqrt(low * high), high))


def describe_cost(sweep: Sweep, plan: Plan) -> str:
    """Return the number of runs, their steps and their forecast; `plan` is that of one run."""
    runs = len(sweep.values) * sweep.seeds
    text = f"sweep {sweep.name}: {runs} runs of {sweep.fraction:g} epochs, about {plan.optimizer_steps} steps each"
    if not plan.forecast or not plan.forecast["gpu_hours"]:
        return f"{text}; time: no forecast without a known GPU type"
    total = {key: runs * (value or 0) for key, value in plan.forecast.items()}
    cost = f", {total['money']:.2f} at GPU_HOUR_PRICE" if total["money"] else ""
    return f"{text}; forecast {format_duration(total['seconds'])}, {total['gpu_hours']:.1f} GPU-hours{cost}"


def run(sweep: Sweep, recipe: Recipe, train: Callable[[list[str]], int], keep: bool, job_array: bool) -> int:
    """Train what is missing, one run after the other or as a Slurm array, and report; return the exit code.

    Args:
        train: runs the command `train` with more arguments, and returns its exit code.
        keep: keep the models.

    Raises:
        UserError: a sweep of this name compares something else, or there is no script for the array.
    """
    settings = dataclasses.asdict(sweep)
    stored = read_json(sweep.folder / "sweep.json")
    for key, value in stored.items():
        if value != settings[key]:
            raise UserError(f"NAME: sweep {sweep.name} exists with the {key} {value!r}. Set another NAME")
    sweep.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(sweep.folder / "sweep.json", settings)
    pairs = [(value, seed) for seed in range(sweep.seeds) for value in sweep.values]
    missing = [pair for pair in pairs if _result(sweep, *pair) is None]
    if missing and job_array:
        return _submit(sweep, recipe, missing)
    for number, (value, seed) in enumerate(missing, len(pairs) - len(missing) + 1):
        name = sweep.run_name(value, seed)
        log.info(f"sweep {sweep.name}: run {number} of {len(pairs)}: {sweep.key}={value} ({name})")
        if number > 1:
            os.environ["SANITY"] = "skip"  # checked by the first run
        code = train(["--name", name, *sweep.overrides_of(recipe, value, seed)])
        if code not in (0, EXIT_DIVERGED):
            log.info(f"sweep {sweep.name}: {name} ended with exit code {code}. Repeat the command to continue")
            return code
    losses: dict[str, list[float]] = {value: [] for value in sweep.values}
    for value, seed in pairs:
        losses[value].append(_result(sweep, value, seed) or math.nan)
        for pattern in () if keep else ("checkpoint-*", "best-*", "final", "last"):
            for path in RunDir.named(sweep.run_name(value, seed)).path.glob(pattern):
                shutil.rmtree(path)
    result = describe_winner(sweep, losses)
    write_json(sweep.folder / "results.json", {**settings, "eval_loss": losses, "result": result})
    plot(sweep, losses)
    log.info("\n%s", report(sweep, losses))
    return 0


def _result(sweep: Sweep, value: str, seed: int) -> float | None:
    """Return the last validation loss of a run; NaN if it diverged, None if it is not finished."""
    manifest = read_json(RunDir.named(sweep.run_name(value, seed)).manifest)
    if manifest.get("state") == "diverged":
        return math.nan
    return float(manifest["last_eval_loss"]) if manifest.get("state") == "finished" else None


def _submit(sweep: Sweep, recipe: Recipe, missing: Sequence[tuple[str, int]]) -> int:
    """Submit the missing runs as one array, a line of `tasks.tsv` each: name and overrides (slurm/launch.sh)."""
    script = REPOSITORY / "slurm" / f"{sweep.recipe}.sh"
    if not script.is_file() or shutil.which("sbatch") is None:
        raise UserError(f"SLURM: expected sbatch and {script}. Without SLURM=1 the runs are sequential")
    tasks = sweep.folder / "tasks.tsv"
    lines = ["\t".join([sweep.run_name(*pair), *sweep.overrides_of(recipe, *pair)]) for pair in missing]
    write_atomic(tasks, "".join(f"{line}\n" for line in lines))
    command = ["sbatch", f"--array=0-{len(missing) - 1}", f"--export=ALL,SWEEP_TASKS={tasks.absolute()}", str(script)]
    log.info(" ".join(command))
    log.info("repeat the command without SLURM=1 once the jobs have ended: it reports the results")
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


def summarize(losses: Mapping[str, Sequence[float]]) -> list[tuple[str, float]]:
    """Return values with the mean of their losses, the lowest first; those with a diverged run last."""
    means = [(value, statistics.fmean(found)) for value, found in losses.items()]
    return sorted(means, key=lambda pair: (math.isnan(pair[1]), pair[1]))


def describe_winner(sweep: Sweep, losses: Mapping[str, Sequence[float]]) -> str:
    """Return which value is best, if the difference to the second is more than the spread over seeds explains.

    Student's t-test of two means with the standard deviation pooled over all values, at 95%.
    """
    (best, lowest), (second, next_lowest) = summarize(losses)[:2]
    if math.isnan(lowest):
        return "every value diverged"
    found = f"{sweep.key}={best}: eval_loss {lowest:.4f}"
    if math.isnan(next_lowest):
        return f"{found}; the others diverged"
    difference = f"{next_lowest - lowest:.4f} below {second}"
    if sweep.seeds < 2:
        return f"{found}, {difference}; one seed: the spread is not known. SEEDS=2 measures it"
    groups = [values for values in losses.values() if not any(map(math.isnan, values))]
    degrees = sum(len(values) - 1 for values in groups)
    pooled = sum(statistics.variance(values) * (len(values) - 1) for values in groups) / degrees
    limit = _QUANTILES[min(degrees, len(_QUANTILES)) - 1] * math.sqrt(2 * pooled / sweep.seeds)
    if next_lowest - lowest > limit:
        return f"{found}, {difference} (significant: more than {limit:.4f})"
    difference = f"{next_lowest - lowest:.4f}, expected more than {limit:.4f}"
    return f"no significant difference between {best} and {second}: {difference}"


def report(sweep: Sweep, losses: Mapping[str, Sequence[float]]) -> str:
    """Return the table, the result, the line for the recipe, and the caveat."""
    rows = [[sweep.key, "eval_loss", "spread" if sweep.seeds > 1 else "", "runs"]]
    for value, mean in summarize(losses):
        spread = f"{max(losses[value]) - min(losses[value]):.4f}" if sweep.seeds > 1 and not math.isnan(mean) else ""
        names = ", ".join(sweep.run_name(value, seed) for seed in range(sweep.seeds))
        rows.append([value, "diverged" if math.isnan(mean) else f"{mean:.4f}", spread, names])
    result = describe_winner(sweep, losses)
    lines = [render.format_table(rows), "", f"result      {result}"]
    if result.startswith(sweep.key):
        section, _, key = sweep.key.rpartition(".")
        lines.append(f"recipe      {section}: {{{key}: {summarize(losses)[0][0]}}}")
    lines.append(f"plot        {sweep.folder / 'sweep.svg'}")
    if sweep.key == LEARNING_RATE:
        lines.append(f"note        {CAVEAT}")
    return "\n".join(lines)


def plot(sweep: Sweep, losses: Mapping[str, Sequence[float]]) -> None:
    """Write `sweep.svg`: the mean loss of each value, equally spaced, with the range over seeds."""
    groups = {value: found for value, found in losses.items() if not any(map(math.isnan, found))}
    means, lowest, highest = ([summary(found) for found in groups.values()] for summary in (statistics.fmean, min, max))
    with plots.drawing((6.4, 3.4)) as (canvas, axes):
        axes.plot(list(groups), means, color=plots.BLUE, marker="o")
        axes.vlines(list(groups), lowest, highest, color=plots.BLUE)
        axes.set_xlabel(sweep.key)
        axes.set_ylabel("validation loss (nats per token)")
        canvas.savefig(sweep.folder / "sweep.svg", metadata={"Date": None})
