"""Says what a rank held when its memory ran out, and what the plan had said it would."""

from __future__ import annotations

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.units import GIB


def ran_out(error: BaseException) -> bool:
    """Whether an error is of memory: the GPU's allocator has a class of its own, the CPU's only its words."""
    import torch

    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def what_ran_out(plan: Plan, rank: int, error: BaseException) -> str:
    """One line: what was held, of how much, and what the plan said."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        held = (
            f"{torch.cuda.memory_allocated() / GIB:.1f} GiB allocated, {torch.cuda.memory_reserved() / GIB:.1f} "
            f"reserved, {torch.cuda.max_memory_allocated() / GIB:.1f} at the peak, of {total / GIB:.1f}"
        )
    else:
        here = host_memory_bytes()
        held = f"{peak_of_the_host() / GIB:.1f} GiB at the peak, of {here / GIB:.1f}"
    said = plan.memory_bytes_per_gpu
    planned = f"the plan said {said['total'] / GIB:.1f}" if said else "the plan could not say"
    asked = (str(error).splitlines() or [type(error).__name__])[0].partition(". GPU")[0]
    return f"rank {rank} ran out of memory: {held}; {planned} ({asked})"


def peak_of_the_host() -> int:
    """The most of the host's memory that this process held, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
