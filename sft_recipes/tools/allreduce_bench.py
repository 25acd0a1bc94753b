"""Time an all-reduce over all ranks: for `doctor`, and before jobs on several nodes.

torchrun starts one process per GPU, or processes on the CPU. Rank 0 writes `result.json` next to the file that is
its argument.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_recipes.runtime import timeouts

_BYTES = {"nccl": 256 << 20, "gloo": 4 << 20}
_REPETITIONS = 10


def measure() -> dict[str, Any]:
    """Return whether the sum is correct on every rank, and the bus bandwidth in bytes per second.

    The bus bandwidth is what the link of a rank transfers: 2 (n-1)/n of the bytes reduced per second. It is comparable
    with the link's nominal bandwidth for any number of ranks (nccl-tests, doc/PERFORMANCE.md).
    """
    on_gpu = torch.cuda.is_available()
    backend, device = ("nccl", f"cuda:{os.environ['LOCAL_RANK']}") if on_gpu else ("gloo", "cpu")
    limit = datetime.timedelta(seconds=timeouts.ALLREDUCE_RENDEZVOUS)
    dist.init_process_group(backend, device_id=torch.device(device) if on_gpu else None, timeout=limit)
    ranks = dist.get_world_size()
    values = torch.full((_BYTES[backend] // 4,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    correct = (values == ranks * (ranks + 1) / 2).all().float()
    dist.all_reduce(correct)  # its item() waits for the GPU
    all_correct = correct.item() == ranks
    values.zero_()[0].item()
    began = time.perf_counter()
    for _ in range(_REPETITIONS):
        dist.all_reduce(values)
    values[0].item()
    speed = 2 * (ranks - 1) / ranks * _BYTES[backend] * _REPETITIONS / (time.perf_counter() - began)
    return {"backend": backend, "ranks": ranks, "correct": all_correct, "bytes_per_second": speed}


if __name__ == "__main__":
    report = measure()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).with_name("result.json").write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()
