"""Measures throughput: seconds per step, the share that waits for data, tokens/s, memory, and MFU.

No measurement adds a synchronization; the ranks' numbers are gathered once per log line. The end of a step already
waits for the GPU (callbacks/graceful_stop.py), so wall time is the time of the work.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch

from sft_recipes.planner import cost
from sft_recipes.planner.plan import Plan, memory_inputs

# Sums of a rank since the last log line, and its memory; gathered as one row of a tensor.
_SUMS = ("padded_tokens", "attended", "data_wait")
_MEMORY = ("memory_allocated_bytes", "memory_reserved_bytes", "memory_peak_bytes", "host_memory_bytes")


class ThroughputMeter:
    """Accumulates between two log lines; `read` returns the metrics over all ranks and resets."""

    def __init__(self, plan: Plan, architecture: Mapping[str, Any], peak_flops: float | None, device: torch.device):
        """Set up; `peak_flops` is dense bf16 FLOP/s of one device (config/gpu_types.py), None if unknown."""
        self._plan = plan
        self._architecture = architecture
        self._peak_flops = peak_flops
        self._device = device
        self._step_start = 0.0
        self._reset()

    def _reset(self) -> None:
        self._steps, self._seconds, self._supervised_tokens = 0, 0.0, 0
        self._sums: dict[str, Any] = dict.fromkeys(_SUMS, 0)

    def begin_step(self, tokens_seen: int) -> None:
        """Start timing a step, before its first batch is requested.

        Args:
            tokens_seen: tokens without padding before the step, over all ranks and attempts.
        """
        if not self._steps:
            self._tokens_before = tokens_seen
        self._step_start = time.perf_counter()

    def time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches, and count the time until each is available as data wait."""
        start = time.perf_counter()
        for batch in batches:
            self._sums["data_wait"] += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def add_batches(self, batches: list[dict[str, torch.Tensor]], supervised_tokens: int) -> None:
        """Count the step's micro-batches on this rank, and its supervised tokens over all ranks."""
        self._supervised_tokens += supervised_tokens
        for batch in batches:
            self._sums["padded_tokens"] += batch["input_ids"].numel()
            self._sums["attended"] += count_attended_pairs(batch)  # a tensor: read at log lines only

    def end_step(self) -> None:
        """Stop timing, after the ranks have synchronized at the step's end."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._step_start

    def read(self, accelerator: Any, tokens_seen: int) -> dict[str, float]:
        """Return the metrics since the last call; nothing without a step. Collective: call on every rank.

        Args:
            tokens_seen: tokens without padding after the last step, over all ranks and attempts.
        """
        if not self._steps:
            return {}
        tokens = tokens_seen - self._tokens_before
        memory = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated())
        measured = [float(value) for value in (*self._sums.values(), *memory, psutil.Process().memory_info().rss)]
        gathered = accelerator.gather(torch.tensor([measured], dtype=torch.float64, device=self._device))
        columns = gathered.reshape(-1, len(measured)).T.tolist()
        ranks = dict(zip((*_SUMS, *_MEMORY), columns, strict=True))
        metrics = {
            "step_seconds": self._seconds / self._steps,
            "data_wait_fraction": max(ranks["data_wait"]) / self._seconds,
            "padded_tokens_per_second": sum(ranks["padded_tokens"]) / self._seconds,
            "tokens_per_second": tokens / self._seconds,
            "supervised_tokens_per_second": self._supervised_tokens / self._seconds,
            **self._utilization(tokens, sum(ranks["attended"])),
            **{name: int(max(ranks[name])) for name in _MEMORY if max(ranks[name])},
        }
        self._reset()
        return metrics

    def _utilization(self, tokens: int, attended_tokens: float) -> dict[str, float]:
        """Return MFU and HFU, fractions of 1, with the plan's FLOP count (planner.cost) for the lengths and supervised
        tokens of the steps."""
        tokens, load = max(tokens, 1), memory_inputs(self._plan, dict(self._architecture))
        if self._peak_flops is None or load is None:
            return {}
        flops = cost.flops_per_token(load, 2 * attended_tokens / tokens, self._supervised_tokens / tokens)
        peak_per_token = self._peak_flops * self._plan.world_size * self._seconds / tokens
        return {"mfu": flops.model / peak_per_token, "hfu": flops.hardware / peak_per_token}


def count_attended_pairs(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Count pairs of a token and a token it attends to, including itself: about half the sum of squared lengths."""
    if "position_ids" in batch:
        return (batch["position_ids"] + 1).sum()
    lengths = batch["attention_mask"].sum(-1)
    return (lengths * (lengths + 1) // 2).sum()
