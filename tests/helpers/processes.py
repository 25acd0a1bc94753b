"""A real run seen from outside: its processes, their command lines, the addresses they listen on."""

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


def process_tree(process: int) -> list[int]:
    """Return a process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has exited
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    tree = [process]
    for parent in tree:
        tree += children.get(parent, [])
    return tree


def commands() -> Iterator[tuple[int, bytes]]:
    """Yield every visible process with its command line, arguments ended by NUL; without kernel threads."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has exited
            if command := path.read_bytes():
                yield int(path.parent.name), command


def launcher_of(plan: Path) -> int:
    """Return the process that started the ranks of a run."""
    return next(
        pid
        for pid, command in commands()
        if b"sft_recipes.training.rank_launcher" in command and str(plan).encode() in command
    )


def command_of(process: int) -> str:
    """Return the command line of a process; empty if it has exited."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def listening(processes: list[int]) -> set[tuple[str, str]]:
    """Return the addresses on which processes accept TCP connections, each with the command."""
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
    parts = [int(text[place : place + 8], 16) for place in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(struct.pack("=I", part) for part in parts)))


@dataclass
class ObservedCommand:
    """A command under observation: the commands it started and the addresses they listened on."""

    process: subprocess.Popen[str]
    commands: set[str] = field(default_factory=set)
    listened: set[tuple[str, str]] = field(default_factory=set)

    def watch(self, condition: Callable[[], bool]) -> None:
        """Observe until a condition holds or the command has exited."""
        give_up = time.monotonic() + HANG_SECONDS
        while self.process.poll() is None and not condition():
            assert time.monotonic() < give_up, "timeout"
            processes = process_tree(self.process.pid)
            self.commands |= {command_of(process) for process in processes}
            self.listened |= listening(processes)
            time.sleep(0.3)

    @property
    def reachable_from_outside(self) -> set[tuple[str, str]]:
        """The addresses other than loopback."""
        return {
            (address, command) for address, command in self.listened if not ipaddress.ip_address(address).is_loopback
        }
