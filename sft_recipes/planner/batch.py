"""Effective batch arithmetic, in rows: micro-batch, gradient accumulation, optimizer steps, warm-up."""

from __future__ import annotations

import math

from sft_recipes.runtime.errors import ConfigError


def per_device_batch_size(effective_batch_size: int, max_size: int, world_size: int) -> int:
    """Return the largest micro-batch up to `max_size` that keeps the effective batch on this many ranks.

    All sizes are rows of the trainer (packed rows if packing is on).

    Raises:
        ConfigError: the effective batch is not a multiple of the number of ranks.
    """
    for size in range(min(max_size, effective_batch_size), 0, -1):
        if effective_batch_size % (size * world_size) == 0:
            return size
    counts = ", ".join(map(str, world_sizes_that_divide(effective_batch_size)))
    raise ConfigError(
        f"effective_batch_size: found {effective_batch_size}, expected a multiple of {world_size} GPUs or processes. "
        f"Set GPUS (or PROCESSES) to one of {counts}"
    )


def world_sizes_that_divide(effective_batch_size: int) -> list[int]:
    """Return the GPU counts of which the effective batch is a multiple."""
    return [count for count in range(1, effective_batch_size + 1) if effective_batch_size % count == 0]


def fill_effective_batch(rows: int, effective_batch_size: int) -> int:
    """Return the rows after repeating a few to complete effective batches."""
    return math.ceil(rows / effective_batch_size) * effective_batch_size


def optimizer_steps(steps_per_epoch: int, num_train_epochs: float, max_steps: int = -1) -> int:
    """Return the optimizer steps of the run; `max_steps` above 0 overrides epochs, as in the Trainer."""
    return max_steps if max_steps > 0 else math.ceil(steps_per_epoch * num_train_epochs)


def warmup_steps(optimizer_steps: int, warmup_ratio: float) -> int:
    """Return the warm-up steps, rounded up as transformers does."""
    return math.ceil(optimizer_steps * warmup_ratio)


def packed_rows(examples: int, mean_tokens: float, max_length: int) -> int:
    """Estimate the packed rows, assuming full rows (best-fit packing fills 99.6% or more)."""
    return math.ceil(examples * min(mean_tokens, max_length) / max_length)
