"""Reduces what a rank holds, weights, optimizer, schedule, random numbers, to a few bytes that any changed bit changes.

Tensors are read where they lie, as integers (so -0.0 is not 0.0, and one NaN not another), in pieces of 8 MiB: beside
them a digest needs 16 MiB a device, and the device is waited for once.
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

_WORDS = 2**20  # of eight bytes: a piece
# Odd, so that multiplying by them loses nothing; those of SplitMix64 (doi:10.1145/2660193.2660195), below 2^63.
_FIRST, _SECOND = 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


def of_rank(trainer: Any) -> dict[str, str]:
    """The digest of each kind of state on this rank, whose model and optimizer are prepared."""
    return {
        "weights": of_all(weights(trainer)),
        "optimizer": of_all(optimizer(trainer)),
        "scheduler": _of_plain(trainer.lr_scheduler.state_dict()),
        "rng": random_numbers(),
    }


def weights(trainer: Any) -> dict[str, str]:
    """A digest of each weight and saved buffer that this rank holds, and of its part of DeepSpeed's master copy."""
    held = [*parameters(trainer.model), *_saved_buffers(trainer.model)]
    if trainer.is_deepspeed_enabled:
        masters = strategy.masters(trainer.model_wrapped.optimizer)
        held += [(f"master.{number}", master) for number, master in enumerate(masters)]
    return of_each(held)


def optimizer(trainer: Any) -> dict[str, str]:
    """A digest of each of the optimizer's tensors on this rank, and of its settings and counts."""
    wrapped = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer
    inner = wrapped.optimizer  # accelerate's wrapper and DeepSpeed's partitioned optimizers name it alike
    # Between two steps the groups of ZeRO-3 are empty: what is stepped are the partitions of the master copy.
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
    return {**of_each(tensors), "settings": _of_plain([settings, counts])}


def random_numbers() -> str:
    """The state of every generator that this rank draws from: Python's, NumPy's, torch's on the CPU and on its GPU."""
    name, keys, *rest = np.random.get_state()
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    plain = [random.getstate(), name, keys.tolist(), rest]
    return of_all({**of_each(states.items()), "plain": _of_plain(plain)})


def parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter by its name, or the part of it that lies on this rank, and what 4-bit weights are scaled by."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the outermost layers' weights gathered, and rounded to bf16
    for name, parameter in model.named_parameters():
        yield name, _partition(parameter) if hasattr(parameter, "ds_tensor") else parameter
        if getattr(parameter, "quant_state", None) is not None:
            scales = parameter.quant_state.as_dict(packed=True)
            yield from ((f"{name}.{key}", value) for key, value in scales.items())


def _partition(parameter: Any) -> torch.Tensor:
    """This rank's part of a parameter under ZeRO-3. The last rank's is filled up with memory that nobody wrote."""
    part = parameter.ds_tensor
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return part.reshape(-1)[: max(parameter.ds_numel - rank * part.ds_numel, 0)]


def _saved_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a checkpoint holds; the others are worked out anew by whoever loads the model."""
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}", buffer


def of_all(each: Mapping[str, str]) -> str:
    """One digest of several named ones, whatever their order."""
    return _hashed(json.dumps(sorted(each.items())))


def _of_plain(content: Any) -> str:
    """Of numbers, texts, lists and objects; a tensor among them (a learning rate can be one) as its numbers."""
    return _hashed(json.dumps(content, sort_keys=True, default=_as_plain))


def _as_plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else repr(value)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.no_grad()
def of_each(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """A digest of each tensor by its name, which is mixed in with its dtype, its shape and the order of its elements.

    Exact where one word of eight bytes differs; several differ in vain with a chance of about 2^-60.
    """
    described: list[tuple[str, str, int]] = []
    sums: dict[torch.device, list[torch.Tensor]] = {}
    where: list[torch.device] = []
    for name, tensor in named:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor.data
        pieces = [_of_piece(piece) for piece in _pieces(local)]
        described.append((name, f"{name} {local.dtype} {list(local.shape)}", len(pieces)))
        where += [local.device] * len(pieces)
        sums.setdefault(local.device, []).extend(pieces)
    numbers = {device: iter(torch.stack(found).tolist()) for device, found in sums.items() if found}
    in_order = (next(numbers[device]) for device in where)
    return {name: _hashed(f"{text} {[next(in_order) for _ in range(many)]}") for name, text, many in described}


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor, in pieces."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    yield from flat.split(8 * _WORDS) if len(flat) else ()


def _of_piece(piece: torch.Tensor) -> torch.Tensor:
    """A sum of the piece's words that wraps, each mixed beyond recognition and multiplied by a number of its place.

    Every operation on a word can be undone, so two words at one place never add the same. Mixing comes before the
    places: a plain sum of words and places would let two flipped signs cancel.
    """
    keys, scratch = _workspace(piece.device)
    words = scratch[: -(-len(piece) // 8)]
    words[-1] = 0  # the last word may be filled in part
    words.view(torch.uint8)[: len(piece)].copy_(piece)
    halves = words.view(torch.int32).view(-1, 2)  # low, high
    words.mul_(_FIRST)
    halves[:, 0].bitwise_xor_(halves[:, 1])
    words.mul_(_SECOND)
    halves[:, 0].bitwise_xor_(halves[:, 1])
    words.mul_(keys[: len(words)])
    return words.sum()


@cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """An odd number for each place of a piece, and room for a piece."""
    keys = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        keys.mul_(factor)
        keys.bitwise_xor_((keys >> shift) & ((1 << (64 - shift)) - 1))
    return keys | 1, torch.empty_like(keys)
