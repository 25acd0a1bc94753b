"""Checks of a node that both `doctor` and the start of a Slurm job make."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import Any, Literal

from sft_recipes.launch.topology import ask_nvidia
from sft_recipes.runtime.units import GIB

Colour = Literal["green", "yellow", "red"]


_WAYS = {
    "NVLink's switch": r"NVLS multicast support is available| via NVLS",
    "direct": r" via P2P/",
    "shared memory": r" via SHM/",
    "InfiniBand or RoCE": r" via NET/IB/",
    "plain sockets": r" via NET/Socket/",
    "a plugin's network": r" via NET/(?!IB/|Socket/)",
}

OWNED_BY_NOBODY_ELSE = GIB  # what drivers and desktops take of a GPU is less


@dataclass(frozen=True)
class Finding:
    """What a check came to; where it is not green, the way out."""

    check: str
    colour: Colour
    found: str
    way_out: str = ""

    def __str__(self) -> str:
        return f"{self.colour:<7} {self.check:<16} {self.found}{f'; {self.way_out}' if self.way_out else ''}"


def all_reduce(measured: dict[str, Any], gpus: int, sockets_allowed: bool = False) -> Finding:
    """Whether ranks can sum, by which way, and how fast."""
    if "error" in measured:
        return Finding("all-reduce", "red", measured["error"], "NCCL_DEBUG=INFO says more" if gpus else "make setup")
    if not measured["right"]:
        return Finding("all-reduce", "red", "a sum over the ranks is wrong", "take no step on this machine")
    speed = f"{measured['bytes_a_second'] / 1e9:.1f} GB/s over {measured['ranks']} ranks ({measured['backend']})"
    ways = measured["ways"]
    if not gpus:
        return Finding("all-reduce", "green", speed)
    if measured["ranks"] == 1:
        return Finding("all-reduce", "green", "one GPU: nothing to sum over")
    said = f"{speed}, {' and '.join(ways) or 'by a way that its log does not tell'}"
    if "plain sockets" in ways and not sockets_allowed:
        way_out = (
            "within a node look at /dev/shm and NCCL_P2P_DISABLE, between nodes at ibv_devinfo; or allow it: "
            "ALLOW_SOCKETS=1"
        )
        return Finding("all-reduce", "red", said, way_out)
    if "shared memory" in ways:
        return Finding("all-reduce", "yellow", said, "the GPUs do not reach each other: nvidia-smi topo -m")
    if not ways:
        return Finding("all-reduce", "yellow", said, "NCCL_DEBUG=INFO says more")
    return Finding("all-reduce", "green", said)


def ways(log: str) -> list[str]:
    """The transports that NCCL chose, from its log at NCCL_DEBUG=INFO (lines `Channel … via …`)."""
    return [way for way, pattern in _WAYS.items() if re.search(pattern, log)]


def used_mib() -> dict[str, float]:
    """What is taken of each GPU's memory, in MiB, by its id as nvidia-smi counts."""
    if shutil.which("nvidia-smi") is None:
        return {}
    return {row[0]: float(row[1]) for row in ask_nvidia("index,memory.used") if len(row) == 2 and row[1].isdigit()}
