"""What the processes of a run know of each other: whose child each is, and where each rank stands (its pulse)."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The launcher's process id, for its ranks: one that is somebody else's child by then has lost it already.
LAUNCHER = "SFT_LAUNCHER_PROCESS"

# By these a person or a scheduler asks a run to save and stop.
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


Doing = Literal["starting", "step", "waiting", "evaluating", "saving", "ending"]
_PULSE_BYTES = 256  # always as many: a pulse is written over the last one in place
Record = TypeVar("Record")


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stands; rewritten at each move.

    Attributes:
        process: its id on its host.
        step: the optimizer step that it is in.
        doing: `starting` until the first step, `ending` behind the last one; `waiting` for other ranks.
        moves: how many there were in this step. Ranks make the same moves, so one that has made fewer is behind.
        moved: when the last one was, by CLOCK_MONOTONIC, in seconds.
        longest: the longest time between two moves while it trained or evaluated, in seconds.
    """

    rank: int
    process: int
    step: int
    doing: Doing
    moves: int
    moved: float
    longest: float


@dataclass(frozen=True)
class Failure:
    """The exception that ended a rank.

    Attributes:
        kind: its class.
        said: its first line; a data worker's own last one.
        at: when it left the rank's program, by CLOCK_MONOTONIC, in seconds.
        by_user: whether it says what the user got wrong, rather than a fault.
    """

    rank: int
    process: int
    step: int
    kind: str
    said: str
    at: float
    by_user: bool


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, however it dies; Linux alone can.

    Called by a process for itself, also between fork and exec. Killed, not asked: a rank that went on saving would
    meet the next start of its run in the same folder.

    Args:
        parent: the id of the process that started this one.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call took effect
        os.kill(os.getpid(), signal.SIGKILL)


def place(folder: Path, rank: int, suffix: str = "") -> Path:
    """A rank's own file in a folder; the host is in its name, since process ids are a host's own."""
    return folder / f"{socket.gethostname()}-{rank}{suffix}"


def to_bytes(pulse: Heartbeat) -> bytes:
    """A pulse as it is written, always of the same length."""
    written = json.dumps(vars(pulse)).encode().ljust(_PULSE_BYTES)
    assert len(written) == _PULSE_BYTES, written
    return written


def pulses(ranks: Path) -> dict[int, Heartbeat]:
    """The pulses of this host's ranks, but for those that ended as they should."""
    return _read(ranks, "", lambda content: Heartbeat(**content))


def leave_failure(ranks: Path, failure: Failure) -> None:
    """Leaves word of what ended a rank, whole or not at all."""
    file = place(ranks, failure.rank, ".failure")
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(vars(failure)), encoding="utf-8")
    partial.replace(file)


def failures(ranks: Path) -> dict[int, Failure]:
    """What ended ranks of this host."""
    return _read(ranks, ".failure", lambda content: Failure(**content))


def leave_exit_codes(ranks: Path, codes: dict[int, int]) -> None:
    """Leaves word of how those ranks of this host ended that did not leave with 0; a signal is a negative code."""
    ranks.mkdir(exist_ok=True)
    place_of_codes(ranks).write_text(json.dumps(codes), encoding="utf-8")


def exit_codes(ranks: Path) -> dict[int, int] | None:
    """How ranks of this host ended, all others having left with 0; None where their launcher left no word."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # a launcher that is killed leaves none, or half of one
        content = json.loads(place_of_codes(ranks).read_text(encoding="utf-8"))
        return {int(rank): int(code) for rank, code in content.items()}
    return None


def place_of_codes(ranks: Path) -> Path:
    """The file in which this host's launcher says how its ranks ended."""
    return ranks / f"{socket.gethostname()}.ended"


def ask_to_stop(ranks: Path) -> bool:
    """Asks the ranks of this host to save and stop; False, and nobody is asked, where none has taken a step to save."""
    there = pulses(ranks).values()
    if all(pulse.doing == "starting" for pulse in there):
        return False
    for pulse in there:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pulse.process, signal.SIGTERM)
    return True


def state(process: int) -> str:
    """The letter of a process's state in proc(5): R runs, S sleeps, D waits for a disk or device, T is stopped by a
    signal; empty where it is gone, or is a zombie, whom nothing wakes. Without /proc a living one is `?`."""
    stat = Path(f"/proc/{process}/stat")
    if not stat.parent.parent.joinpath("self").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, 0)
            return "?"
        return ""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        letter = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        return "" if letter in "ZX" else letter
    return ""


def _read(ranks: Path, suffix: str, build: Callable[[dict[str, Any]], Record]) -> dict[int, Record]:
    """Records of this host's ranks, by rank. One that is being written over just now is left out: it is there again at
    the next look."""
    found = {}
    host = f"{socket.gethostname()}-"
    for file in ranks.glob(f"{host}*{suffix}"):
        rank = file.name.removeprefix(host).removesuffix(suffix)
        with contextlib.suppress(FileNotFoundError, ValueError):
            if rank.isdigit():
                found[int(rank)] = build(json.loads(file.read_text(encoding="utf-8")))
    return found
