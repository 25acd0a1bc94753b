"""Traces what one decoder layer of each kind of a model allocates, by running the model's own code on fake tensors.

    python -m sft_recipes.training.layer_trace FILE < {"architecture": …, "modes": …} (JSON)

Fake tensors have shapes, dtypes and storages of the right size, and no data (torch._subclasses.fake_tensor). They are
on the device "cpu", since "cuda" needs a CUDA build; attention and experts take the code path that a GPU takes:
`varlen` or the model's masked attention, grouped matrix products. Optional kernels that are not installed (mamba-ssm,
causal-conv1d, flash-linear-attention) are replaced by the model's implementation in torch, as in training.
config/traced_layers.py finds the result, planner/memory.py uses it.
"""

import json
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sft_recipes.config.schema import Lora
from sft_recipes.data import model_layers
from sft_recipes.runtime import library_imports
from sft_recipes.runtime.run_dir import write_json
from sft_recipes.training import attention, lora, parameter_table

# Tokens of the traced rows: few for layers that loop over tokens in Python. Bytes are linear in them, or quadratic
# where attention keeps scores or a mask; the peak of a backward pass is the largest of several such functions.
LENGTHS, SHORT = (1024, 2048, 8192), (128, 256, 512)

# The forecast's cases (planner/memory.py): dtype of the weights, autocast, adapters, and whether gradients of earlier
# micro-batches exist, which FSDP2 has not of unsharded weights.
MODES: dict[str, tuple[torch.dtype, bool, Lora | None, bool]] = {
    "fp32": (torch.float32, False, None, True),
    "autocast": (torch.float32, True, None, True),
    "bf16": (torch.bfloat16, False, None, True),
    "sharded": (torch.bfloat16, True, None, False),
    "lora": (torch.bfloat16, True, Lora(), True),
    "lora fp32": (torch.float32, False, Lora(), True),
    "experts": (torch.bfloat16, True, Lora(experts=True), True),
    "experts fp32": (torch.float32, False, Lora(experts=True), True),
}


