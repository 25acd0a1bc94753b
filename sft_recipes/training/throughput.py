"""Measures throughput: seconds per step, the share that waits for data, tokens/s, memory, and MFU.

No measurement adds a synchronization; the ranks' numbers are gathered once per log line. The end of a step already
waits for the GPU (callbacks/graceful_stop.py), so wall time is the time of the work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch

from sft_recipes.planner import cost
from sft_recipes.planner.plan import Plan, memory_inputs

# Measurements of a rank, in the order of the gathered tensor.
_COLUMNS = ("padded_tokens", "attended", "forward_seconds", "data_wait", "allocated", "reserved", "peak", "host")


class ThroughputMeter:
    """Accumulates between two log lines; `read` returns the metrics over all ranks and resets."""

    def __init__(self, plan: Plan, architecture: Mapping[str, Any], peak_flops: float | None, device: torch.device):
        """Set up; `peak_flops` is dense bf16 FLOP/s of one device (config/gpu_types.py), None if unknown."""
        self._plan = plan
        self._architecture = architecture
        self._peak_flops = peak_flops
        self._device = device
        self._process = psutil.Process()
        self._step_start = 0.0
        self._forward_start: Any = None
        self._forwards: list[tuple[Any, Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._data_wait = 0.0
        self._forward_seconds = 0.0
        self._supervised_tokens = 0
        self._padded_tokens = 0
        self._attended = torch.zeros((), dtype=torch.int64, device=self._device)

    def hook(self, model: torch.nn.Module) -> None:
        """Time the forward passes of training: the part of a step in which no rank waits for another, unless parameters
        are sharded."""
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    def _before_forward(self, model: torch.nn.Module, _inputs: Any) -> None:
        self._forward_start = self._now() if model.training else None

    def _after_forward(self, _model: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        if self._forward_start is not None:
            self._forwards.append((self._forward_start, self._now()))

    def _now(self) -> Any:
        """Return a timestamp in the order of this device's work, without waiting for a GPU."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin_step(self) -> None:
        """Start timing a step, before its first batch is requested."""
        self._step_start = time.perf_counter()

    def time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches, and count the time until each is available as data wait."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._data_wait += time.perf_counter() - start
            yield batch

    def add_batches(self, batches: list[dict[str, torch.Tensor]], supervised_tokens: int) -> None:
        """Count the step's micro-batches on this rank, and its supervised tokens over all ranks."""
        self._supervised_tokens += supervised_tokens
        for batch in batches:
            self._padded_tokens += batch["input_ids"].numel()
            self._attended += count_attended_pairs(batch)

    def end_step(self) -> None:
        """Stop timing, after the ranks have synchronized at the step's end."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._step_start
        for start, end in self._forwards:
            self._forward_seconds += end - start if self._device.type != "cuda" else start.elapsed_time(end) / 1000
        self._forwards.clear()

    def read(self, accelerator: Any, tokens: int) -> dict[str, float]:
        """Return the metrics since the last call; nothing without a step. Collective: call on every rank.

        Args:
            tokens: tokens without padding since the last call, over all ranks.
        """
        if not self._steps:
            return {}
        rank = torch.tensor([self._measure_rank()], dtype=torch.float64, device=self._device)
        ranks = accelerator.gather(rank).reshape(-1, len(_COLUMNS)).cpu()
        column = {name: ranks[:, index] for index, name in enumerate(_COLUMNS)}
        metrics = {
            "step_seconds": self._seconds / self._steps,
            "data_wait_fraction": float(column["data_wait"].max()) / self._seconds,
            "padded_tokens_per_second": float(column["padded_tokens"].sum()) / self._seconds,
            "tokens_per_second": tokens / self._seconds,
            "supervised_tokens_per_second": self._supervised_tokens / self._seconds,
            **self._utilization(tokens, float(column["attended"].sum())),
            **_rank_lag((column["forward_seconds"] + column["data_wait"]).tolist()),
            "host_memory_bytes": int(column["host"].max()),
        }
        if self._device.type == "cuda":
            metrics.update(
                {f"memory_{name}_bytes": int(column[name].max()) for name in ("allocated", "reserved", "peak")}
            )
        self._reset()
        return metrics

    def _measure_rank(self) -> list[float]:
        on_gpu = self._device.type == "cuda"
        memory = (
            [torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()]
            if on_gpu
            else [0, 0, 0]
        )
        host = self._process.memory_info().rss
        return [
            self._padded_tokens, float(self._attended), self._forward_seconds, self._data_wait, *memory, host,
        ]  # fmt: skip

    def _utilization(self, tokens: int, attended_tokens: float) -> dict[str, float]:
        """Return MFU and HFU with the plan's FLOP count (planner.cost), for the lengths and supervised tokens of the
        steps; and MFU by PaLM's formula, which counts attention over full rows and all weights. Fractions of 1."""
        tokens = max(tokens, 1)
        load = memory_inputs(self._plan, dict(self._architecture))
        palm = cost.palm_flops_per_token(self._architecture, self._plan.max_length)
        if self._peak_flops is None or load is None or palm is None:
            return {}
        flops = cost.flops_per_token(load, 2 * attended_tokens / tokens, self._supervised_tokens / tokens)
        peak_per_token = self._peak_flops * self._plan.world_size * self._seconds / tokens
        return {
            "mfu": flops.model / peak_per_token,
            "mfu_palm": palm / peak_per_token,
            "hfu": flops.hardware / peak_per_token,
        }


def count_attended_pairs(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Count pairs of a token and a token it attends to, including itself: about half the sum of squared lengths."""
    if "position_ids" in batch:
        return (batch["position_ids"] + 1).sum()
    lengths = batch["attention_mask"].sum(-1)
    return (lengths * (lengths + 1) // 2).sum()


def _rank_lag(seconds: list[float]) -> dict[str, float]:
    """Return the rank with the longest time until the ranks first synchronize, and its excess over the median of the
    others, as a fraction."""
    if len(seconds) < 2:
        return {}
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = sorted(seconds[:slowest] + seconds[slowest + 1 :])
    median = others[len(others) // 2]
    return {"slowest_rank": slowest, "rank_lag": seconds[slowest] / median - 1 if median else 0.0}
