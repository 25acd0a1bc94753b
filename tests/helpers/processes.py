"""What the tests see of a real run from outside: its processes, their command lines, what they listen on."""

from __future__ import annotations

import contextlib
import ipaddress
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.workplace import HANG_SECONDS

_LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp (Linux, include/net/tcp_states.h)


def family(process: int) -> list[int]:
    """A process and all that come from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def commands() -> Iterator[tuple[int, bytes]]:
    """Every process that this user can see, with its words, each ended by a NUL; those that have none left out."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if command := path.read_bytes():
                yield int(path.parent.name), command


def launcher_of(plan: Path) -> int:
    """The process that started the ranks of a run."""
    return next(
        pid
        for pid, words in commands()
        if b"sft_recipes.training.rank_launcher" in words and str(plan).encode() in words
    )


def command_of(process: int) -> str:
    """Its words, one behind the other; nothing where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def listening(processes: list[int]) -> set[tuple[str, str]]:
    """Addresses on which they take TCP connections, each with the command that does."""
    holder = {}
    for process in processes:
        with contextlib.suppress(OSError):
            for opened in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    holder[str(opened.readlink())] = process
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            process = holder.get(f"socket:[{fields[9]}]")
            if fields[3] == _LISTENS and process:
                found.add((_address(fields[1].partition(":")[0]), command_of(process)))
    return found


def _address(text: str) -> str:
    words = [int(text[place : place + 8], 16) for place in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words)))


@dataclass
class Seen:
    """What was seen of a command while it ran."""

    process: subprocess.Popen[str]
    commands: set[str] = field(default_factory=set)
    listened: set[tuple[str, str]] = field(default_factory=set)

    def watch(self, until: Callable[[], bool]) -> None:
        """Looks on until something is so, or the command has ended."""
        give_up = time.monotonic() + HANG_SECONDS
        while self.process.poll() is None and not until():
            assert time.monotonic() < give_up, "it hangs"
            processes = family(self.process.pid)
            self.commands |= {command_of(one) for one in processes}
            self.listened |= listening(processes)
            time.sleep(0.3)

    @property
    def reached_from_outside(self) -> set[tuple[str, str]]:
        """Of what was listened on, all but loopback."""
        return {
            (address, command) for address, command in self.listened if not ipaddress.ip_address(address).is_loopback
        }
