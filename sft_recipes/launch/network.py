"""Find the address by which one node reaches another, and the network interface to it."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sft_recipes.runtime import timeouts

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def candidate_addresses(configured: Iterable[str]) -> list[str]:
    """Return addresses of this node, best first: the configured ones, its host name, each of its IPv4 addresses."""
    own = [address for address in _interfaces().values() if not address.startswith("127.")]
    return list(dict.fromkeys([*configured, socket.gethostname(), *own]))


def reachable_addresses(addresses: Sequence[str], port: int) -> list[str]:
    """Return the addresses at which a process listens on the port, as seen from this node."""

    def is_reachable(address: str) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((address, port), timeouts.NODE_REACHABLE).close()
            return True
        return False

    with ThreadPoolExecutor(len(addresses)) as pool:
        reachable = pool.map(is_reachable, addresses)
        return [address for address, connected in zip(addresses, reachable, strict=True) if connected]


def interface_towards(address: str) -> str | None:
    """Return the name of the interface that routes to an address; None if there is no route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of a datagram socket: selects the route and sends nothing
        own_address = probe.getsockname()[0]
        return next((name for name, own in _interfaces().items() if own == own_address), None)
    return None


def _interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # without an address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses
