"""Fingerprints of a rank's state (weights, optimizer, scheduler, random states): a few bytes that change with any bit.

The bytes of tensors are hashed (so -0.0 is not 0.0, and NaNs differ by their bits), one tensor at a time on the host.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from sft_recipes.training import strategy


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
    stepped = [parameter for group in inner.param_groups for parameter in group["params"]]
    if trainer.is_deepspeed_enabled:
        # Between steps ZeRO-3's parameter groups are empty: the optimizer steps the partitions of the master weights.
        stepped = strategy.masters(wrapped)
    state = {
        f"{number}.{key}": value
        for number, parameter in enumerate(stepped)
        for key, value in inner.state.get(parameter, {}).items()
    }
    settings = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    return of({**state, "settings": settings})


def of(state: Mapping[str, Any]) -> str:
    """Return one fingerprint of named tensors (their dtype, shape and elements in order) and plain values."""
    described = {name: _describe(value) for name, value in state.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def _describe(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    local = (value.to_local() if hasattr(value, "to_local") else value).detach()
    content = local.reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
    return [str(local.dtype), list(local.shape), xxhash.xxh3_128_hexdigest(content)]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else repr(value)
