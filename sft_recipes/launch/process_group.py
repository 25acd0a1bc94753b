"""Runs a command in its own process group, terminates it if a rank fails, and leaves no process of it."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Mapping

from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.launch.watchdog import LaunchResult, Watchdog
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.run_dir import EXIT_STOPPED


def run(
    arguments: list[str],
    environment: Mapping[str, str],
    stop_request: StopRequest,
    watchdog: Watchdog | None = None,
) -> LaunchResult:
    """Run a command to its end.

    At a stop request the ranks are signalled, and save together. A command without ranks, or whose ranks cannot save
    yet, is terminated at once, as is any at a forced quit. If a rank dies or stalls, the others are terminated.
    """
    if stop_request.requested:
        return LaunchResult(EXIT_STOPPED)
    process = subprocess.Popen(
        arguments,
        env=dict(environment),
        stdin=subprocess.DEVNULL,  # no prompts: W&B would prompt for a key, and wait
        start_new_session=True,
        preexec_fn=functools.partial(heartbeat.die_with_parent, os.getpid()),  # noqa: PLW1509  there are no threads
    )
    try:
        if watchdog is None:
            stopped, killed = _wait(process, stop_request), False
        else:
            stopped, killed = _wait_for_ranks(process, stop_request, watchdog)
        if stopped:
            return LaunchResult(EXIT_STOPPED)
        code = process.wait()
        if code and watchdog is None and (stop_request.requested or -code in heartbeat.STOP_SIGNALS):
            return LaunchResult(EXIT_STOPPED)  # Slurm signals every process of a job, this one too
        without_ranks = watchdog is None or code == EXIT_STOPPED
        result = LaunchResult(code) if without_ranks else watchdog.result(code, killed)  # type: ignore[union-attr]
        if result.code == 0:
            _wait_for_group(process.pid, timeouts.PROCESS_GROUP_EXIT)
        return result
    finally:
        if watchdog is not None:
            watchdog.kill_ranks()
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        if watchdog is not None:
            watchdog.wait_until_gone(timeouts.LAUNCHER_EXIT)


def _wait(process: subprocess.Popen[bytes], stop_request: StopRequest) -> bool:
    """Wait for a command without ranks; return whether it has to be terminated."""
    while _is_running(process):
        if stop_request.requested:
            return True
    return False


def _wait_for_ranks(
    process: subprocess.Popen[bytes], stop_request: StopRequest, watchdog: Watchdog
) -> tuple[bool, bool]:
    """Wait for the launcher of ranks; return whether a stop request terminates them, and whether the launcher was
    killed."""
    forwarded = False
    kill_at: float | None = None
    while _is_running(process):
        if stop_request.force_quit:
            return True, False
        if stop_request.requested and not forwarded and not watchdog.find_own_failure():
            if not (watchdog.can_save and heartbeat.request_stop(watchdog.run_dir.ranks)):
                return True, False
            forwarded = True
        watchdog.poll()
        now = time.monotonic()
        if kill_at is None:
            if watchdog.dead_ranks():
                kill_at = now + timeouts.OTHER_RANKS_EXIT
            elif watchdog.detect_stall():
                kill_at = now
        if kill_at is not None and now >= kill_at:
            watchdog.kill_ranks()
            if now >= kill_at + timeouts.LAUNCHER_EXIT:
                return False, _signal_group(process.pid, signal.SIGKILL)
    return False, False


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process still runs after one polling interval."""
    try:
        process.wait(timeouts.POLL_RANKS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; return whether it had a process left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _wait_for_group(group: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while _signal_group(group, 0) and time.monotonic() < until:
        time.sleep(0.05)
