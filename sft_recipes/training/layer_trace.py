"""Traces what one decoder layer of each kind of a model allocates, by running the model's own code on fake tensors.

    python -m sft_recipes.training.layer_trace FILE < ARCHITECTURE (JSON)

Fake tensors have shapes, dtypes and storages of the right size, and no data (torch._subclasses.fake_tensor). They are
on the device "cpu", since "cuda" needs a CUDA build; attention and experts take the code path that a GPU takes:
`varlen` or the model's masked attention, grouped matrix products. Optional kernels that are not installed (mamba-ssm,
causal-conv1d, flash-linear-attention) are replaced by the model's implementation in torch, as in training.
config/traced_layers.py finds the result, planner/memory.py uses it.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionMaskInterface, masking_utils
from transformers.pytorch_utils import Conv1D

from sft_recipes.config.schema import Lora
from sft_recipes.data import model_layers
from sft_recipes.runtime.run_dir import write_json
from sft_recipes.training import attention, lora, parameter_table

# Tokens of the traced rows. Bytes are linear in them, or quadratic where attention keeps scores or a mask; the peak of a
# backward pass is the largest of several such functions.
LENGTHS = (1024, 2048, 4096, 8192)


class Mode(NamedTuple):
    """How weights are stored and used: the forecast's cases (planner/memory.py)."""

    dtype: torch.dtype
    autocast: bool = False
    adapters: Lora | None = None
    keeps_gradients: bool = True  # of earlier micro-batches; FSDP2 has none of unsharded weights


MODES = {
    "fp32": Mode(torch.float32),
    "autocast": Mode(torch.float32, autocast=True),
    "bf16": Mode(torch.bfloat16),
    "sharded": Mode(torch.bfloat16, keeps_gradients=False),
    "lora": Mode(torch.bfloat16, True, Lora()),
    "lora fp32": Mode(torch.float32, False, Lora()),
    "experts": Mode(torch.bfloat16, True, Lora(experts=True)),
    "experts fp32": Mode(torch.float32, False, Lora(experts=True)),
}


class Allocations(TorchDispatchMode):
    """Sums the storages that exist, and the FLOPs of matrix products; `known` tensors count as zero bytes."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.current = self.peak = self.flops = self.queries = 0
        self._sizes = WeakIdKeyDictionary()
        self._sizes.update({tensor.untyped_storage(): 0 for tensor in known})

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet is torch.ops.aten._grouped_mm:  # torch's shape function takes 16 bits only
            output = _grouped_product(*args[:3])
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
            self._add(output.untyped_storage())
            return output
        output = func(*args, **(kwargs or {}))
        if "attention" in str(packet) or "attn" in str(packet):
            self.queries = max(self.queries, _width_of(args[0]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: Any) -> None:
        if storage in self._sizes:
            return
        self._sizes[storage] = size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.current -= size


def _grouped_product(left: torch.Tensor, right: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the output of a grouped matrix product: rows by expert, or a gradient of all experts' weights."""
    stack = (len(groups),) if right.ndim == 2 else ()
    return left.new_empty(*stack, left.shape[0], right.shape[-1])


def _width_of(queries: torch.Tensor) -> int:
    """Return heads x width of queries, [tokens, heads, width] or [rows, heads, tokens, width]."""
    return queries.shape[-1] * queries.shape[1]