class Allocations(TorchDispatchMode):
    """Sums the storages that exist, and the FLOPs of matrix products; storages of `known` tensors count as zero."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.current = self.peak = self.flops = self.queries = 0
        self._sizes = WeakIdKeyDictionary()
        self._sizes.update({tensor.untyped_storage(): 0 for tensor in known})

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet is torch.ops.aten._grouped_mm:  # torch's shape function takes 16 bits only
            # Rows by expert, or the gradient of all experts' weights.
            stack = (len(args[2]),) if args[1].ndim == 2 else ()
            output = args[0].new_empty(*stack, args[0].shape[0], args[1].shape[-1])
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        else:
            output = func(*args, **(kwargs or {}))
        if "attention" in str(packet) or "attn" in str(packet):
            self.queries = max(self.queries, args[0].shape[1] * args[0].shape[-1])  # heads x width
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._sizes:
                self._sizes[storage] = size = storage.nbytes()
                self._change(size)
                weakref.finalize(storage, self._change, -size)
        return output

    def _change(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)


def trace(architecture: dict[str, Any], modes: Sequence[str] = tuple(MODES)) -> dict[str, Any]:
    """Return the costs of a model's layers: numbers of parameters, and bytes by attention and mode.

    Args:
        modes: names of `MODES`; FLOPs are counted in "bf16". Those of experts only if the model has fused ones.
    """
    _use_gpu_paths()
    model = _build(architecture, torch.bfloat16)
    text, head, embeddings = model.config.get_text_config(), model.get_output_embeddings(), model.get_input_embeddings()
    layers, fused = find_layers(model), parameter_table.fused_experts(model)
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    kinds = _kinds(layers, types)
    stateful = set(types) & model_layers.WITH_STATE or getattr(model, "_is_stateful", False)
    default, window = model.config._attn_implementation, getattr(text, "sliding_window", None) or 0
    plans = (SimpleNamespace(max_length=length, uses_gpu=True, precision="bf16") for length in (1 << 30, 1))
    reason, always = (model_layers.masked_attention_reason(plan, model.config, model, default) for plan in plans)
    implementations = ([] if always else ["varlen"]) + ([default] if reason else [])
    experts = [
        weight.shape for layer in layers for weight in layer.parameters() if weight.ndim == 3 and weight.shape[1] > 1
    ]
    costs = []
    for index in map(kinds.index, range(max(kinds) + 1)):
        linear = [module.weight.numel() for module in layers[index].modules() if isinstance(module, lora.LINEAR)]
        numbers = {"linear": sum(linear), "largest": max(linear, default=0)}
        numbers |= {"parameters": sum(weight.numel() for weight in layers[index].parameters())}
        costs.append(numbers | {"window": window if types[index] == "sliding_attention" else 0})
    for implementation in implementations:
        for mode_name in (name for name in modes if fused or "experts" not in name):
            points = _measure(architecture, kinds, implementation, mode_name, SHORT if stateful else LENGTHS)
            name = "varlen" if implementation == "varlen" else "masked"
            costs = [_fit(*each, name, mode_name) for each in zip(points, costs, strict=True)]
    return {
        "modes": sorted(modes),
        "parameters": model.num_parameters(), "hidden_size": text.hidden_size, "vocab_size": embeddings.num_embeddings,
        "tied": head is None or head.weight is embeddings.weight, "window": window if reason and not always else 0,
        "adapters": lora.linear_layers(model), "layers": kinds, "kinds": costs,
        "expert_adapters": sum(number * (rows + columns) for number, rows, columns in experts),
        "assumed": f"{' or '.join(implementations)} attention" + (", grouped experts" if fused else ""),
    }  # fmt: skip


def _use_gpu_paths() -> None:
    """Have attention and masks do on fake tensors what they do on a GPU."""

    def sdpa(*arguments: Any, dropout: float = 0.0, **named: Any) -> Any:
        return sdpa_attention_forward(*arguments, **named)  # a GPU's kernels with dropout keep no scores

    def mask(batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype, **_named: Any) -> torch.Tensor:
        return torch.ones(batch_size, 1, q_length, kv_length, dtype=dtype)

    attention.varlen = attention.varlen_on_gpu
    AttentionInterface.register("sdpa", sdpa)
    AttentionMaskInterface.register("sdpa", lambda **named: mask(**{**named, "dtype": torch.bool}))
    AttentionMaskInterface.register("eager", mask)
    masking_utils.find_packed_sequence_indices = lambda _positions: None  # it reads data


def _build(architecture: dict[str, Any], dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.for_model(**architecture)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def find_layers(model: Any) -> torch.nn.ModuleList:
    """Return the decoder layers: the list of modules with most parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))


def _kinds(layers: torch.nn.ModuleList, types: list[Any]) -> list[int]:
    """Return the kind of each layer: those of one class, type and shapes are of one kind."""
    signatures = [
        (type(layer), kind, tuple((name, weight.shape) for name, weight in layer.named_parameters()))
        for layer, kind in zip(layers, types, strict=True)
    ]
    return [list(dict.fromkeys(signatures)).index(signature) for signature in signatures]


def _measure(
    architecture: dict[str, Any], kinds: list[int], implementation: str, mode: str, lengths: Sequence[int]
) -> list[list[dict[str, int]]]:
    """Return the measurements of each kind of layer, one per length of a row."""
    dtype, autocast, adapters, keeps_gradients = MODES[mode]
    model = _build(architecture, dtype)
    layers = find_layers(model)
    traced = [layers[kinds.index(kind)] for kind in range(max(kinds) + 1)]
    for layer in layers:
        if layer not in traced:
            layer.forward, layer._modules = lambda hidden_states, *_, **__: hidden_states, {}
    if adapters:
        from peft import get_peft_model

        get_peft_model(model, lora.adapter_config(adapters, model, None))
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        model.enable_input_require_grads()
    points = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        model.set_attn_implementation(implementation)
        for weight in model.parameters() if keeps_gradients else ():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        for tokens in lengths:
            model.activation_checkpointing_disable()
            kept = _run(model, traced, tokens, autocast, backward=False)
            if model.supports_gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            peaks = _run(model, traced, tokens, autocast, backward=True)
            points.append([{**one, **two, "tokens": tokens} for one, two in zip(kept, peaks, strict=True)])
    return [list(each) for each in zip(*points, strict=True)]


