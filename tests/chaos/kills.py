"""Kills a run at every operation that it does to its files, and at random instants, and goes on each time."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
from dataclasses import dataclass, replace

from chaos.harness import ENGINES, Chaos, Result, kill, newest_sealed, state_of

# Every step is saved, and the steps are more than the operations behind the first save of a start.
EACH_STEP = ("trainer.max_steps=60", "trainer.save_steps=1", "trainer.eval_steps=60")
LONG = ("trainer.max_steps=600", "trainer.save_steps=20", "trainer.eval_steps=120")
# Every second kill falls while a start loads, or soon behind it, the others while it trains.
SECONDS = {"start": (0.5, 14.0), "first step": (0.0, 10.0)}


@dataclass(frozen=True)
class KillPoint:
    """One operation before which a rank was killed: what the next start went on from, and where it differed."""

    number: int
    call: str
    path: str
    saving: int
    resumed_from: int
    differences: list[str]


def kill_points(
    chaos: Chaos, engine: str, rank: int, numbers: list[int] | None = None, first: int = 1, last: int | None = None
) -> list[KillPoint]:
    """Kills `rank` before its N-th operation, N = `first` … until its first save of a start is wholly behind it or N is
    `last` (or at `numbers` alone); each start goes on from what the one before left, so each is a recovery that is
    killed as well.

    After each start all that is there is compared with the uninterrupted run, and so is the end.
    """
    name = f"points-{engine}-{rank}-{first}"
    whole = chaos.uninterrupted(engine, *EACH_STEP)
    points: list[KillPoint] = []
    untold: list[KillPoint] = []  # of which no start has said yet where it went on from
    killed: KillPoint | None = None
    for number in numbers or itertools.takewhile(lambda n: last is None or n <= last, itertools.count(first)):
        options = ("--resume",) if chaos.run(name).is_dir() else ()
        harm = chaos.harmed(name, engine, rank, kill_at=number)
        there = newest_sealed(chaos.run(name))
        result = chaos.ended(name, chaos.start(name, engine, *options, *EACH_STEP, **harm))
        assert result.resumed_from() in (there, 0), f"{there} was there: {result.said}"
        if killed is not None:
            untold.append(replace(killed, differences=state_of(chaos.run(name)).differences(whole)))
        if result.resumed_from() == there:
            points, untold = points + [replace(point, resumed_from=there) for point in untold], []
        done, killed = chaos.operations(name), None
        behind = numbers is None and any(f"g/checkpoint-{there + 2}" in path for _, _, path, _ in done)
        if behind or len(done) < number:
            break
        assert result.code != 0, f"killed before operation {number} of {engine}, and it left with 0: {result.said}"
        _, call, path, _ = done[number - 1]
        killed = KillPoint(number, call, generic(path, there + 1), there + 1, there, [])
    there = newest_sealed(chaos.run(name))
    result = chaos.complete(name, engine, "--resume", *EACH_STEP)
    assert result.resumed_from() == there, f"{there} was there: {result.said}"
    differences = state_of(chaos.run(name)).differences_at_the_end(whole)
    assert not differences, differences
    return points + [replace(point, resumed_from=there) for point in [*untold, *([killed] if killed else [])]]


def generic(path: str, step: int) -> str:
    """A path of one save as that of any."""
    path = re.sub(r"\.tmp\w+", ".tmp…", path)
    return re.sub(
        r"(checkpoint-|global_step)(\d+)",
        lambda m: m[1] + ("N" if int(m[2]) == step else f"N{int(m[2]) - step:+}"),
        path,
    )


@dataclass(frozen=True)
class RandomKill:
    """One kill: who, how many seconds behind what, the last step that was logged, the step that was gone on from."""

    engine: str
    target: str
    seconds: float
    behind: str
    step: int
    resumed_from: int


def random_kills(chaos: Chaos, engine: str, many: int) -> tuple[list[RandomKill], list[str]]:
    """So many kills of ranks, launcher, parent or all of them, at random instants; and how the end differs."""
    whole = chaos.uninterrupted(engine, *LONG)
    name, runs = f"random-{engine}-0", 0
    kills: list[RandomKill] = []
    untold: list[RandomKill] = []  # of which no start has said yet where it went on from
    differences: list[str] = []

    def learn(process: subprocess.Popen[str], there: int) -> Result:
        nonlocal kills, untold
        result = chaos.ended(name, process)
        assert result.resumed_from() in (there, 0), f"{name}: {there} was there: {result.said}"
        if result.resumed_from() == there:
            kills, untold = kills + [replace(kill, resumed_from=there) for kill in untold], []
        return result

    def start() -> tuple[subprocess.Popen[str], int]:
        options = ("--resume",) if chaos.run(name).is_dir() else ()
        there = newest_sealed(chaos.run(name))
        return chaos.start(name, engine, *options, *LONG), there

    while len(kills) + len(untold) < many:
        process, there = start()
        behind = list(SECONDS)[(len(kills) + len(untold)) % 2]
        target, seconds = chaos.random.choice(targets(engine)), chaos.random.uniform(*SECONDS[behind])
        if behind == "first step":
            chaos.wait_for_new_step(name, process, there)
        waited(process, seconds)
        strike(chaos, name, process.pid, target)
        result = learn(process, there)
        if result.code == 0:  # it was quicker
            differences += state_of(chaos.run(name)).differences_at_the_end(whole)
            runs += 1
            name = f"random-{engine}-{runs}"
        else:
            logged = max(state_of(chaos.run(name)).losses, default=0)
            untold.append(RandomKill(engine, target, seconds, behind, logged, there))
    process, there = start()
    result = learn(process, there)
    assert result.code == 0 and not untold, result.said
    return kills, differences + state_of(chaos.run(name)).differences_at_the_end(whole)


def targets(engine: str) -> list[str]:
    """Who can be killed."""
    return [*(f"rank {rank}" for rank in range(ENGINES[engine][0])), "launcher", "parent", "all"]


def strike(chaos: Chaos, name: str, parent: int, target: str) -> None:
    """Kills a target; one that is not there yet, or no more, is the parent."""
    ranks = chaos.ranks(name)
    others = [pid for pid in chaos.processes(name) if pid not in ranks.values()]
    victims = {"launcher": others[:1], "parent": [parent], "all": [parent, *others, *ranks.values()]}
    if target.startswith("rank "):
        victims[target] = [pid for rank, pid in ranks.items() if target == f"rank {rank}"]
    for pid in victims[target] or [parent]:
        kill(pid)


def waited(process: subprocess.Popen[str], seconds: float) -> None:
    """Until then, or until it ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