def trace(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the costs of a model's layers: numbers of parameters, and bytes by attention and mode."""
    _use_gpu_paths()
    model = _build(architecture, torch.bfloat16)
    text = model.config.get_text_config()
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    layers, fused = find_layers(model), parameter_table.fused_experts(model)
    kinds = _kinds(model, layers)
    representatives = [layers[kinds.index(kind)] for kind in range(max(kinds) + 1)]
    types = getattr(text, "layer_types", None)
    default, window = model.config._attn_implementation, getattr(text, "sliding_window", None) or 0
    reason, always = (
        model_layers.masked_attention_reason(
            SimpleNamespace(max_length=length, uses_gpu=True, precision="bf16"), model.config, model, default
        )
        for length in (1 << 30, 1)
    )
    implementations = ([] if always else ["varlen"]) + ([default] if reason else [])
    modes = {name: mode for name, mode in MODES.items() if fused or not (mode.adapters and mode.adapters.experts)}
    linear = _linear_layers(model, head)
    result = {
        "parameters": model.num_parameters(),
        "hidden_size": text.hidden_size,
        "vocab_size": len(embeddings),
        "tied": head is None or head.weight is embeddings,
        "window": window if reason and not always else 0,
        "layers": kinds,
        "adapters": dict(linear),
        "expert_adapters": sum(
            weight.shape[0] * (weight.shape[1] + weight.shape[2])
            for name, weight in model.named_parameters()
            if ".".join(name.split(".")[-2:]) in fused
        ),
        "kinds": [
            {
                "parameters": sum(weight.numel() for weight in layer.parameters()),
                "window": window if types and types[kinds.index(kind)] == "sliding_attention" else 0,
                "linear": sum(module.weight.numel() for module in layer.modules() if _is_linear(module)),
                "largest": max((m.weight.numel() for m in layer.modules() if _is_linear(m)), default=0),
                "bytes": {},
            }
            for kind, layer in enumerate(representatives)
        ],
    }
    for implementation in implementations:
        name = "varlen" if implementation == "varlen" else "masked"
        for mode_name, mode in modes.items():
            measured = _measure(architecture, kinds, implementation, mode)
            for kind, points in zip(result["kinds"], measured, strict=True):
                casts = 2 * kind["linear"] if mode.autocast and not mode.adapters else 0
                kind["bytes"].setdefault(name, {})[mode_name] = _fit(points, name == "masked", casts)
                if mode_name == "bf16":
                    kind |= _fit_flops(points, kind.get("queries", 0))
    experts = ", grouped experts" if fused else ""
    result["assumed"] = " or ".join(dict.fromkeys(f"{name} attention" for name in implementations)) + experts
    return result


def _use_gpu_paths() -> None:
    """Have attention, masks and experts do on fake tensors what they do on a GPU."""

    def attend(queries: Any, keys: Any, values: Any, bounds: Any, longest: int, scale: float | None = None) -> Any:
        options = {"scale": scale, "window_size": (-1, 0), "enable_gqa": queries.shape[1] != keys.shape[1]}
        return varlen_attn(queries, keys, values, bounds, bounds, longest, longest, **options)

    def mask(batch_size: int, q_length: int, kv_length: int, **_named: Any) -> torch.Tensor:
        return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)

    def eager_mask(*, dtype: torch.dtype, **named: Any) -> torch.Tensor:
        return mask(**named).to(dtype)

    attention.varlen = attend
    AttentionMaskInterface.register("sdpa", mask)
    AttentionMaskInterface.register("eager", eager_mask)
    masking_utils.find_packed_sequence_indices = lambda _positions: None


def _build(architecture: dict[str, Any], dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.for_model(**architecture)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def find_layers(model: Any) -> torch.nn.ModuleList:
    """Return the decoder layers: the list of modules with most parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))


def _kinds(model: Any, layers: torch.nn.ModuleList) -> list[int]:
    """Return the kind of each layer: those of one class, type and shapes are of one kind."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    signatures = [
        (type(layer), kind, tuple((name, weight.shape) for name, weight in layer.named_parameters()))
        for layer, kind in zip(layers, types, strict=True)
    ]
    return [list(dict.fromkeys(signatures)).index(signature) for signature in signatures]


def _is_linear(module: Any) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def _linear_layers(model: Any, head: Any) -> Counter[str]:
    """Return inputs + outputs of the linear layers by name, which adapters of rank 1 have as parameters."""
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if _is_linear(module) and module is not head:
            sizes[name.rpartition(".")[2]] += sum(module.weight.shape)
    return sizes


def _measure(architecture: dict[str, Any], kinds: list[int], implementation: str, mode: Mode) -> list[list[Any]]:
    """Return for each kind and length the bytes kept, the peak of the backward pass above them, and forward FLOPs."""
    model = _build(architecture, mode.dtype)
    layers = find_layers(model)
    traced = [layers[kinds.index(kind)] for kind in range(max(kinds) + 1)]
    for layer in layers:
        if layer not in traced:
            layer.forward, layer._modules = _skip, {}
    if mode.adapters:
        from peft import get_peft_model

        get_peft_model(model, lora.adapter_config(mode.adapters, model, "model"))
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        model.enable_input_require_grads()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        model.set_attn_implementation(implementation)
        if mode.keeps_gradients:
            for weight in model.parameters():
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        points = [_run(model, traced, tokens, mode.autocast, implementation == "varlen") for tokens in LENGTHS]
    return [list(each) for each in zip(*points, strict=True)]