def _run(model: Any, layers: list[Any], tokens: int, autocast: bool, backward: bool) -> list[dict[str, int]]:
    """Run the decoder on one row, and return for each layer what it keeps, or the peak of its backward pass."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    now = Allocations([*model.parameters(), *model.buffers(), *gradients])
    found: dict[Any, dict[str, int]] = {}

    def before(layer: Any, _arguments: Any, _named: Any) -> None:
        now.queries = 0
        found.setdefault(layer, {"kept": -now.current, "flops": -now.flops})

    def after(layer: Any, arguments: Any, named: Any, output: Any) -> None:
        measured, output = found[layer], tree_leaves(output)[0]
        if "queries" in measured:
            return  # recomputed
        measured |= {"queries": now.queries, "kept": measured["kept"] + now.current}
        measured["flops"] += now.flops

        def start(gradient: torch.Tensor) -> None:
            now.peak, measured["start"] = now.current, now.current - gradient.untyped_storage().nbytes()

        def end(_gradient: torch.Tensor) -> None:
            measured["peak"] = now.peak - measured["start"]

        if backward:
            output.register_hook(start)
            (arguments[0] if arguments else named["hidden_states"]).register_hook(end)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    ids = torch.zeros(1, tokens, dtype=torch.long)
    batch = {"input_ids": ids, "position_ids": ids, "use_cache": False}
    if attention.takes_boundaries(model.config._attn_implementation):
        batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.zeros(2, dtype=torch.int32))
        batch |= dict.fromkeys(("max_length_q", "max_length_k"), tokens)
    with now:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = getattr(model, model.base_model_prefix)(**batch)[0]
        if backward:
            states.backward(torch.zeros_like(states))
    for handle in handles:
        handle.remove()
    keys = ("peak",) if backward else ("kept", "flops", "queries")
    return [{key: found[layer][key] for key in keys} for layer in layers]


def _fit(points: list[dict[str, int]], kind: dict[str, Any], attended: str, mode: str) -> dict[str, Any]:
    """Return what a kind of layer has after these measurements: coefficients of 1, tokens and tokens x row length.

    Of the bytes kept; of the peak of its backward pass after recomputation, the largest of such functions; and of
    FLOPs, where explicit scores of attention are 4 x width of the queries x tokens^2.
    """
    x, square = [point["tokens"] for point in points], attended == "masked"

    def fit(key: str, chosen: slice) -> list[float]:
        y = [point[key] for point in points]
        found = np.polyfit(x[chosen], y[chosen], 2 if square else 1)[::-1]
        return [*(round(float(value), 3) for value in found), 0.0][:3]

    kept = fit("kept", slice(None))
    peaks = [fit("peak", slice(None))] if square else [fit("peak", slice(2)), fit("peak", slice(1, 3))]
    for function in (kept, *peaks) if mode == "autocast" else ():
        function[0] -= 2 * kind["linear"]  # autocast's copies of the weights, which the plan counts as buffers
    kind.setdefault("bytes", {}).setdefault(attended, {})[mode] = {"kept": kept, "peak": peaks}
    _, slope, scores = fit("flops", slice(None))
    if mode == "bf16":
        kind |= {"active": round(slope / 2), "queries": max(points[0]["queries"], round(scores / 4))}
    return kind


def main(file: str) -> int:
    """Write the trace that standard input asks for, or what prevents it; the exit code is 0."""
    library_imports.skip_unused_libraries("lora", "adamw_torch", [], False, trust_remote_code=False)
    try:
        result = trace(**json.load(sys.stdin))
    except Exception as error:  # of any kind: it is a model's code
        result = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    Path(file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(Path(file), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
