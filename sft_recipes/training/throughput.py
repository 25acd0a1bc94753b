"""Measures what a step costs: its time and the share that waits for data, tokens a second, memory, and MFU.

Every number is taken where it falls without a synchronisation of its own; the ranks' numbers are brought together once
a log line, in one gather. The step's end waits for the GPU already (callbacks/stop.py), so wall time is the work's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch

from sft_recipes.planner import cost
from sft_recipes.planner.plan import Plan, memory_inputs

# What a rank sends, in this order.
_RANK = ("slots", "attended", "own_seconds", "waited", "allocated", "reserved", "peak", "host")


class ThroughputMeter:
    """Counts between two log lines; `read` gives the figures of all ranks and begins anew."""

    def __init__(self, plan: Plan, architecture: Mapping[str, Any], peak_flops: float | None, device: torch.device):
        """`peak_flops` is the dense bf16 FLOP/s of one device (config/gpu_types.py); None where it is not known."""
        self._plan = plan
        self._architecture = architecture
        self._peak_flops = peak_flops
        self._device = device
        self._process = psutil.Process()
        self._began = 0.0
        self._forward_began: Any = None
        self._forwards: list[tuple[Any, Any]] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._own = 0.0
        self._supervised_tokens = 0
        self._slots = 0
        self._attended = torch.zeros((), dtype=torch.int64, device=self._device)

    def watch(self, model: torch.nn.Module) -> None:
        """Times the forward passes of training: the part of a step in which a rank waits for no other, under engines
        that keep the weights whole."""
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    def _before_forward(self, model: torch.nn.Module, _inputs: Any) -> None:
        self._forward_began = self._now() if model.training else None

    def _after_forward(self, _model: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        if self._forward_began is not None:
            self._forwards.append((self._forward_began, self._now()))

    def _now(self) -> Any:
        """An instant in the order of this device's work: a GPU is not waited for."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_begins(self) -> None:
        """Before the step's first row is asked for."""
        self._began = time.perf_counter()

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each is there is data wait."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - began
            yield batch

    def saw(self, batches: list[dict[str, torch.Tensor]], supervised_tokens: int) -> None:
        """The step's micro-batches on this rank, and its supervised tokens over all ranks."""
        self._supervised_tokens += supervised_tokens
        for batch in batches:
            self._slots += batch["input_ids"].numel()
            self._attended += attended(batch)

    def step_ends(self) -> None:
        """After the ranks have met at the step's end."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._began
        for began, ended in self._forwards:
            self._own += ended - began if self._device.type != "cuda" else began.elapsed_time(ended) / 1000
        self._forwards.clear()

    def read(self, accelerator: Any, tokens: int) -> dict[str, float]:
        """The figures since the last call; nothing where no step was made. All ranks take part.

        Args:
            tokens: tokens that are no padding since the last call, over all ranks.
        """
        if not self._steps:
            return {}
        mine = torch.tensor([self._mine()], dtype=torch.float64, device=self._device)
        ranks = accelerator.gather(mine).reshape(-1, len(_RANK)).cpu()
        of = {name: ranks[:, column] for column, name in enumerate(_RANK)}
        figures = {
            "step_seconds": self._seconds / self._steps,
            "data_wait_fraction": float(of["waited"].max()) / self._seconds,
            "padded_tokens_per_second": float(of["slots"].sum()) / self._seconds,
            "tokens_per_second": tokens / self._seconds,
            "supervised_tokens_per_second": self._supervised_tokens / self._seconds,
            **self._utilisation(tokens, float(of["attended"].sum())),
            **_lag((of["own_seconds"] + of["waited"]).tolist()),
            "host_memory_bytes": int(of["host"].max()),
        }
        if self._device.type == "cuda":
            figures.update({f"memory_{name}_bytes": int(of[name].max()) for name in ("allocated", "reserved", "peak")})
        self._begin_anew()
        return figures

    def _mine(self) -> list[float]:
        on_gpu = self._device.type == "cuda"
        memory = (
            [torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()]
            if on_gpu
            else [0, 0, 0]
        )
        host = self._process.memory_info().rss
        return [self._slots, float(self._attended), self._own, self._waited, *memory, host]

    def _utilisation(self, tokens: int, attended_tokens: float) -> dict[str, float]:
        """MFU and HFU with the plan's count of FLOPs (planner.cost), for the lengths and supervised tokens that the
        steps had; and MFU by PaLM's formula, which counts attention over whole rows and all weights. Shares of one."""
        tokens = max(tokens, 1)
        load = memory_inputs(self._plan, dict(self._architecture))
        flops = cost.flops_per_token(load, 2 * attended_tokens / tokens, self._supervised_tokens / tokens)
        palm = cost.palm_flops_per_token(self._architecture, self._plan.max_length)
        if self._peak_flops is None or flops is None or palm is None:
            return {}
        peak_per_token = self._peak_flops * self._plan.world_size * self._seconds / tokens
        return {
            "mfu": flops.model / peak_per_token,
            "mfu_palm": palm / peak_per_token,
            "hfu": flops.hardware / peak_per_token,
        }


def attended(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Pairs of a token and one that it attends to, itself included, over the batch: half the sum of squared lengths."""
    if "position_ids" in batch:
        return (batch["position_ids"] + 1).sum()
    lengths = batch["attention_mask"].sum(-1)
    return (lengths * (lengths + 1) // 2).sum()


def _lag(seconds: list[float]) -> dict[str, float]:
    """Which rank worked longest until the ranks first wait for each other, and by what share longer than the others'
    middle one."""
    if len(seconds) < 2:
        return {}
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = sorted(seconds[:slowest] + seconds[slowest + 1 :])
    middle = others[len(others) // 2]
    return {"slowest_rank": slowest, "rank_lag": seconds[slowest] / middle - 1 if middle else 0.0}
