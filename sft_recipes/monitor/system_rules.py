"""Rules about the system while a run trains: failures, memory, data loading, throughput, ranks."""

from __future__ import annotations

import itertools
from statistics import median, mode

from sft_recipes.monitor import advice, detectors, stats
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.learning_rules import alerts_of
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.stats import Points
from sft_recipes.runtime.units import GIB


def failure(run: Run) -> Finding | None:
    """The run ended with an error."""
    if run.state != "failed":
        return None
    error = str(run.manifest.get("error") or f"exit code {run.manifest.get('exit_code', '?')}")
    changes = [f"uses less memory: `{change}`" for change in run.manifest.get("takes_less") or []]
    steps = [*changes, f"read the end of {run.folder.log}", f"resume: `{advice.resume_command(run)}`"]
    return Finding("failure", "error", run.last_step or None, error, steps)


def memory_growth(run: Run) -> Finding | None:
    """Memory that grows steadily: the GPU's where it is measured, else the host's."""
    on_gpu = len(run.points("memory_allocated_bytes")) >= 12
    points = run.points("memory_allocated_bytes" if on_gpu else "host_memory_bytes")
    points = points[len(points) // 10 :]  # caches fill during the first lines
    parts = stats.blocks(stats.values(points), 6)
    growth, rises = parts[-1] - parts[0], [after - before for before, after in itertools.pairwise(parts)]
    # One or two jumps are an allocator that settles at an evaluation.
    steady = (
        sum(rise > 0.05 * growth for rise in rises) >= 4
        and max(rises) <= growth / 2
        and parts[-1] - parts[3] >= 0.25 * growth
    )
    if not parts[0] or growth <= run.monitor.memory_growth * parts[0] or not steady:
        return None
    per_step = growth / max(points[-1][0] - points[0][0], 1)
    at_end = parts[-1] + per_step * (run.total_steps - points[-1][0])
    return Finding(
        "memory_growth",
        "error",
        points[0][0],
        f"{'GPU' if on_gpu else 'host'} memory grows steadily, from {parts[0] / GIB:.2f} to {parts[-1] / GIB:.2f} GiB "
        f"({growth / parts[0]:.0%}), {per_step * 1000 / GIB:.2g} GiB per 1,000 steps",
        [
            "find what keeps tensors or rows between steps: a custom callback, a list to which losses are appended"
            if on_gpu
            else "`trainer.dataloader_num_workers: 0`, to separate the data loader's memory from the trainer's",
            f"at this rate {at_end / GIB:.1f} GiB at the last step; until the cause is fixed, restart from the latest "
            f"checkpoint: `{advice.resume_command(run)}`",
        ],
    )


def input_bound(run: Run) -> Finding | None:
    """Steps that wait for data."""
    points = _after_start(run.points("data_wait_fraction"))
    share = median(stats.values(points))
    if share <= run.monitor.data_wait:
        return None
    workers = run.section("trainer").get("dataloader_num_workers") or 0
    more = 2 * workers or (4 if run.plan.get("gpus") else 1)
    return Finding(
        "input_bound",
        "warning",
        points[0][0],
        f"half of the steps wait for data for {share:.0%} of their time or more",
        [
            f"`trainer.dataloader_num_workers: {more}` (was {workers})",
            "rows on a local disk instead of a network file system: set HF_HOME, or data.train to a local file",
        ],
    )


def throughput_drop(run: Run) -> Finding | None:
    """Throughput fell and stayed low for `window` steps."""
    alerts = alerts_of(run, detectors.throughput_drop, "tokens_per_second")
    if not alerts:
        return None
    return Finding(
        "throughput_drop",
        "warning",
        alerts[0].step,
        alerts[0].evidence,
        [
            "check what else runs on the node, and whether the GPU throttles: `nvidia-smi -q -d PERFORMANCE,CLOCK`",
            f"resume on another node from the latest checkpoint: `{advice.resume_command(run)}`",
        ],
    )


def slow_rank(run: Run) -> Finding | None:
    """One rank for which the others wait."""
    points = _after_start(run.points("rank_lag"))
    lag, ranks = median(stats.values(points)), stats.values(_after_start(run.points("slowest_rank")))
    if lag <= run.monitor.rank_lag or not ranks:
        return None
    rank = mode(ranks)
    if ranks.count(rank) < 0.6 * len(ranks):
        return None
    return Finding(
        "slow_rank",
        "warning",
        points[0][0],
        f"rank {rank:g} takes {lag:.0%} longer per step than the others, which wait for it "
        f"({ranks.count(rank)} of {len(ranks)} lines)",
        [
            f"check the GPU of rank {rank:g}: clocks and temperature (nvidia-smi), other processes",
            "exclude it until it is repaired: set DEVICES=… to the GPUs to use",
        ],
    )


def _after_start(points: Points) -> Points:
    """Without the lines during which caches fill."""
    return points[min(2, len(points) // 4) :]
