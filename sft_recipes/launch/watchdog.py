"""Watches the heartbeats of this host's ranks: which rank died first, which one stalls, and the error to report."""

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
from sft_recipes.planner.save_time import max_save_seconds
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.heartbeat import STOP_SIGNALS, Failure, Heartbeat
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, EXIT_USER, RunDir

_GAP_FACTOR = 5  # times the longest gap between two beats so far: slow steps are not a stall
_MAX_POLL_SECONDS = 1.0  # counted per poll: a machine that slept, or a paused container, did not observe a stall
_ACTIVITY = {
    "starting": "while starting",
    "step": "in step {step}",
    "waiting": "in step {step}, waiting for other ranks",
    "evaluating": "in the evaluation at step {step}",
    "saving": "while saving step {step}",
    "ending": "after step {step}, while finishing",
}
# In the errors of gloo, NCCL and torch's store after a peer is gone.
_COLLECTIVE_ERRORS = r"(?i)gloo|nccl|connection|broken pipe|\bstore\b|DistBackend|DistNetwork|DistStore"
_STOPPED = ("T", "t")
_STATES = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waiting for a disk or a device"}


@dataclass(frozen=True)
class Limits:
    """Seconds without a heartbeat that are allowed: `monitor.heartbeat_timeout_seconds`, and the time of a save."""

    stall: float
    save: float


@dataclass(frozen=True)
class RankStatus:
    """Status of a rank at the latest poll.

    Attributes:
        state: process state letter of proc(5); empty if the process is gone.
        stalled_seconds: observed time without a new heartbeat.
        last_alive: when the process was last observed alive, in seconds of CLOCK_MONOTONIC.
    """

    heartbeat: Heartbeat
    state: str
    stalled_seconds: float
    last_alive: float
    failure: Failure | None = None

    @property
    def died(self) -> bool:
        """Whether the rank ended other than normally."""
        return not self.state or self.failure is not None

    @property
    def ended_at(self) -> float:
        """Earliest time of the end. A rank that fails because a peer is gone raises its exception later than that."""
        return self.failure.failed_at if self.failure else self.last_alive


@dataclass(frozen=True)
class LaunchResult:
    """Result of a command, or of all ranks of a launch.

    Attributes:
        code: exit code; EXIT_STOPPED if it ended at a stop request.
        error: error of the rank that failed first, if one failed.
        user_error: whether the error is a `UserError`.
        lost_peer: whether the failed rank had lost other ranks, perhaps on another node.
    """

    code: int
    error: str | None = None
    user_error: bool = False
    lost_peer: bool = False


def heartbeat_timeout(heartbeat: Heartbeat, longest_gap: float, limits: Limits) -> float:
    """Seconds without a new heartbeat that are allowed in the current activity.

    Args:
        longest_gap: longest time between two beats of any rank so far, in seconds.
    """
    if heartbeat.activity in ("starting", "ending"):  # a checkpoint is verified, and then read
        return max(timeouts.MODEL_LOADING, limits.stall) + 2 * limits.save
    if heartbeat.activity == "saving":
        return limits.stall + limits.save
    return max(limits.stall, _GAP_FACTOR * longest_gap)


def all_stalled(ranks: Sequence[RankStatus], limits: Limits) -> bool:
    """Whether every rank is stalled. Ranks that wait for others have no limit while one is busy: it may be saving."""
    busy = [rank for rank in ranks if rank.heartbeat.activity != "waiting"] or ranks
    longest_gap = max((rank.heartbeat.longest_gap for rank in ranks), default=0.0)
    return bool(busy) and all(
        rank.stalled_seconds > heartbeat_timeout(rank.heartbeat, longest_gap, limits) for rank in busy
    )