def _skip(hidden_states: torch.Tensor, *_arguments: Any, **_named: Any) -> torch.Tensor:
    return hidden_states


def _run(model: Any, layers: list[Any], tokens: int, autocast: bool, bounded: bool) -> list[dict[str, int]]:
    """Run the decoder forward and backward on one row, and return the measurements of each layer."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    allocations = Allocations([*model.parameters(), *model.buffers(), *gradients])
    measured: dict[int, dict[str, int]] = {}
    handles = [hook for layer in layers for hook in _observe(layer, allocations, measured)]
    ids = torch.zeros(1, tokens, dtype=torch.long)
    batch = {"input_ids": ids, "position_ids": ids, "use_cache": False}
    if bounded:
        bounds = torch.zeros(2, dtype=torch.int32)
        batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        batch |= dict.fromkeys(("max_length_q", "max_length_k"), tokens)
    with allocations:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = getattr(model, model.base_model_prefix)(**batch)[0]
        states.backward(torch.zeros_like(states))
    for handle in handles:
        handle.remove()
    return [{"tokens": tokens, **measured[id(layer)]} for layer in layers]


def _observe(layer: Any, allocations: Allocations, measured: dict[int, dict[str, int]]) -> list[Any]:
    """Measure at the start and end of a layer's forward and backward pass."""
    found = measured[id(layer)] = {}

    def before(_layer: Any, _arguments: Any, _named: Any) -> None:
        allocations.queries = 0
        found["kept"], found["flops"] = -allocations.current, -allocations.flops

    def after(_layer: Any, arguments: Any, named: Any, output: Any) -> None:
        found["kept"] += allocations.current
        found["flops"] += allocations.flops
        found["queries"] = allocations.queries
        tree_leaves(output)[0].register_hook(start)
        (arguments[0] if arguments else named["hidden_states"]).register_hook(end)

    def start(_gradient: torch.Tensor) -> None:
        allocations.peak = found["start"] = allocations.current

    def end(_gradient: torch.Tensor) -> None:
        found["temporary"] = allocations.peak - found["start"]

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def _fit(points: list[dict[str, int]], masked: bool, casts: int) -> dict[str, Any]:
    """Return coefficients of 1, tokens and tokens x row length: of the bytes kept, and of the peak above them, which is
    the largest of several linear functions.

    Args:
        casts: autocast's copies of the weights, which the plan counts as buffers.
    """
    x = [point["tokens"] for point in points]
    kept, temporary = ([point[key] for point in points] for key in ("kept", "temporary"))
    squares = [_second_difference(x, values) if masked else 0.0 for values in (kept, temporary)]
    straight = [
        [y - square * t * t for t, y in zip(x, values, strict=True)]
        for values, square in zip((kept, temporary), squares, strict=True)
    ]
    constant, slope = _line(x[-2:], straight[0][-2:])
    lines = [_line(x[i : i + 2], straight[1][i : i + 2]) for i in range(len(x) - 1)]
    return {
        "kept": [round(constant) - casts, round(slope, 3), round(squares[0], 6)],
        "temporary": [[round(a), round(b, 3), round(squares[1], 6)] for a, b in dict.fromkeys(lines)],
    }


def _line(x: list[int], y: list[float]) -> tuple[float, float]:
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return y[0] - slope * x[0], slope


def _second_difference(x: list[int], y: list[int]) -> float:
    """Return the quadratic coefficient of the polynomial through the last three points."""
    (_, left), (_, right) = _line(x[-3:-1], y[-3:-1]), _line(x[-2:], y[-2:])
    return (right - left) / (x[-1] - x[-3])


def _fit_flops(points: list[dict[str, int]], queries: int) -> dict[str, Any]:
    """Return the weights that a token is multiplied with, and the width of attention's queries.

    Explicit scores (eager attention) are 4 x width x tokens^2 FLOPs.
    """
    x, flops = [point["tokens"] for point in points], [point["flops"] for point in points]
    square = _second_difference(x, flops)
    _, slope = _line(x[-2:], [y - square * t * t for t, y in zip(x, flops, strict=True)][-2:])
    return {"active": round(slope / 2), "queries": max(queries, points[0]["queries"], round(square / 4))}


def main(file: str) -> int:
    """Write the trace of the architecture on standard input, or what prevents it; the exit code is 0."""
    architecture = json.load(sys.stdin)
    try:
        result = trace(architecture)
    except Exception as error:  # of any kind: it is a model's code
        result = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    Path(file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(Path(file), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
