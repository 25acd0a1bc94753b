"""Reports what a rank had allocated when it ran out of memory, and the plan's forecast."""

from __future__ import annotations

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.units import GIB

# The CPU allocator has no error class.
_CPU_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or a CPU."""
    import torch

    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(message in str(error) for message in _CPU_MESSAGES)


def describe(plan: Plan, rank: int, error: BaseException) -> str:
    """Return one line: memory allocated, memory available, and the plan's forecast."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        allocated = (
            f"{torch.cuda.memory_allocated() / GIB:.1f} GiB allocated, {torch.cuda.memory_reserved() / GIB:.1f} GiB "
            f"reserved, peak {torch.cuda.max_memory_allocated() / GIB:.1f} of {total / GIB:.1f} GiB"
        )
    else:
        allocated = f"peak {peak_host_memory_bytes() / GIB:.1f} of {host_memory_bytes() / GIB:.1f} GiB"
    forecast = plan.memory_bytes_per_gpu
    planned = f"forecast {forecast['total'] / GIB:.1f} GiB" if forecast else "no forecast"
    message = (str(error).splitlines() or [type(error).__name__])[0].partition(". GPU")[0]
    return f"rank {rank} ran out of memory: {allocated}; {planned} ({message})"


def peak_host_memory_bytes() -> int:
    """Return this process's peak resident memory, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
