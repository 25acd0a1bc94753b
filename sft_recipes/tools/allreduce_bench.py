"""Sums over all ranks, as training does its gradients, and times that: for `doctor`, and before jobs of several nodes.

Started by torchrun, a process a GPU, or processes on the CPU. Rank 0 writes JSON to the file that is named.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sft_recipes.runtime import timeouts

_BYTES = {"nccl": 256 << 20, "gloo": 4 << 20}
_TIMES = 10


def measure() -> dict[str, Any]:
    """Whether the sum was right, and the bus bandwidth in bytes a second.

    The bus bandwidth is what a rank's link carries, 2 (n-1)/n of the bytes a second that are summed: it compares with
    the link's own figure whatever the number of ranks (nccl-tests, doc/PERFORMANCE.md).
    """
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend,
        device_id=device if backend == "nccl" else None,
        timeout=datetime.timedelta(seconds=timeouts.ALLREDUCE_RENDEZVOUS),
    )
    ranks, rank = dist.get_world_size(), dist.get_rank()
    values = torch.full((_BYTES[backend] // 4,), float(rank + 1), device=device)
    dist.all_reduce(values)
    right = bool((values == ranks * (ranks + 1) / 2).all())
    values.zero_()
    _wait(device)
    began = time.perf_counter()
    for _ in range(_TIMES):
        dist.all_reduce(values)
    _wait(device)
    seconds = (time.perf_counter() - began) / _TIMES
    rights = torch.tensor([float(right)], device=device)
    dist.all_reduce(rights)
    dist.destroy_process_group()
    bandwidth = 2 * (ranks - 1) / ranks * _BYTES[backend] / seconds
    return {
        "backend": backend,
        "ranks": ranks,
        "rank": rank,
        "right": bool(rights == ranks),
        "bytes_a_second": bandwidth,
    }


def _wait(device: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    found = measure()
    if found["rank"] == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
