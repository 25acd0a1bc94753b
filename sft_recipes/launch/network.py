"""Finds out by which address one node reaches another, and through which interface."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sft_recipes.runtime import timeouts

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def addresses(named: Iterable[str]) -> list[str]:
    """Under what others may reach this node: as it is named, else by its own name for itself, else by each of its
    addresses (IPv4)."""
    own = [address for address in _interfaces().values() if not address.startswith("127.")]
    return list(dict.fromkeys([*named, socket.gethostname(), *own]))


def reached(tried: Sequence[str], port: int) -> list[str]:
    """Those of the addresses at which somebody listens on that port, as seen from here."""

    def is_reached(address: str) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((address, port), timeouts.NODE_REACHABLE).close()
            return True
        return False

    with ThreadPoolExecutor(len(tried)) as at_once:
        return [address for address, is_so in zip(tried, at_once.map(is_reached, tried), strict=True) if is_so]


def interface_towards(address: str) -> str | None:
    """The name of the interface through which this node speaks with an address; None where there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((address, 9))  # of a datagram socket this sends nothing, and settles the way
        mine = asked.getsockname()[0]
        return next((name for name, own in _interfaces().items() if own == mine), None)
    return None


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found
