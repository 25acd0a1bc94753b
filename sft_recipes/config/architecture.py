"""Parameter counts of decoders: of Llama-shaped ones from the numbers of their config, of others from a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_recipes.config import traced_layers
from sft_recipes.config.schema import Lora

# Llama-shaped decoders that parameter_count supports, and whether a configuration without `tie_word_embeddings` ties.
DENSE_KINDS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite"), False),
    "smollm3": True,
}


DENSE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def is_dense_kind(architecture: Mapping[str, Any]) -> bool:
    """Return whether a model is of a Llama-shaped type, which is the default."""
    return architecture.get("model_type", "llama") in DENSE_KINDS


def is_dense(architecture: Mapping[str, Any]) -> bool:
    """Return whether the closed forms hold: a Llama-shaped decoder whose dimensions are known."""
    return is_dense_kind(architecture) and all(key in architecture for key in DENSE_KEYS)


def find_trace(architecture: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the trace of the layers of a decoder that is not Llama-shaped; None without one."""
    return None if is_dense_kind(architecture) else traced_layers.find(architecture)


def linear_layers(architecture: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the linear layers of one decoder block: name to (inputs, outputs)."""
    hidden, inner = architecture["hidden_size"], architecture["intermediate_size"]
    heads = architecture["num_attention_heads"]
    head_dim = architecture.get("head_dim") or hidden // heads
    key_values = (architecture.get("num_key_value_heads") or heads) * head_dim
    return {
        "q_proj": (hidden, heads * head_dim),
        "k_proj": (hidden, key_values),
        "v_proj": (hidden, key_values),
        "o_proj": (heads * head_dim, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def block_weights(architecture: Mapping[str, Any]) -> int:
    """Return the number of weights in the linear layers of one decoder block, without biases."""
    return sum(inputs * outputs for inputs, outputs in linear_layers(architecture).values())


def parameter_count(architecture: Mapping[str, Any]) -> int | None:
    """Return the parameters of a decoder; None if it is not Llama-shaped and not traced, or lacks the dimensions.

    Of a Llama-shaped one: grouped-query attention, gated MLP, RMS norms, the biases of q, k, v in Qwen 2, and the norms
    of q and k in Qwen 3 and OLMo 2.
    """
    if not is_dense(architecture):
        trace = find_trace(architecture)
        return trace["parameters"] if trace else None
    hidden, kind = architecture["hidden_size"], architecture.get("model_type")
    layers = linear_layers(architecture)
    block = block_weights(architecture) + 2 * hidden
    if architecture.get("attention_bias", kind == "qwen2"):
        block += sum(layers[name][1] for name in ("q_proj", "k_proj", "v_proj"))
        block += hidden if kind != "qwen2" else 0
    if kind == "olmo2":
        block += layers["q_proj"][1] + layers["k_proj"][1]
    if kind == "qwen3":
        block += 2 * (architecture.get("head_dim") or hidden // architecture["num_attention_heads"])
    embeddings = architecture["vocab_size"] * hidden * (1 if architecture.get("tie_word_embeddings") else 2)
    return int(embeddings + architecture["num_hidden_layers"] * block + hidden)


def adapter_count(architecture: Mapping[str, Any], lora: Lora) -> int | None:
    """Return the parameters of the adapters: r x (inputs + outputs) of each adapted layer, and of each expert with
    `lora.experts`."""
    if parameter_count(architecture) is None:
        return None
    if trace := find_trace(architecture):
        sizes, repeated, experts = trace["adapters"], 1, trace["expert_adapters"] if lora.experts else 0
    else:
        sizes = {name: sum(size) for name, size in linear_layers(architecture).items()}
        repeated, experts = architecture["num_hidden_layers"], 0
    adapted = list(sizes) if isinstance(lora.target_modules, str) else lora.target_modules
    return int(lora.r * (repeated * sum(sizes[name] for name in adapted if name in sizes) + experts))
