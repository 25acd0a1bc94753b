"""Checks of a node that `doctor` and the start of a Slurm job share."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import Any, Literal

from sft_recipes.launch.topology import ask_nvidia
from sft_recipes.runtime.units import GIB

Status = Literal["ok", "warning", "error"]

# Log lines of NCCL at NCCL_DEBUG=INFO.
_TRANSPORTS = {
    "NVLink SHARP": r"NVLS multicast support is available| via NVLS",
    "P2P": r" via P2P/",
    "shared memory": r" via SHM/",
    "InfiniBand or RoCE": r" via NET/IB/",
    "TCP sockets": r" via NET/Socket/",
    "network plugin": r" via NET/(?!IB/|Socket/)",
}

IDLE_GPU_BYTES = GIB  # drivers and desktops use less than this of a GPU's memory


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; `fix` is set unless the status is ok."""

    check: str
    status: Status
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.check:<16} {self.detail}{f'; {self.fix}' if self.fix else ''}"


def all_reduce(measured: dict[str, Any], gpus: int, sockets_allowed: bool = False) -> CheckResult:
    """Check that the ranks can all-reduce, over which transports, and how fast.

    Args:
        measured: the report of `tools/allreduce_bench.py` and its `transports`, or an `error`.
    """
    if "error" in measured:
        return CheckResult(
            "all-reduce", "error", measured["error"], "set NCCL_DEBUG=INFO" if gpus else "run make setup"
        )
    if not measured["correct"]:
        return CheckResult("all-reduce", "error", "the sum over the ranks is wrong", "do not train on this machine")
    speed = f"{measured['bytes_per_second'] / 1e9:.1f} GB/s over {measured['ranks']} ranks ({measured['backend']})"
    transports = measured["transports"]
    if not gpus:
        return CheckResult("all-reduce", "ok", speed)
    if measured["ranks"] == 1:
        return CheckResult("all-reduce", "ok", "one GPU: not needed")
    detail = f"{speed}, {' and '.join(transports) or 'transport not in the NCCL log'}"
    if "TCP sockets" in transports and not sockets_allowed:
        fix = "within a node check /dev/shm and NCCL_P2P_DISABLE, between nodes ibv_devinfo; or set ALLOW_SOCKETS=1"
        return CheckResult("all-reduce", "error", detail, fix)
    if "shared memory" in transports:
        return CheckResult("all-reduce", "warning", detail, "no peer-to-peer access: see nvidia-smi topo -m")
    if not transports:
        return CheckResult("all-reduce", "warning", detail, "set NCCL_DEBUG=INFO")
    return CheckResult("all-reduce", "ok", detail)


def find_transports(log: str) -> list[str]:
    """Return the transports that NCCL selected, from its log at NCCL_DEBUG=INFO (lines `Channel … via …`)."""
    return [transport for transport, pattern in _TRANSPORTS.items() if re.search(pattern, log)]


def used_mib() -> dict[str, float]:
    """Return the memory in use on each GPU in MiB, by its nvidia-smi index."""
    if shutil.which("nvidia-smi") is None:
        return {}
    return {row[0]: float(row[1]) for row in ask_nvidia("index,memory.used") if len(row) == 2 and row[1].isdigit()}
