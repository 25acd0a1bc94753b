"""Watches the ranks of this host from outside: which one died first, which one hangs, and what is said of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sft_recipes.planner.plan import Plan
from sft_recipes.planner.save_time import seconds_at_most
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.heartbeat import ASKING, Failure, Heartbeat
from sft_recipes.runtime.run_dir import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, RunDir

# Tens of billions of weights from a shared disk, an operator that is compiled first, models that are published.
_TIMES_THE_LONGEST = 5
_MOST_AT_ONCE = 1.0
_WHERE = {
    "starting": "while it started",
    "step": "in step {step}",
    "waiting": "in step {step}, where it waited for the others",
    "evaluating": "in the evaluation at step {step}",
    "saving": "while it saved step {step}",
    "ending": "behind step {step}, where it ended",
}
# What gloo, NCCL and torch's store say where the other end is gone.
_OF_COLLECTIVES = r"(?i)gloo|nccl|connection|broken pipe|\bstore\b|DistBackend|DistNetwork|DistStore"
_STOPPED = ("T", "t")
_STATES = {"T": "it is stopped by a signal", "t": "a debugger holds it", "D": "it waits for a disk or a device"}


@dataclass(frozen=True)
class Limits:
    """Seconds without a heartbeat that are allowed: `monitor.heartbeat_timeout_seconds`, and what a save takes."""

    hang: float
    save: float


@dataclass(frozen=True)
class RankStatus:
    """A rank at the last look.

    Attributes:
        state: the letter of proc(5); empty where its process is gone.
        still: for how long it was seen not to move, in seconds. A machine that slept, or a container that was paused,
            saw nothing meanwhile.
        alive: when it was last seen alive, by CLOCK_MONOTONIC, in seconds.
    """

    pulse: Heartbeat
    state: str
    still: float
    alive: float
    failure: Failure | None = None

    @property
    def dead(self) -> bool:
        """Whether it ended and did not say that it should."""
        return not self.state or self.failure is not None

    @property
    def ended(self) -> float:
        """When, at the earliest. Of a rank that fails because another one is gone, the exception is the later one."""
        return self.failure.at if self.failure else self.alive


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; EXIT_STOPPED where it was ended because somebody asked for a stop.
        fault: what is said of the rank that went wrong, where one did.
        by_user: whether that is the user's error.
        came_of_others: whether the rank that went wrong had lost others, perhaps of another node.
    """

    code: int
    fault: str | None = None
    by_user: bool = False
    came_of_others: bool = False


def limit(pulse: Heartbeat, longest: float, limits: Limits) -> float:
    """How long a rank may stay where it is, in seconds.

    Args:
        longest: the longest time that any rank has taken for a move while it computed, in seconds: what is slow on
            this machine is no hang.
    """
    if pulse.doing in ("starting", "ending"):  # a checkpoint is looked through, and then read
        return max(timeouts.MODEL_LOADING, limits.hang) + 2 * limits.save
    if pulse.doing == "saving":
        return limits.hang + limits.save
    return max(limits.hang, _TIMES_THE_LONGEST * longest)


def hangs(ranks: Sequence[RankStatus], limits: Limits) -> bool:
    """Whether no rank moves any more. One that waits for the others has no limit of its own while another does
    something: that one may be saving."""
    busy = [one for one in ranks if one.pulse.doing != "waiting"] or ranks
    longest = max((one.pulse.longest for one in ranks), default=0.0)
    return bool(busy) and all(one.still > limit(one.pulse, longest, limits) for one in busy)


