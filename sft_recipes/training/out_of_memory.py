"""Reports what a rank had allocated when it ran out of memory, and the plan's forecast."""

import resource

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.units import GIB


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or a CPU."""
    import torch

    # The CPU allocator has no error class.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)


def describe(plan: Plan, rank: int, error: BaseException) -> str:
    """Return one line: memory allocated, memory available, and the plan's forecast."""
    reserved, allocated, total = (number / GIB for number in peak_memory(plan))
    peak = f"peak {allocated:.1f} GiB allocated, {reserved:.1f} GiB reserved, of {total:.1f} GiB"
    forecast = plan.memory_bytes_per_gpu
    planned = f"forecast {forecast['total'] / GIB:.1f} GiB" if forecast else "no forecast"
    message = (str(error).splitlines() or [type(error).__name__])[0].partition(". GPU")[0]
    return f"rank {rank} ran out of memory: {peak}; {planned} ({message})"


def peak_memory(plan: Plan) -> tuple[int, int, int]:
    """Return the most bytes that this rank reserved and allocated on its GPU, and the size of the GPU; on a CPU, twice
    the peak resident memory, and the rank's share of the host's memory."""
    import torch

    if plan.uses_gpu:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated(), total
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, peak, host_memory_bytes() // plan.world_size
