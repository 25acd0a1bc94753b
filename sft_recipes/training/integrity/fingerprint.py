"""Fingerprints of a rank's state (weights, optimizer, scheduler, random states): a few bytes that change with any bit.

Tensors are read on their device as integers (so -0.0 is not 0.0, and NaNs differ by their bits), in chunks of 8 MiB.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from sft_recipes.training import strategy

_CHUNK = 2**20  # elements of eight bytes
# Odd, so that multiplication loses no bit; the multipliers of SplitMix64 (doi:10.1145/2660193.2660195), below 2^63.
_MULTIPLIERS = (0x3F58476D1CE4E5B9, 0x14D049BB133111EB)


def of_rank(trainer: Any) -> dict[str, str]:
    """Return the fingerprint of each kind of state on this rank; model and optimizer are prepared."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        "weights": weights(trainer),
        "optimizer": optimizer(trainer),
        "scheduler": of(trainer.lr_scheduler.state_dict()),
        "rng": of(states),
    }


def weights(trainer: Any) -> str:
    """Return the fingerprint of the weights and saved buffers on this rank, and of DeepSpeed's fp32 master weights."""
    tensors = trainer.model.state_dict()
    sharded = ((name, weight) for name, weight in trainer.model.named_parameters() if hasattr(weight, "ds_tensor"))
    tensors |= {name: _partition(weight) for name, weight in sharded}
    if trainer.is_deepspeed_enabled:
        masters = strategy.masters(trainer.model_wrapped.optimizer)
        tensors |= {f"master.{number}": master for number, master in enumerate(masters)}
    return of(tensors)


def _partition(parameter: Any) -> torch.Tensor:
    """Return this rank's ZeRO-3 shard of a parameter, without the uninitialized padding of the last rank."""
    shard: torch.Tensor = parameter.ds_tensor
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return shard.reshape(-1)[: max(parameter.ds_numel - rank * parameter.ds_tensor.ds_numel, 0)]


def optimizer(trainer: Any) -> str:
    """Return the fingerprint of the optimizer's state on this rank, and of its settings."""
    wrapped = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer
    inner = wrapped.optimizer  # the same attribute in accelerate's wrapper and DeepSpeed's partitioned optimizers
    # Between steps ZeRO-3's parameter groups are empty: the optimizer steps the partitions of the master weights.
    stepped = (
        strategy.masters(wrapped)
        if trainer.is_deepspeed_enabled
        else [parameter for group in inner.param_groups for parameter in group["params"]]
    )
    state = {
        f"{number}.{key}": value
        for number, parameter in enumerate(stepped)
        for key, value in inner.state.get(parameter, {}).items()
    }
    settings = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    return of({**state, "settings": settings})


@torch.no_grad()
def of(state: Mapping[str, Any]) -> str:
    """Return one fingerprint of named tensors (their dtype, shape and elements in order) and plain values.

    Always different if one 8-byte element differs; if several do, equal with a probability of about 2^-60.
    """
    described = {name: _describe(value) for name, value in state.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def _describe(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    local = value.to_local() if hasattr(value, "to_local") else value.data
    chunks = local.reshape(-1).view(torch.uint8).split(8 * _CHUNK) if local.numel() else ()
    sums = torch.stack([_of_chunk(chunk) for chunk in chunks]).tolist() if chunks else []
    return [str(local.dtype), list(local.shape), sums]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else repr(value)


def _of_chunk(chunk: torch.Tensor) -> torch.Tensor:
    """Sum the chunk's int64 elements with wrap-around, each mixed and multiplied by a key of its position.

    Every operation on an element is invertible, so two values at one position never add the same. Mixing comes before
    the keys: in a linear sum of elements and keys two flipped signs would cancel.
    """
    elements = torch.nn.functional.pad(chunk, (0, -len(chunk) % 8)).view(torch.int64)
    for multiplier in _MULTIPLIERS:
        elements = elements * multiplier
        elements ^= (elements >> 32) & 0xFFFFFFFF
    return (elements * _keys(chunk.device)[: len(elements)]).sum()


@cache
def _keys(device: torch.device) -> torch.Tensor:
    """Return an odd random number for each position of a chunk."""
    return (torch.randint(2**62, (_CHUNK,), generator=torch.Generator().manual_seed(0)) * 2 + 1).to(device)
