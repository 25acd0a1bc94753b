"""Fingerprints of a rank's state (weights, optimizer, scheduler, random states): a few bytes that change with any bit.

Tensors are read on their device as integers (so -0.0 is not 0.0, and NaNs differ by their bits), in chunks of 8 MiB. A
fingerprint needs 16 MiB of additional memory per device, and synchronizes with the device once.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from sft_recipes.training import strategy

_CHUNK = 2**20  # elements of eight bytes
# Odd, so that multiplication loses no bit; the multipliers of SplitMix64 (doi:10.1145/2660193.2660195), below 2^63.
_FIRST, _SECOND = 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


def of_rank(trainer: Any) -> dict[str, str]:
    """Return the fingerprint of each kind of state on this rank; model and optimizer are prepared."""
    return {
        "weights": of_all(weights(trainer)),
        "optimizer": of_all(optimizer(trainer)),
        "scheduler": _of_object(trainer.lr_scheduler.state_dict()),
        "rng": random_numbers(),
    }


def weights(trainer: Any) -> dict[str, str]:
    """Return a fingerprint of each weight and saved buffer on this rank, and of its DeepSpeed fp32 master weights."""
    tensors = [*parameters(trainer.model), *_saved_buffers(trainer.model)]
    if trainer.is_deepspeed_enabled:
        masters = strategy.masters(trainer.model_wrapped.optimizer)
        tensors += [(f"master.{number}", master) for number, master in enumerate(masters)]
    return of_each(tensors)


def optimizer(trainer: Any) -> dict[str, str]:
    """Return a fingerprint of each optimizer tensor on this rank, and of its settings and counters."""
    wrapped = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer
    inner = wrapped.optimizer  # the same attribute in accelerate's wrapper and DeepSpeed's partitioned optimizers
    # Between steps ZeRO-3's parameter groups are empty: the optimizer steps the partitions of the master weights.
    stepped = (
        strategy.masters(wrapped)
        if trainer.is_deepspeed_enabled
        else [parameter for group in inner.param_groups for parameter in group["params"]]
    )
    tensors, counts = [], {}
    for number, parameter in enumerate(stepped):
        for key, value in sorted(inner.state.get(parameter, {}).items()):
            if isinstance(value, torch.Tensor):
                tensors.append((f"{number}.{key}", value))
            else:
                counts[f"{number}.{key}"] = value
    settings = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    return {**of_each(tensors), "settings": _of_object([settings, counts])}


def random_numbers() -> str:
    """Return a fingerprint of the random states of Python, NumPy, and torch on the CPU and the GPU."""
    name, keys, *rest = np.random.get_state()
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    plain = [random.getstate(), name, keys.tolist(), rest]
    return of_all({**of_each(states.items()), "plain": _of_object(plain)})


def parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter, or its shard on this rank, and the scales of 4-bit weights, by name."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the root module's weights gathered, in bf16
    for name, parameter in model.named_parameters():
        yield name, _partition(parameter) if hasattr(parameter, "ds_tensor") else parameter
        if getattr(parameter, "quant_state", None) is not None:
            scales = parameter.quant_state.as_dict(packed=True)
            yield from ((f"{name}.{key}", value) for key, value in scales.items())


def _partition(parameter: Any) -> torch.Tensor:
    """Return this rank's ZeRO-3 shard of a parameter, without the uninitialized padding of the last rank."""
    shard = parameter.ds_tensor
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return shard.reshape(-1)[: max(parameter.ds_numel - rank * shard.ds_numel, 0)]


def _saved_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the persistent buffers, which a checkpoint holds."""
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}", buffer


def of_all(each: Mapping[str, str]) -> str:
    """Combine named fingerprints, in any order, into one."""
    return _hash(json.dumps(sorted(each.items())))


def _of_object(content: Any) -> str:
    """Fingerprint numbers, strings, lists and dicts; a tensor in them (a learning rate can be one) by its values."""
    return _hash(json.dumps(content, sort_keys=True, default=_to_json))


def _to_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else repr(value)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.no_grad()
def of_each(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return a fingerprint of each tensor: of its name, dtype, shape and elements in order.

    Always different if one 8-byte element differs; if several do, equal with a probability of about 2^-60.
    """
    described: list[tuple[str, str, int]] = []
    sums: dict[torch.device, list[torch.Tensor]] = {}
    devices: list[torch.device] = []
    for name, tensor in named:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor.data
        chunks = [_of_chunk(chunk) for chunk in _split(local)]
        described.append((name, f"{name} {local.dtype} {list(local.shape)}", len(chunks)))
        devices += [local.device] * len(chunks)
        sums.setdefault(local.device, []).extend(chunks)
    numbers = {device: iter(torch.stack(chunks).tolist()) for device, chunks in sums.items() if chunks}
    in_order = (next(numbers[device]) for device in devices)
    return {name: _hash(f"{text} {[next(in_order) for _ in range(count)]}") for name, text, count in described}


def _split(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor in chunks."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    yield from flat.split(8 * _CHUNK) if len(flat) else ()


def _of_chunk(chunk: torch.Tensor) -> torch.Tensor:
    """Sum the chunk's int64 elements with wrap-around, each mixed and multiplied by a key of its position.

    Every operation on an element is invertible, so two values at one position never add the same. Mixing comes before
    the keys: in a linear sum of elements and keys two flipped signs would cancel.
    """
    keys, scratch = _workspace(chunk.device)
    elements = scratch[: -(-len(chunk) // 8)]
    elements[-1] = 0  # the last element may be partly filled
    elements.view(torch.uint8)[: len(chunk)].copy_(chunk)
    halves = elements.view(torch.int32).view(-1, 2)  # low, high
    elements.mul_(_FIRST)
    halves[:, 0].bitwise_xor_(halves[:, 1])
    elements.mul_(_SECOND)
    halves[:, 0].bitwise_xor_(halves[:, 1])
    elements.mul_(keys[: len(elements)])
    return elements.sum()


@cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an odd key for each position of a chunk, and a scratch buffer of its size."""
    keys = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        keys.mul_(factor)
        keys.bitwise_xor_((keys >> shift) & ((1 << (64 - shift)) - 1))
    return keys | 1, torch.empty_like(keys)
