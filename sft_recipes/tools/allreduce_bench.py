"""Time an all-reduce over all ranks: for `doctor`, and before jobs on several nodes.

torchrun starts one process per GPU, or processes on the CPU. Rank 0 writes JSON to the file that is its argument.
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
_REPETITIONS = 10


def measure() -> dict[str, Any]:
    """Return whether the sum is correct on every rank, and the bus bandwidth in bytes per second.

    The bus bandwidth is what the link of a rank transfers: 2 (n-1)/n of the bytes reduced per second. It is comparable
    with the link's nominal bandwidth for any number of ranks (nccl-tests, doc/PERFORMANCE.md).
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
    correct = bool((values == ranks * (ranks + 1) / 2).all())
    values.zero_()
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(_REPETITIONS):
        dist.all_reduce(values)
    _synchronize(device)
    seconds = (time.perf_counter() - began) / _REPETITIONS
    correct_ranks = torch.tensor([float(correct)], device=device)
    dist.all_reduce(correct_ranks)
    dist.destroy_process_group()
    return {
        "backend": backend,
        "ranks": ranks,
        "rank": rank,
        "correct": bool(correct_ranks == ranks),
        "bytes_per_second": 2 * (ranks - 1) / ranks * _BYTES[backend] / seconds,
    }


def _synchronize(device: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    report = measure()
    if report["rank"] == 0:
        Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
