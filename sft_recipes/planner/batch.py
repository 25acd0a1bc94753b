"""The arithmetic of the effective batch: micro-batch, accumulation, steps, warm-up. Rows, never tokens."""

from __future__ import annotations

import math

from sft_recipes.runtime.errors import ConfigError


def per_device_batch_size(effective_batch_size: int, at_most: int, world_size: int) -> int:
    """The largest micro-batch under its ceiling that keeps the effective batch on this many GPUs.

    All sizes count rows as the trainer sees them (packed rows where packing is on).

    Raises:
        ConfigError: no micro-batch does, since the effective batch is no multiple of the GPU count.
    """
    for size in range(min(at_most, effective_batch_size), 0, -1):
        if effective_batch_size % (size * world_size) == 0:
            return size
    counts = ", ".join(str(count) for count in world_sizes_that_divide(effective_batch_size))
    raise ConfigError(
        f"effective_batch_size {effective_batch_size} cannot be shared evenly by {world_size} GPUs or processes; "
        f"these counts can: {counts}"
    )


def gradient_accumulation_steps(effective_batch_size: int, per_device_batch_size: int, world_size: int) -> int:
    """Micro-batches that each rank sums before one optimizer step.

    All three sizes count rows as the trainer sees them.

    Raises:
        ConfigError: the effective batch is not a multiple of one forward pass over all ranks.
    """
    per_pass = per_device_batch_size * world_size
    steps, remainder = divmod(effective_batch_size, per_pass)
    if remainder or not steps:
        counts = ", ".join(str(count) for count in world_sizes_that_divide(effective_batch_size, per_device_batch_size))
        raise ConfigError(
            f"effective_batch_size {effective_batch_size} is not a multiple of {per_device_batch_size} per device "
            f"x {world_size} GPUs = {per_pass}; {counts or 'no number of'} GPUs would do"
        )
    return steps


def world_sizes_that_divide(effective_batch_size: int, per_device_batch_size: int = 1) -> list[int]:
    """GPU counts on which the effective batch is a whole number of forward passes."""
    per_device, remainder = divmod(effective_batch_size, per_device_batch_size)
    if remainder:
        return []
    return [count for count in range(1, per_device + 1) if per_device % count == 0]


def steps_per_epoch(rows: int, effective_batch_size: int) -> int:
    """Whole effective batches in an epoch; the tail that fills none is left out of that epoch."""
    return rows // effective_batch_size


def optimizer_steps(steps_per_epoch: int, num_train_epochs: float, max_steps: int = -1) -> int:
    """Optimizer steps of the whole run; `max_steps` above 0 decides alone, as it does for the Trainer."""
    return max_steps if max_steps > 0 else math.ceil(steps_per_epoch * num_train_epochs)


def warmup_steps(optimizer_steps: int, warmup_ratio: float) -> int:
    """Steps over which the learning rate rises from 0, rounded up as transformers rounds a ratio."""
    return math.ceil(optimizer_steps * warmup_ratio)


def packed_rows(examples: int, mean_tokens: float, max_length: int) -> int:
    """An estimate of the rows that packing makes, taking rows to be full (best-fit packing reaches 99.6% and more)."""
    return math.ceil(examples * min(mean_tokens, max_length) / max_length)