def find_stalled_ranks(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """Of stalled ranks, those that the others wait for: stopped by a signal, else with the least progress; all ranks
    if progress is equal."""
    stopped = [rank for rank in ranks if rank.state in _STOPPED]
    busy = [rank for rank in ranks if rank.heartbeat.activity != "waiting"]
    least = min((_progress(rank.heartbeat) for rank in busy or ranks), default=None)
    return stopped or [rank for rank in busy or ranks if _progress(rank.heartbeat) == least]


def _progress(heartbeat: Heartbeat) -> tuple[int, int]:
    return heartbeat.step, heartbeat.beats


def find_first_failure(died: Iterable[RankStatus]) -> RankStatus:
    """The rank that ended first; the other ranks failed because of it."""
    return min(died, key=lambda rank: rank.ended_at)


def is_in_collective(stack_trace: str) -> bool:
    """Whether the main thread of a stack trace by faulthandler is in a collective of torch."""
    current_thread = stack_trace.partition("Current thread")[2].partition("\n\n")[0]
    return "distributed_c10d.py" in current_thread


def lost_peer(rank: RankStatus) -> bool:
    """Whether a rank failed in a collective, so that another rank may have ended first."""
    failure = rank.failure
    return failure is not None and re.search(_COLLECTIVE_ERRORS, f"{failure.kind} {failure.message}") is not None


def stall_message(ranks: Sequence[RankStatus], limits: Limits) -> str:
    """Error for stalled ranks."""
    stalled = find_stalled_ranks(ranks)
    longest_gap = max(rank.heartbeat.longest_gap for rank in ranks)
    limit = max(heartbeat_timeout(rank.heartbeat, longest_gap, limits) for rank in stalled)
    lines = []
    for rank in stalled:
        state = f", {_STATES[rank.state]}" if rank.state in _STATES else ""
        lines.append(
            f"{_name(rank.heartbeat)}: no heartbeat for {rank.stalled_seconds:.0f} s {_activity(rank.heartbeat)} "
            f"(pid {rank.heartbeat.pid}{state})"
        )
    return f"{'; '.join(lines)}; limit {limit:.0f} s (monitor.heartbeat_timeout_seconds)"


def failure_message(rank: RankStatus, code: int | None) -> str:
    """Error for a rank that died.

    Args:
        code: exit code that its launcher recorded, negative for a signal; None if the launcher is gone too.
    """
    name, activity = _name(rank.heartbeat), _activity(rank.heartbeat)
    if rank.failure is not None and rank.failure.kind != "SystemExit":
        return f"{name}: failed {activity}: {rank.failure.kind}: {rank.failure.message}"
    if code is None:
        return f"{name}: process is gone, {activity}"
    if code < 0:
        return f"{name}: killed by {_signal_name(-code)} {activity}{_cause(-code)}"
    return f"{name}: exited with code {code} {activity}, before the end of the run"


def launcher_message(number: int) -> str:
    """Error for a launcher that was killed by a signal."""
    return f"launcher of the ranks on {socket.gethostname()}: killed by {_signal_name(number)}{_cause(number)}"


def _waiting(heartbeat: Heartbeat) -> Heartbeat:
    return replace(heartbeat, activity="waiting")


def _name(heartbeat: Heartbeat) -> str:
    return f"rank {heartbeat.rank} on {socket.gethostname()}"


def _activity(heartbeat: Heartbeat) -> str:
    return _ACTIVITY[heartbeat.activity].format(step=heartbeat.step)


def _signal_name(number: int) -> str:
    known = {known.value for known in signal.Signals}
    return signal.Signals(number).name if number in known else f"signal {number}"


def _cause(number: int) -> str:
    if number != signal.SIGKILL:
        return ""
    return " (not sent by sft_recipes; usually the out-of-memory killer of the host or of the container)"


class Watchdog:
    """Polls the ranks of one launch on this host."""

    def __init__(self, run_dir: RunDir, plan: Plan, can_save: bool = True, node: int = 0):
        """
        Args:
            can_save: whether ranks save at a stop request; a sanity check is terminated instead.
            node: index of this host among the plan's nodes.
        """
        self.run_dir = run_dir
        self.limits = Limits(plan.sections.monitor.heartbeat_timeout_seconds, max_save_seconds(plan))
        self.can_save = can_save
        ranks_here = plan.world_size // plan.nodes
        self.expected = set(range(node * ranks_here, (node + 1) * ranks_here))
        self.ranks: dict[int, RankStatus] = {}
        self.stall: str | None = None
        self.stopped_for_peer = False
        self._several_nodes = plan.nodes > 1
        self._waiting: set[int] = set()
        self._waited = 0.0
        self._started: set[int] = set()
        self._missing_seconds = 0.0
        self._polled_at = time.monotonic()

    def poll(self) -> None:
        """Update the status of each rank. A rank that removed its heartbeat ended normally and is dropped."""
        now = time.monotonic()
        passed = min(now - self._polled_at, _MAX_POLL_SECONDS)
        self._polled_at = now
        ranks_dir = self.run_dir.ranks
        latest = {rank: status.heartbeat for rank, status in self.ranks.items()}  # if one is being overwritten
        heartbeats = {**latest, **heartbeat.read_heartbeats(ranks_dir)}
        states = {rank: heartbeat.process_state(beat.pid) for rank, beat in heartbeats.items()}
        failures = heartbeat.read_failures(ranks_dir)
        statuses = {}
        for rank, beat in heartbeats.items():
            if heartbeat.rank_file(ranks_dir, rank).exists():  # checked after its state: it may have ended in between
                before = self.ranks.get(rank) or RankStatus(beat, "?", 0.0, now)
                stalled = before.stalled_seconds + passed if beat == before.heartbeat else 0.0
                alive = now if states[rank] else before.last_alive
                statuses[rank] = RankStatus(beat, states[rank], stalled, alive, failures.get(rank))
        self.ranks = statuses
        self._started |= heartbeats.keys()
        missing = self.expected - self._started or not self.ranks
        self._missing_seconds = self._missing_seconds + passed if missing else 0.0

    def dead_ranks(self) -> list[RankStatus]:
        """Ranks that ended other than normally."""
        return [rank for rank in self.ranks.values() if rank.died]

    def detect_stall(self) -> bool:
        """Whether the ranks are stalled, or their launcher is without them; writes the stack traces then."""
        ranks = list(self.ranks.values())
        if ranks and all_stalled(ranks, self.limits):
            self.stall = self._stall(ranks)
            return self.stall is not None
        self._waiting, self.stopped_for_peer = set(), False  # there was progress
        if self._missing_seconds > max(timeouts.MODEL_LOADING, self.limits.stall):
            absent = ", ".join(map(str, sorted(self.expected - self._started)))
            problem = f"rank {absent} did not start" if absent else "all ranks have exited, but not their launcher,"
            self.stall = f"{problem} on {socket.gethostname()} within {self._missing_seconds:.0f} s"
        return self.stall is not None

    def _stall(self, ranks: Sequence[RankStatus]) -> str | None:
        """Error for stalled ranks; None for a while if all of them wait for another node, whose launcher then reports
        its own rank."""
        waiting = self._waiting = self._waiting or self._write_stack_traces()
        if self._several_nodes and waiting == self.ranks.keys():
            stalled = min(rank.stalled_seconds for rank in ranks)
            self.stopped_for_peer, self._waited = True, self._waited or stalled
            if stalled < self._waited + timeouts.OTHER_NODES_EXIT:
                return None
        classified = [
            replace(rank, heartbeat=_waiting(rank.heartbeat)) if rank.heartbeat.rank in waiting else rank
            for rank in ranks
        ]
        return stall_message(classified, self.limits)

    def _write_stack_traces(self) -> set[int]:
        """Have each rank write its Python stack trace, except one that a signal stopped, which cannot; return the ranks
        that are in a collective."""
        files = {}
        for rank, status in self.ranks.items():
            if status.state not in _STOPPED:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(status.heartbeat.pid, signal.SIGUSR2)
                    files[rank] = heartbeat.rank_file(self.run_dir.stack_traces, rank, ".txt")
        until = time.monotonic() + timeouts.STACK_TRACES
        while time.monotonic() < until and not all(_is_written(file) for file in files.values()):
            time.sleep(0.05)
        written = {rank: file.read_text(encoding="utf-8") for rank, file in files.items() if file.exists()}
        return {rank for rank, stack_trace in written.items() if is_in_collective(stack_trace)}

    def kill_ranks(self) -> None:
        """Kill the ranks that have not ended normally, with their children: each may lead a process group."""
        self.poll()
        for rank in self.ranks.values():
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(rank.heartbeat.pid, signal.SIGKILL)

    def wait_until_gone(self, seconds: float) -> None:
        """Wait until the processes of killed ranks are gone, at most this long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(
            heartbeat.process_state(rank.heartbeat.pid) for rank in self.ranks.values()
        ):
            time.sleep(0.05)

    def result(self, launcher_code: int, launcher_was_killed: bool) -> LaunchResult:
        """Result of the ranks, after their launcher has exited.

        Args:
            launcher_code: exit code of the launcher, negative for a signal.
            launcher_was_killed: by this process, since it did not exit after its ranks.
        """
        self.poll()
        self._remove_empty_stack_traces()
        if self.stall is not None:
            return LaunchResult(EXIT_ERROR, self.stall, lost_peer=self.stopped_for_peer)
        if launcher_code < 0 and not launcher_was_killed:
            if -launcher_code in STOP_SIGNALS:  # before it had installed its signal handlers
                return LaunchResult(EXIT_STOPPED)
            return LaunchResult(EXIT_ERROR, launcher_message(-launcher_code))
        codes = heartbeat.read_exit_codes(self.run_dir.ranks)
        not_started = {rank: code for rank, code in (codes or {}).items() if rank not in self._started}
        if not_started:
            return _failed_before_start(not_started)
        dead = self.dead_ranks()
        if not dead:
            return LaunchResult(launcher_code)
        first = find_first_failure(dead)
        if first.failure is not None and first.failure.user_error:
            return LaunchResult(EXIT_USER, first.failure.message, user_error=True)
        message = failure_message(first, None if codes is None else codes.get(first.heartbeat.rank, 0))
        return LaunchResult(EXIT_ERROR, message, lost_peer=self.stopped_for_peer or lost_peer(first))

    def _remove_empty_stack_traces(self) -> None:
        for file in list(self.run_dir.stack_traces.glob("*.txt")):
            if not _is_written(file):
                file.unlink()
        with contextlib.suppress(OSError):  # it is not empty
            self.run_dir.stack_traces.rmdir()


def _is_written(file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_size > 0
    return True  # the rank removed it


def _failed_before_start(codes: Mapping[int, int]) -> LaunchResult:
    """Result of ranks that ended before their first heartbeat. They had no signal handlers yet, and after one fails
    torch's agent sends a stop signal to the others."""
    failed = {rank: code for rank, code in codes.items() if -code not in STOP_SIGNALS}
    if not failed:
        return LaunchResult(EXIT_STOPPED)
    rank, code = min(failed.items())
    ended = f"killed by {_signal_name(-code)}{_cause(-code)}" if code < 0 else f"exited with code {code}"
    return LaunchResult(EXIT_ERROR, f"rank {rank} on {socket.gethostname()}: {ended} before its first heartbeat")
