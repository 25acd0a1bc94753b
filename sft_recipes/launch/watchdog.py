"""Watches the heartbeats of this host's ranks: which rank died first, which one stalls, and the error to report."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sft_recipes.planner.plan import Plan
from sft_recipes.planner.save_time import max_save_seconds
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.heartbeat import STOP_SIGNALS, Failure, Heartbeat
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, EXIT_USER, RunDir

ExitCodes = dict[int, int]  # by node
_MAX_POLL_SECONDS = 1.0  # counted per poll: a machine that slept, or a paused container, did not observe a stall
# In the errors of gloo, NCCL and torch's store after a peer is gone.
_COLLECTIVE_ERRORS = r"(?i)gloo|nccl|connection|broken pipe|\bstore\b|DistBackend|DistNetwork|DistStore"
_STATES = {"T": ", stopped by a signal", "t": ", held by a debugger", "D": ", waiting for a disk or a device"}


@dataclass(frozen=True)
class Limits:
    """Seconds without a heartbeat that are allowed: `monitor.heartbeat_timeout_seconds`, and the time of a save."""

    stall: float
    save: float

    def of(self, activity: str) -> float:
        """Seconds without a new heartbeat that are allowed in an activity."""
        if activity in ("starting", "ending"):  # a checkpoint is verified, and then read
            return max(timeouts.MODEL_LOADING, self.stall) + 2 * self.save
        return self.stall + (self.save if activity == "saving" else 0)


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

    @property
    def place(self) -> str:
        """The step, and the activity unless it is the step itself."""
        activity = "" if self.heartbeat.activity == "step" else f", {self.heartbeat.activity}"
        return f"in step {self.heartbeat.step}{activity}"


@dataclass(frozen=True)
class LaunchResult:
    """Result of a command, or of all ranks of a launch.

    Attributes:
        code: exit code; EXIT_STOPPED if it ended at a stop request, EXIT_USER if the error is a `UserError`.
        error: error of the rank that failed first, if one failed.
        lost_peer: whether the failed rank had lost other ranks, perhaps on another node.
    """

    code: int
    error: str | None = None
    lost_peer: bool = False


def all_stalled(ranks: Sequence[RankStatus], limits: Limits) -> bool:
    """Whether every rank is stalled. Ranks that wait for others have no limit while one is busy: it may be saving."""
    busy = [rank for rank in ranks if rank.heartbeat.activity != "waiting"] or ranks
    return bool(busy) and all(rank.stalled_seconds > limits.of(rank.heartbeat.activity) for rank in busy)


def find_stalled_ranks(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """Of stalled ranks, those that the others wait for: stopped by a signal, else with the least progress of those
    that do not wait."""
    stopped = [rank for rank in ranks if rank.state in ("T", "t")]
    busy = [rank for rank in ranks if rank.heartbeat.activity != "waiting"] or ranks
    least = min((rank.heartbeat.step, rank.heartbeat.beats) for rank in busy)
    return stopped or [rank for rank in busy if (rank.heartbeat.step, rank.heartbeat.beats) == least]


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
    lines = [
        f"{_name(rank.heartbeat.rank)}: no heartbeat for {rank.stalled_seconds:.0f} s {rank.place} (pid "
        f"{rank.heartbeat.pid}{_STATES.get(rank.state, '')})"
        for rank in stalled
    ]
    limit = max(limits.of(rank.heartbeat.activity) for rank in stalled)
    return f"{'; '.join(lines)}; limit {limit:.0f} s (monitor.heartbeat_timeout_seconds)"


def failure_message(rank: RankStatus, code: int | None) -> str:
    """Error for a rank that died.

    Args:
        code: exit code that its launcher recorded, negative for a signal; None if the launcher is gone too.
    """
    name = _name(rank.heartbeat.rank)
    if rank.failure is not None and rank.failure.kind != "SystemExit":
        return f"{name}: failed {rank.place}: {rank.failure.kind}: {rank.failure.message}"
    if code is None:
        return f"{name}: process is gone, {rank.place}"
    return f"{name}: {_end(code, rank.place)}{', before the end of the run' if code >= 0 else ''}"


def _name(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def _end(code: int, place: str) -> str:
    """How a process ended: its exit code, or the signal that killed it, and where."""
    if code >= 0:
        return f"exited with code {code} {place}"
    name = {known.value: known.name for known in signal.Signals}.get(-code, f"signal {-code}")
    cause = " (not sent by sft_recipes; usually the out-of-memory killer of the host or of the container)"
    return f"killed by {name} {place}{cause if name == 'SIGKILL' else ''}"


class Watchdog:
    """Polls the ranks of one launch on this node."""

    def __init__(
        self, run_dir: RunDir, plan: Plan, can_save: bool = True, node: int = 0, ended: Callable[[], ExitCodes] = dict
    ):
        """
        Args:
            can_save: whether ranks save at a stop request; a sanity check is terminated instead.
            node: index of this host among the plan's nodes.
            ended: returns the exit codes of the nodes that have ended.
        """
        self.run_dir = run_dir
        self.limits = Limits(plan.sections.monitor.heartbeat_timeout_seconds, max_save_seconds(plan))
        self.can_save, self.node = can_save, node
        ranks_here = plan.world_size // plan.nodes
        self.expected = set(range(node * ranks_here, (node + 1) * ranks_here))
        self.ranks: dict[int, RankStatus] = {}
        self.stall: str | None = None
        self.waits_for_peer = self.peer_stopped = False
        self._ended_nodes = ended
        self._several_nodes = plan.nodes > 1
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
        # Two nodes may be one host, which then has the heartbeats of both.
        heartbeats = {rank: beat for rank, beat in heartbeats.items() if rank in self.expected}
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

    def find_own_failure(self) -> bool:
        """Whether a rank of this node has died, and not because it lost one of another node."""
        self.poll()
        dead = self.dead_ranks()
        return bool(dead) and not lost_peer(find_first_failure(dead))

    def dead_ranks(self) -> list[RankStatus]:
        """Ranks that ended other than normally."""
        return [rank for rank in self.ranks.values() if rank.died]

    def detect_stall(self) -> bool:
        """Whether the ranks are stalled, or their launcher is without them; writes the stack traces then."""
        ranks = list(self.ranks.values())
        if ranks and all_stalled(ranks, self.limits):
            waiting = self._write_stack_traces()
            # Perhaps for another node, unless one of these ranks is stopped or the others are in a collective: the
            # collectives of a backward pass are in no Python stack.
            stopped = any(rank.state in ("T", "t") for rank in ranks)
            self.waits_for_peer = self._several_nodes and not stopped and waiting in (set(), self.ranks.keys())
            for rank in filter(lambda rank: rank.heartbeat.rank in waiting, ranks):
                in_collective = replace(rank.heartbeat, activity="waiting")
                self.ranks[rank.heartbeat.rank] = replace(rank, heartbeat=in_collective)
            self.stall = stall_message(list(self.ranks.values()), self.limits)
        elif self._missing_seconds > max(timeouts.MODEL_LOADING, self.limits.stall):
            absent = ", ".join(map(str, sorted(self.expected - self._started)))
            problem = f"rank {absent} did not start" if absent else "all ranks have exited, but not their launcher,"
            self.stall = f"{problem} on {socket.gethostname()} within {self._missing_seconds:.0f} s"
        elif all(rank.heartbeat.activity == "starting" for rank in ranks) and (ended := self._ended_nodes()):
            # Before the first step these ranks may wait half an hour for those of another node.
            failed = {node: code for node, code in ended.items() if code}
            if failed:
                self.stall, self.waits_for_peer = f"node {min(failed)} has ended before the first step", True
                self.peer_stopped = EXIT_STOPPED in failed.values()
        return self.stall is not None

    def _write_stack_traces(self) -> set[int]:
        """Have each rank write its Python stack trace; return the ranks that are in a collective. One that a signal
        stopped writes none."""
        for status in self.ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(status.heartbeat.pid, signal.SIGUSR2)
        time.sleep(timeouts.STACK_TRACES)
        files = {rank: heartbeat.rank_file(self.run_dir.stack_traces, rank, ".txt") for rank in self.ranks}
        return {rank for rank, file in files.items() if file.exists() and is_in_collective(file.read_text("utf-8"))}

    def kill_ranks(self) -> None:
        """Kill the ranks that have not ended normally, with their children: each may lead a process group."""
        self.poll()
        for rank in self.ranks.values():
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(rank.heartbeat.pid, signal.SIGKILL)

    def wait_until_gone(self) -> None:
        """Wait until the processes of killed ranks are gone, at most a few seconds."""
        pids = [rank.heartbeat.pid for rank in self.ranks.values()]
        wait_until(lambda: not any(map(heartbeat.process_state, pids)), timeouts.LAUNCHER_EXIT, 0.05)

    def result(self, launcher_code: int, launcher_was_killed: bool) -> LaunchResult:
        """Result of the ranks, after their launcher has exited.

        Args:
            launcher_code: exit code of the launcher, negative for a signal.
            launcher_was_killed: by this process, since it did not exit after its ranks.
        """
        self.poll()
        self._remove_empty_stack_traces()
        if self.peer_stopped:
            return LaunchResult(EXIT_STOPPED)
        if self.stall is not None:
            return LaunchResult(EXIT_ERROR, self.stall, lost_peer=self.waits_for_peer)
        if launcher_code < 0 and not launcher_was_killed:
            if -launcher_code in STOP_SIGNALS:  # before it had installed its signal handlers
                return LaunchResult(EXIT_STOPPED)
            end = _end(launcher_code, f"on {socket.gethostname()}")
            return LaunchResult(EXIT_ERROR, f"launcher of the ranks: {end}")
        codes = heartbeat.read_exit_codes(self.run_dir.ranks, self.node)
        not_started = {rank: code for rank, code in (codes or {}).items() if rank not in self._started}
        if not_started:
            return _failed_before_start(not_started, self._several_nodes)
        dead = self.dead_ranks()
        if not dead:
            return LaunchResult(EXIT_ERROR if launcher_code else 0)
        first = find_first_failure(dead)
        if first.failure is not None and first.failure.user_error:
            return LaunchResult(EXIT_USER, first.failure.message)
        message = failure_message(first, None if codes is None else codes.get(first.heartbeat.rank, 0))
        return LaunchResult(EXIT_ERROR, message, lost_peer=lost_peer(first))

    def _remove_empty_stack_traces(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # another node removes them too
            if not any(file.stat().st_size for file in self.run_dir.stack_traces.glob("*.txt")):
                shutil.rmtree(self.run_dir.stack_traces)


def _failed_before_start(codes: Mapping[int, int], several_nodes: bool) -> LaunchResult:
    """Result of ranks that ended before their first heartbeat. They had no signal handlers yet, and after one fails
    torch's agent sends a stop signal to the others."""
    failed = {rank: code for rank, code in codes.items() if -code not in STOP_SIGNALS}
    if not failed:
        return LaunchResult(EXIT_STOPPED)
    rank, code = min(failed.items())
    error = f"{_name(rank)}: {_end(code, 'before its first heartbeat')}"
    return LaunchResult(EXIT_ERROR, error, lost_peer=several_nodes and code > 0)
