"""Runs a command in its own process group, terminates it if a rank fails, and leaves no process of it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping

from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.launch.watchdog import LaunchResult, Watchdog
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import EXIT_STOPPED


def run(arguments: list[str], environment: Mapping[str, str], stop_request: StopRequest) -> int:
    """Run a command without ranks to its end, or terminate it at a stop request; return its exit code."""
    if stop_request.requested:
        return EXIT_STOPPED
    with _start(arguments, environment) as process:
        while _is_running(process):
            if stop_request.requested:
                return EXIT_STOPPED
        # Slurm signals every process of a job, this one too.
        stopped = stop_request.requested or -process.returncode in heartbeat.STOP_SIGNALS
        return EXIT_STOPPED if process.returncode and stopped else process.returncode


def run_ranks(
    arguments: list[str], environment: Mapping[str, str], stop_request: StopRequest, watchdog: Watchdog
) -> LaunchResult:
    """Run the launcher of ranks to its end.

    At a stop request the ranks are signalled, and save together. Ranks that cannot save yet are terminated at once, as
    any are at a forced quit. If a rank dies or stalls, the others are terminated.
    """
    if stop_request.requested:
        return LaunchResult(EXIT_STOPPED)
    with contextlib.ExitStack() as at_end:  # in reverse order
        at_end.callback(watchdog.wait_until_gone)
        process = at_end.enter_context(_start(arguments, environment))
        at_end.callback(watchdog.kill_ranks)
        stopped, killed = _wait_for_ranks(process, stop_request, watchdog)
        if stopped or process.wait() == EXIT_STOPPED:
            return LaunchResult(EXIT_STOPPED)
        return watchdog.result(process.returncode, killed)


@contextlib.contextmanager
def _start(arguments: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in its own process group, of which no process is left afterwards."""
    process = subprocess.Popen(
        arguments,
        env=dict(environment),
        stdin=subprocess.DEVNULL,  # no prompts: W&B would prompt for a key, and wait
        start_new_session=True,
        preexec_fn=functools.partial(heartbeat.die_with_parent, os.getpid()),  # noqa: PLW1509  there are no threads
    )
    try:
        yield process
        if process.poll() == 0:
            wait_until(lambda: not _signal_group(process.pid, 0), timeouts.PROCESS_GROUP_EXIT, 0.05)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


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