def culprits(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """Of ranks that hang, those that the others wait for: stopped from outside, else behind the others in what all of
    them do; all, where none stands out."""
    stopped = [one for one in ranks if one.state in _STOPPED]
    busy = [one for one in ranks if one.pulse.doing != "waiting"]
    least = min((_how_far(one.pulse) for one in busy or ranks), default=None)
    return stopped or [one for one in busy or ranks if _how_far(one.pulse) == least]


def _how_far(pulse: Heartbeat) -> tuple[int, int]:
    return pulse.step, pulse.moves


def first_to_end(dead: Iterable[RankStatus]) -> RankStatus:
    """The rank whose end was the first; that of the others came of it."""
    return min(dead, key=lambda one: one.ended)


def waits_for_others(stacks: str) -> bool:
    """Whether a rank's stacks, as faulthandler writes them, show it in one of torch's collectives."""
    of_thread = stacks.partition("Current thread")[2].partition("\n\n")[0]
    return "distributed_c10d.py" in of_thread


def lost_others(one: RankStatus) -> bool:
    """Whether a rank failed in what it does with the others: it may be that another one's end came first."""
    return one.failure is not None and re.search(_OF_COLLECTIVES, f"{one.failure.kind} {one.failure.said}") is not None


def hang_line(ranks: Sequence[RankStatus], limits: Limits) -> str:
    """What is said of ranks that hang."""
    longest = max(one.pulse.longest for one in ranks)
    said = []
    for one in culprits(ranks):
        why = f", {_STATES[one.state]}" if one.state in _STATES else ""
        said.append(f"{_name(one.pulse)} hangs {_where(one.pulse)} (process {one.pulse.process}{why})")
    most = max(one.still for one in ranks)
    allowed = max(limit(one.pulse, longest, limits) for one in culprits(ranks))
    return f"{' and '.join(said)}: no heartbeat {most:.0f} s, allowed {allowed:.0f} (monitor.heartbeat_timeout_seconds)"


def death_line(one: RankStatus, code: int | None) -> str:
    """What is said of a rank that died.

    Args:
        code: as its launcher saw it end, a signal being negative; None where the launcher is gone too.
    """
    name, where = _name(one.pulse), _where(one.pulse)
    if one.failure is not None and one.failure.kind != "SystemExit":
        return f"{name} failed {where}: {one.failure.kind}: {one.failure.said}"
    if code is None:
        return f"{name} is gone, {where}"
    if code < 0:
        return f"{name} was ended by {_signal(-code)} {where}{_cause(-code)}"
    return f"{name} left with exit code {code} {where}, not at its end"


def launcher_line(number: int) -> str:
    """What is said where a signal ended the process that had started the ranks."""
    return f"the ranks' launcher on {socket.gethostname()} was ended by {_signal(number)}{_cause(number)}"


def _waiting(pulse: Heartbeat) -> Heartbeat:
    return replace(pulse, doing="waiting")


def _name(pulse: Heartbeat) -> str:
    return f"rank {pulse.rank} on {socket.gethostname()}"


def _where(pulse: Heartbeat) -> str:
    return _WHERE[pulse.doing].format(step=pulse.step)


def _signal(number: int) -> str:
    known = {one.value for one in signal.Signals}
    return signal.Signals(number).name if number in known else f"signal {number}"


def _cause(number: int) -> str:
    if number != signal.SIGKILL:
        return ""
    return (
        ", which nothing here sent: the usual cause is the system's out-of-memory killer (the machine's memory, or its "
        "container's limit)"
    )


class Watchdog:
    """The ranks of one start on this host, looked at again and again."""

    def __init__(self, folder: RunDir, plan: Plan, saves: bool = True, node: int = 0):
        """`saves` says whether the ranks are asked to save where a signal comes; a trial is ended. `node` is which of
        the plan's nodes this host is."""
        self.folder = folder
        self.limits = Limits(plan.sections.monitor.heartbeat_timeout_seconds, seconds_at_most(plan))
        self.saves = saves
        ranks_here = plan.world_size // plan.nodes
        self.expected = set(range(node * ranks_here, (node + 1) * ranks_here))
        self.seen: dict[int, RankStatus] = {}
        self.hung: str | None = None
        self.ended_for_others = False
        self._several_nodes = plan.nodes > 1
        self._waiting: set[int] = set()
        self._waited = 0.0
        self._begun: set[int] = set()
        self._missed = 0.0
        self._looked = time.monotonic()

    def look(self) -> None:
        """Sees where each rank stands now. One that took its pulse away has ended as it should, and is seen no more."""
        now = time.monotonic()
        passed = min(now - self._looked, _MOST_AT_ONCE)
        self._looked = now
        ranks = self.folder.ranks
        last = {rank: one.pulse for rank, one in self.seen.items()}  # of one whose pulse is being written over
        pulses = {**last, **heartbeat.pulses(ranks)}
        states = {rank: heartbeat.state(pulse.process) for rank, pulse in pulses.items()}
        failures = heartbeat.failures(ranks)
        seen = {}
        for rank, pulse in pulses.items():
            if heartbeat.place(ranks, rank).exists():  # asked behind its state: it may have ended in between
                before = self.seen.get(rank) or RankStatus(pulse, "?", 0.0, now)
                still = before.still + passed if pulse == before.pulse else 0.0
                alive = now if states[rank] else before.alive
                seen[rank] = RankStatus(pulse, states[rank], still, alive, failures.get(rank))
        self.seen = seen
        self._begun |= pulses.keys()
        waits = self.expected - self._begun or not self.seen
        self._missed = self._missed + passed if waits else 0.0

    def died(self) -> list[RankStatus]:
        """Ranks that ended before they should."""
        return [one for one in self.seen.values() if one.dead]

    def finds_a_hang(self) -> bool:
        """Whether the ranks hang, or the launcher does without them. What each was doing is then written down."""
        ranks = list(self.seen.values())
        if ranks and hangs(ranks, self.limits):
            self.hung = self._hang(ranks)
            return self.hung is not None
        self._waiting, self.ended_for_others = set(), False  # they moved again
        if self._missed > max(timeouts.MODEL_LOADING, self.limits.hang):
            absent = ", ".join(map(str, sorted(self.expected - self._begun)))
            what = f"rank {absent} did not begin" if absent else "all ranks have ended, but not their launcher"
            self.hung = f"{what} on {socket.gethostname()} within {self._missed:.0f} s"
        return self.hung is not None

    def _hang(self, ranks: Sequence[RankStatus]) -> str | None:
        """What is said of ranks that hang; where all of them wait for a rank of another node, its own launcher gets the
        time to name it."""
        waiting = self._waiting = self._waiting or self._write_stacks()
        if self._several_nodes and waiting == self.seen.keys():
            still = min(one.still for one in ranks)
            self.ended_for_others, self._waited = True, self._waited or still
            if still < self._waited + timeouts.OTHER_NODES_EXIT:
                return None
        told = [replace(one, pulse=_waiting(one.pulse)) if one.pulse.rank in waiting else one for one in ranks]
        return hang_line(told, self.limits)

    def _write_stacks(self) -> set[int]:
        """Has each rank write its Python stacks, but for one that a signal stopped, which cannot; those ranks that wait
        for others by them."""
        files = {}
        for rank, one in self.seen.items():
            if one.state not in _STOPPED:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pulse.process, signal.SIGUSR2)
                    files[rank] = heartbeat.place(self.folder.stack_traces, rank, ".txt")
        until = time.monotonic() + timeouts.STACK_TRACES
        while time.monotonic() < until and not all(_is_written(file) for file in files.values()):
            time.sleep(0.05)
        written = {rank: file.read_text(encoding="utf-8") for rank, file in files.items() if file.exists()}
        return {rank for rank, stacks in written.items() if waits_for_others(stacks)}

    def kill(self) -> None:
        """Ends the ranks that have not ended as they should, with all that they started: each may lead a group."""
        self.look()
        for one in self.seen.values():
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(one.pulse.process, signal.SIGKILL)

    def await_gone(self, seconds: float) -> None:
        """Until the system has taken apart the ranks that were killed, in so many seconds at most."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(heartbeat.state(one.pulse.process) for one in self.seen.values()):
            time.sleep(0.05)

    def ended(self, launcher_code: int, launcher_was_killed: bool) -> Ended:
        """How the ranks ended, whose launcher has.

        Args:
            launcher_code: how the launcher ended, a signal being negative.
            launcher_was_killed: by this process, since it did not end by itself.
        """
        self.look()
        self._keep_written_stacks()
        if self.hung is not None:
            return Ended(EXIT_FAULT, self.hung, came_of_others=self.ended_for_others)
        if launcher_code < 0 and not launcher_was_killed:
            if -launcher_code in ASKING:  # before it could hear it
                return Ended(EXIT_STOPPED)
            return Ended(EXIT_FAULT, launcher_line(-launcher_code))
        codes = heartbeat.exit_codes(self.folder.ranks)
        unseen = {rank: code for rank, code in (codes or {}).items() if rank not in self._begun}
        if unseen:
            return _before_they_began(unseen)
        dead = self.died()
        if not dead:
            return Ended(launcher_code)
        first = first_to_end(dead)
        if first.failure is not None and first.failure.by_user:
            return Ended(EXIT_USER, first.failure.said, by_user=True)
        line = death_line(first, None if codes is None else codes.get(first.pulse.rank, 0))
        return Ended(EXIT_FAULT, line, came_of_others=self.ended_for_others or lost_others(first))

    def _keep_written_stacks(self) -> None:
        """Removes the files of ranks that wrote none."""
        files = list(self.folder.stack_traces.glob("*.txt"))
        for file in files:
            if not _is_written(file):
                file.unlink()
        with contextlib.suppress(OSError):  # there are some
            self.folder.stack_traces.rmdir()


def _is_written(file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_size > 0
    return True  # the rank took it away


def _before_they_began(codes: Mapping[int, int]) -> Ended:
    """Of ranks that ended before their first pulse: they had not begun to hear signals either, and where one of them
    fails, torch's agent sends one to the others."""
    failed = {rank: code for rank, code in codes.items() if -code not in ASKING}
    if not failed:
        return Ended(EXIT_STOPPED)
    rank, code = min(failed.items())
    ended = f"was ended by {_signal(-code)}{_cause(-code)}" if code < 0 else f"left with exit code {code}"
    return Ended(EXIT_FAULT, f"rank {rank} on {socket.gethostname()} {ended} before it had begun")
