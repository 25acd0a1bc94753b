"""Signs in what the machine does while a run trains: memory, waiting for data, speed, ranks."""

from __future__ import annotations

import itertools
from statistics import median, mode

from sft_recipes.monitor import advice, stats
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.metrics_log import Points, Run
from sft_recipes.runtime.units import GIB


def fault(run: Run) -> Finding | None:
    """The run did not end by itself, and not by a signal either."""
    if run.state != "failed":
        return None
    said = str(run.manifest.get("error") or f"exit code {run.manifest.get('exit_code', '?')}")
    takes_less = [f"takes less memory: `{change}`" for change in run.manifest.get("takes_less") or []]
    step = run.last_step or None
    return Finding(
        "fault", "red", step, said, [*takes_less, f"what it said last: {run.folder.log}", f"`{advice.go_on(run)}`"]
    )


def memory_creep(run: Run) -> Finding | None:
    """Memory that grows steadily, of the GPU where it is known."""
    on_gpu = len(run.points("memory_allocated_bytes")) >= 12
    points = run.points("memory_allocated_bytes" if on_gpu else "host_memory_bytes")
    points = points[len(points) // 10 :]  # the first lines fill caches
    parts = stats.blocks(stats.values(points), 6)
    grown, rises = parts[-1] - parts[0], [after - before for before, after in itertools.pairwise(parts)]
    # One step up, or two, are an allocator's that settles at an evaluation.
    steady = (
        sum(rise > 0.05 * grown for rise in rises) >= 4
        and max(rises) <= grown / 2
        and parts[-1] - parts[3] >= 0.25 * grown
    )
    if not parts[0] or grown <= run.monitor.memory_growth * parts[0] or not steady:
        return None
    pace, steps = grown / max(points[-1][0] - points[0][0], 1), run.planned("optimizer_steps") or run.last_step
    at_the_end = parts[-1] + pace * (steps - points[-1][0])
    where = "GPU memory" if on_gpu else "the host's memory"
    return Finding(
        "memory_creep",
        "red",
        points[0][0],
        f"{where} grows steadily, from {parts[0] / GIB:.2f} to {parts[-1] / GIB:.2f} GiB ({grown / parts[0]:.0%}), "
        f"{pace * 1000 / GIB:.2g} GiB in a thousand steps",
        [
            "look for what keeps tensors or rows between steps: a callback of your own, a list that losses are added to"
            if on_gpu
            else "`trainer.dataloader_num_workers: 0`, to tell the loader's memory from the trainer's",
            f"at this pace {at_the_end / GIB:.1f} GiB are held at the last step; till the cause is found, a start from "
            f"the newest checkpoint begins with little: `{advice.go_on(run)}`",
        ],
    )


def input_bound(run: Run) -> Finding | None:
    """Steps that wait for data."""
    points = _after_the_start(run.points("data_wait_fraction"))
    share = median(stats.values(points))
    if share <= run.monitor.data_wait:
        return None
    now = run.section("trainer").get("dataloader_num_workers") or 0
    wanted = 2 * now or (4 if run.plan.get("gpus") else 1)
    return Finding(
        "input_bound",
        "yellow",
        points[0][0],
        f"half of the steps wait for data for {share:.0%} of their time or more",
        [
            f"`trainer.dataloader_num_workers: {wanted}` (was {now})",
            "rows on a disk of this machine instead of a network's: HF_HOME, or data.train a local file",
        ],
    )


def throughput_drop(run: Run) -> Finding | None:
    """Fewer tokens a second than before, for good."""
    points = _after_the_start(run.points("tokens_per_second"))
    speeds = stats.values(points)
    usual, limit = max(stats.blocks(speeds, min(10, len(speeds) // 3))), 1 - run.monitor.throughput_drop
    slow = list(itertools.takewhile(lambda pair: pair[1] < limit * usual, reversed(_smoothed(points, 3))))
    if len(slow) < 5 or slow[0][0] - slow[-1][0] < run.monitor.window:
        return None
    now = median(stats.values(slow))
    return Finding(
        "throughput_drop",
        "yellow",
        slow[-1][0],
        f"{now:,.0f} tokens a second since step {slow[-1][0]}, {1 - now / usual:.0%} below the {usual:,.0f} before",
        [
            "see what else runs there, and whether the GPU lowers its clocks: `nvidia-smi -q -d PERFORMANCE,CLOCK`",
            f"a start elsewhere goes on from the newest checkpoint: `{advice.go_on(run)}`",
        ],
    )


def _smoothed(points: Points, width: int) -> Points:
    smoothed = stats.smooth(stats.values(points), width)
    return [(step, value) for (step, _), value in zip(points[width // 2 :], smoothed, strict=False)]


def slow_rank(run: Run) -> Finding | None:
    """One rank that the others wait for."""
    points = _after_the_start(run.points("rank_lag"))
    lag, ranks = median(stats.values(points)), stats.values(_after_the_start(run.points("slowest_rank")))
    if lag <= run.monitor.rank_lag or not ranks:
        return None
    rank = mode(ranks)
    if ranks.count(rank) < 0.6 * len(ranks):
        return None
    return Finding(
        "slow_rank",
        "yellow",
        points[0][0],
        f"rank {rank:g} works {lag:.0%} longer on a step than the others, and all of them wait for it "
        f"({ranks.count(rank)} of {len(ranks)} lines)",
        [
            f"look at the GPU of rank {rank:g}: its clocks and temperature (nvidia-smi), what else runs on it",
            "leave it out until it is mended: DEVICES=… names those to take",
        ],
    )


def _after_the_start(points: Points) -> Points:
    """Without the lines in which a run warms its caches."""
    return points[min(2, len(points) // 4) :]
