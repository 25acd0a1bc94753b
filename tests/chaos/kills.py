"""Kill a run before each of its file operations and at random times, and resume it each time."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
from dataclasses import dataclass, replace

from chaos.harness import SETUPS, Chaos, Result, kill, latest_complete, state_of

# Every step is saved; latest are more steps than file operations after the first save of a start.
EACH_STEP = ("trainer.max_steps=60", "trainer.save_steps=1", "trainer.eval_steps=60")
LONG = ("trainer.max_steps=600", "trainer.save_steps=20", "trainer.eval_steps=120")
# Seconds after the start (while it loads) and after its first new step (while it trains); kills alternate.
SECONDS = {"start": (0.5, 14.0), "first step": (0.0, 10.0)}


@dataclass(frozen=True)
class KillPoint:
    """One file operation before which a rank was killed, the step the next start resumed from, and the differences."""

    number: int
    call: str
    path: str
    saving: int
    resumed_from: int
    differences: list[str]


def kill_points(
    chaos: Chaos, setup: str, rank: int, numbers: list[int] | None = None, first: int = 1, last: int | None = None
) -> list[KillPoint]:
    """Kill `rank` before its N-th file operation, for N from `first` until the first save of a start is complete or N is
    `last` (or only at `numbers`). Each start resumes from what the killed one left, so recoveries are killed too.

    After each start, and at the end, the run is compared with the uninterrupted run.
    """
    name = f"points-{setup}-{rank}-{first}"
    reference = chaos.uninterrupted(setup, *EACH_STEP)
    points: list[KillPoint] = []
    pending: list[KillPoint] = []  # no start has resumed from them yet
    killed: KillPoint | None = None
    for number in numbers or itertools.takewhile(lambda n: last is None or n <= last, itertools.count(first)):
        options = ("--resume",) if chaos.run(name).is_dir() else ()
        faults = chaos.with_faults(name, setup, rank, kill_at=number)
        latest = latest_complete(chaos.run(name))
        result = chaos.wait_for_exit(name, chaos.start(name, setup, *options, *EACH_STEP, **faults))
        assert result.resumed_from() in (latest, 0), f"{latest} was latest: {result.output}"
        if killed is not None:
            pending.append(replace(killed, differences=state_of(chaos.run(name)).differences(reference)))
        if result.resumed_from() == latest:
            points, pending = points + [replace(point, resumed_from=latest) for point in pending], []
        done, killed = chaos.operations(name), None
        saved = numbers is None and any(f"g/checkpoint-{latest + 2}" in path for _, _, path, _ in done)
        if saved or len(done) < number:
            break
        assert result.code != 0, f"killed before operation {number} of {setup}, and it left with 0: {result.output}"
        _, call, path, _ = done[number - 1]
        killed = KillPoint(number, call, generic(path, latest + 1), latest + 1, latest, [])
    latest = latest_complete(chaos.run(name))
    result = chaos.run_to_end(name, setup, "--resume", *EACH_STEP)
    assert result.resumed_from() == latest, f"{latest} was latest: {result.output}"
    differences = state_of(chaos.run(name)).differences_at_the_end(reference)
    assert not differences, differences
    return points + [replace(point, resumed_from=latest) for point in [*pending, *([killed] if killed else [])]]


def generic(path: str, step: int) -> str:
    """Return a path with the step replaced by N."""
    path = re.sub(r"\.tmp\w+", ".tmp…", path)
    return re.sub(
        r"(checkpoint-|global_step)(\d+)",
        lambda m: m[1] + ("N" if int(m[2]) == step else f"N{int(m[2]) - step:+}"),
        path,
    )


@dataclass(frozen=True)
class RandomKill:
    """One kill: the target, how many seconds after what, the last logged step, and the step resumed from."""

    setup: str
    target: str
    seconds: float
    after: str
    step: int
    resumed_from: int


def random_kills(chaos: Chaos, setup: str, count: int) -> tuple[list[RandomKill], list[str]]:
    """Kill ranks, launcher, command or all of them at random times; return the kills and how the end differs."""
    reference = chaos.uninterrupted(setup, *LONG)
    name, runs = f"random-{setup}-0", 0
    kills: list[RandomKill] = []
    pending: list[RandomKill] = []  # no start has resumed from them yet
    differences: list[str] = []

    def finish(process: subprocess.Popen[str], latest: int) -> Result:
        nonlocal kills, pending
        result = chaos.wait_for_exit(name, process)
        assert result.resumed_from() in (latest, 0), f"{name}: {latest} was latest: {result.output}"
        if result.resumed_from() == latest:
            kills, pending = kills + [replace(kill, resumed_from=latest) for kill in pending], []
        return result

    def start() -> tuple[subprocess.Popen[str], int]:
        options = ("--resume",) if chaos.run(name).is_dir() else ()
        latest = latest_complete(chaos.run(name))
        return chaos.start(name, setup, *options, *LONG), latest

    while len(kills) + len(pending) < count:
        process, latest = start()
        after = list(SECONDS)[(len(kills) + len(pending)) % 2]
        target, seconds = chaos.random.choice(targets(setup)), chaos.random.uniform(*SECONDS[after])
        if after == "first step":
            chaos.wait_for_new_step(name, process, latest)
        wait_at_most(process, seconds)
        kill_target(chaos, name, process.pid, target)
        result = finish(process, latest)
        if result.code == 0:  # it finished before the kill
            differences += state_of(chaos.run(name)).differences_at_the_end(reference)
            runs += 1
            name = f"random-{setup}-{runs}"
        else:
            logged = max(state_of(chaos.run(name)).losses, default=0)
            pending.append(RandomKill(setup, target, seconds, after, logged, latest))
    process, latest = start()
    result = finish(process, latest)
    assert result.code == 0 and not pending, result.output
    return kills, differences + state_of(chaos.run(name)).differences_at_the_end(reference)


def targets(setup: str) -> list[str]:
    """Return the targets of a kill."""
    return [*(f"rank {rank}" for rank in range(SETUPS[setup][0])), "launcher", "command", "all"]


def kill_target(chaos: Chaos, name: str, command: int, target: str) -> None:
    """Kill a target; the command itself if the target does not exist (yet)."""
    ranks = chaos.ranks(name)
    others = [pid for pid in chaos.processes(name) if pid not in ranks.values()]
    victims = {"launcher": others[:1], "command": [command], "all": [command, *others, *ranks.values()]}
    if target.startswith("rank "):
        victims[target] = [pid for rank, pid in ranks.items() if target == f"rank {rank}"]
    for pid in victims[target] or [command]:
        kill(pid)


def wait_at_most(process: subprocess.Popen[str], seconds: float) -> None:
    """Wait until then, or until the process has exited."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
