"""Heartbeats, failures and exit codes that ranks leave for their launcher, as files in the run directory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Environment variable with the launcher's process id: a rank whose parent is another process has already lost it.
LAUNCHER_PID = "SFT_LAUNCHER_PID"

# Signals by which a user or a scheduler requests that a run saves and stops.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

Activity = Literal["starting", "step", "waiting", "evaluating", "saving", "ending"]
_HEARTBEAT_BYTES = 256  # fixed: a heartbeat overwrites the previous one in place
Record = TypeVar("Record")


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a rank, rewritten at each beat.

    Attributes:
        pid: process id on its host.
        step: current optimizer step.
        activity: `starting` until the first step, `ending` after the last one, `waiting` for other ranks.
        beats: number of beats in this step. All ranks beat at the same places, so the rank with fewer is behind.
    """

    rank: int
    pid: int
    step: int
    activity: Activity
    beats: int


@dataclass(frozen=True)
class Failure:
    """Exception that ended a rank.

    Attributes:
        kind: class of the exception.
        message: its first and its last line.
        failed_at: when it left the rank's main program, in seconds of CLOCK_MONOTONIC.
        user_error: whether it is a `UserError`.
    """

    kind: str
    message: str
    failed_at: float
    user_error: bool


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGKILL to this process when its parent exits, for any reason.

    SIGKILL and not SIGTERM: a rank that is still saving would collide with the next attempt in the same run directory.
    Safe to call between fork and exec.

    Args:
        parent: process id of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before the call took effect
        os.kill(os.getpid(), signal.SIGKILL)


def rank_file(directory: Path, rank: int, suffix: str = "") -> Path:
    """Path of a rank's file; it includes the host name, since process ids are per host."""
    return directory / f"{socket.gethostname()}-{rank}{suffix}"


def encode(heartbeat: Heartbeat) -> bytes:
    """Encode a heartbeat as JSON, padded to a fixed length."""
    content = json.dumps(vars(heartbeat)).encode().ljust(_HEARTBEAT_BYTES)
    assert len(content) == _HEARTBEAT_BYTES, content
    return content


def read_heartbeats(ranks_dir: Path) -> dict[int, Heartbeat]:
    """Read the heartbeats of this host's ranks; ranks that exited normally have none."""
    return _read(ranks_dir, "", lambda content: Heartbeat(**content))


def read_failures(ranks_dir: Path) -> dict[int, Failure]:
    """Read the exceptions that ended ranks of this host."""
    return _read(ranks_dir, ".failure", lambda content: Failure(**content))


def read_exit_codes(ranks_dir: Path, node: int = 0) -> dict[int, int] | None:
    """Read the exit codes other than 0 of a node's ranks; None if their launcher, killed, recorded none."""
    launchers = _read(ranks_dir, ".codes", lambda content: {int(rank): code for rank, code in content.items()})
    return launchers.get(node)


def write_failure(ranks_dir: Path, rank: int, failure: Failure) -> None:
    """Record the exception that ended a rank."""
    _write(rank_file(ranks_dir, rank, ".failure"), vars(failure))


def write_exit_codes(ranks_dir: Path, codes: dict[int, int], node: int = 0) -> None:
    """Record the exit codes other than 0 of a node's ranks; a signal is a negative code. Two nodes may be one host."""
    ranks_dir.mkdir(exist_ok=True)
    _write(rank_file(ranks_dir, node, ".codes"), codes)


def _write(file: Path, content: dict[Any, Any]) -> None:
    """Write a record atomically, without fsync: it is of use while the launcher runs."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(file)


def request_stop(ranks_dir: Path) -> bool:
    """Send SIGTERM to this host's ranks, which save and exit; return False and send nothing before the first step."""
    heartbeats = read_heartbeats(ranks_dir).values()
    if all(heartbeat.activity == "starting" for heartbeat in heartbeats):
        return False
    for heartbeat in heartbeats:
        with contextlib.suppress(ProcessLookupError):
            os.kill(heartbeat.pid, signal.SIGTERM)
    return True


def process_state(pid: int) -> str:
    """Return the state letter of a process in proc(5): R running, S sleeping, D waiting for a disk or device, T stopped
    by a signal; empty if it exited or is a zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0].strip("ZX")
    return ""


def _read(ranks_dir: Path, suffix: str, build: Callable[[dict[str, Any]], Record]) -> dict[int, Record]:
    """Read records of this host's ranks, by rank; a record that is being overwritten is skipped until the next poll."""
    records = {}
    host = f"{socket.gethostname()}-"
    for file in ranks_dir.glob(f"{host}*{suffix}"):
        rank = file.name.removeprefix(host).removesuffix(suffix)
        with contextlib.suppress(FileNotFoundError, ValueError):
            if rank.isdigit():
                records[int(rank)] = build(json.loads(file.read_text(encoding="utf-8")))
    return records
